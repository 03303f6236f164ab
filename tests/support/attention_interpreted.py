"""Runs the attention kernels and their backend under Triton's interpreter, on the CPU, and prints one JSON
document: name → error of the result, in units of its tolerance.

A process of its own, because Triton looks at TRITON_INTERPRET when a kernel is defined. The interpreter's
bf16 products are wrong, so the operands are float16 and float32 here.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from firebox.attention import triton_paged
from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import attention_decode, attention_extend
from firebox.kernels._attention import FP8, Problem
from firebox.kernels._attention_cases import Case, make
from tests.support import quick_interpreter
from tests.support.attention_run import cache_of, error, run

F16, F32 = torch.float16, torch.float32
KERNELS = (attention_decode, attention_extend)
# number of a case → types of queries and cache beyond (F16, F16), in which every case runs
MORE_TYPES = {
    0: [(F32, F32)],
    2: [(F32, F32), (F16, FP8)],
    6: [(F32, F16)],
    8: [(F16, FP8)],
    11: [(F32, F32)],
}

# step → (queries, context) of each request; the backend divides it between the kernels
STEPS = {
    "decode": ((1, 70), (1, 1), (3, 40)),
    "prefill": ((40, 40), (17, 90)),
    "both": ((1, 300), (33, 100), (0, 4), (16, 16), (2, 9)),
}


def kernel_cases() -> dict[str, tuple[Any, Case]]:
    """Name → kernel and case."""
    return {
        f"{kernel.OP} {number} {dtype} {kv_dtype}": (kernel, case.of(dtype, kv_dtype))
        for kernel in KERNELS
        for number, case in enumerate(kernel.CASES)
        for dtype, kv_dtype in [(F16, F16), *MORE_TYPES.get(number, [])]
    }


def backend_cases() -> dict[str, Case]:
    """Name → layer and step, for plan and run of the backend."""
    plain = Problem(4, 2, 64, 64, 16, F16, F16)
    window = replace(plain, window=True, sinks=F16)
    latent = Problem(4, 1, 576, 512, 16, F16, F16)
    fp8 = replace(plain, kv_dtype=FP8)
    return {
        **{f"backend {name}": Case(plain, step) for name, step in STEPS.items()},
        "backend window and sinks": Case(window, STEPS["both"], window_tokens=20),
        "backend latent": Case(latent, ((1, 30), (18, 33))),
        "backend fp8": Case(fp8, STEPS["both"]),
        "backend tree": Case(replace(plain, tree=True), ((6, 90), (20, 33), (1, 1))),
        "backend splits": Case(plain, ((1, 1200), (1, 17))),
    }


def run_kernel(kernel: Any, case: Case, gpu: Gpu) -> float:
    """The error of one launch, or of two that divide the keys."""
    made = kernel.inputs(case)
    return error(run(kernel, case, gpu, made), kernel.reference(case.problem, made)) / case.tolerance


def run_backend(case: Case) -> float:
    """The error of plan and run."""
    made = make(case)
    page_table = made["page_table"].long()
    plan = triton_paged.plan(made["query_start"], made["context_tokens"], page_table, tree=made["tree"])
    window = case.window_tokens or None
    found = triton_paged.run(
        made["q"], cache_of(made), plan, made["scale"], window_tokens=window, sinks=made["sinks"]
    )
    return error(found, attention_decode.reference(case.problem, made)) / case.tolerance


def run_refilled() -> float:
    """A plan for long contexts, refilled with those of another step: as a graph is captured and replayed."""
    problem = Problem(4, 2, 64, 64, 16, F16, F16)
    case = Case(problem, ((1, 130), (1, 1), (1, 700)))
    made = make(case)
    captured = np.full(3, 3), torch.zeros(3, 64, dtype=torch.int64)
    plan = triton_paged.plan(made["query_start"], *captured, context_bound=1024)
    addresses = [tensor.data_ptr() for tensor in (plan.paged.page_table, plan.paged.context_tokens)]
    triton_paged.refill(plan, made["context_tokens"], made["page_table"].long())
    assert addresses == [tensor.data_ptr() for tensor in (plan.paged.page_table, plan.paged.context_tokens)]
    found = triton_paged.run(made["q"], cache_of(made), plan, made["scale"])
    return error(found, attention_decode.reference(problem, made)) / case.tolerance


def rows_left_alone() -> float:
    """Decode's share of rows that were written although their request has too many queries for it."""
    case = Case(Problem(4, 2, 64, 64, 16, F16, F16), ((1, 40), (17, 40), (1, 3)))
    out = run(attention_decode, case, find_gpu("h200"), make(case))
    assert not out[[0, 18]].isnan().any()
    return float((~out[1:18].isnan()).float().mean())


def main() -> int:
    """Everything above."""
    quick_interpreter.begin()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy on log2 of zero, which is meant
    triton_paged.gpu_of = lambda device: find_gpu("h200")  # type: ignore[assignment]
    found = {}
    for index, (name, (kernel, case)) in enumerate(kernel_cases().items()):
        found[name] = run_kernel(kernel, case, find_gpu(("h200", "gb10")[index % 2]))
    found |= {name: run_backend(case) for name, case in backend_cases().items()}
    found |= {"backend refilled": run_refilled(), "rows left alone": rows_left_alone()}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
