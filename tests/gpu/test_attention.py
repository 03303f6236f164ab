"""The attention kernels on a GPU: every case in every type, and what only a GPU can show: offsets beyond
2^31, long contexts, CUDA graphs. Needs torch, triton, numpy and pytest, and nothing of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from firebox.attention import triton_paged
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import attention_decode as decode
from firebox.kernels import attention_extend as extend
from firebox.kernels._attention import FP8, Config, Problem
from firebox.kernels._attention_cases import Case, attention, make
from tests.support.attention_run import cache_of, error, run

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
TYPES = [(BF16, BF16), (F16, F16), (BF16, FP8), (torch.float32, BF16)]
CASES = [
    pytest.param(kernel, number, dtypes, id=f"{kernel.OP} {number} {dtypes[0]} {dtypes[1]}")
    for kernel in (decode, extend)
    for number in range(len(kernel.CASES))
    for dtypes in TYPES
]  # fmt: skip


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need an NVIDIA GPU"
    return found


@pytest.mark.parametrize(("kernel", "number", "dtypes"), CASES)
def test_equals_the_formula(gpu: Gpu, kernel: ModuleType, number: int, dtypes: tuple[Any, Any]) -> None:
    case = kernel.CASES[number].of(*dtypes)
    for seed in (0, 1):
        made = make(case, seed, "cuda")
        found = error(run(kernel, case, gpu, made), attention(case.problem, made))
        assert found < case.tolerance, f"{found:.2e} of the RMS; the tolerance is {case.tolerance}"


def test_a_result_does_not_change_from_run_to_run(gpu: Gpu) -> None:
    """Splits are merged in their own order, not in that of their arrival."""
    case = Case(Problem(16, 2, 128, 128, 64), ((1, 9000), (1, 70), (2, 4001)), splits=33)
    made = make(case, 0, "cuda")
    first = run(decode, case, gpu, made)
    assert error(first, attention(case.problem, made)) < case.tolerance
    assert all(torch.equal(first, run(decode, case, gpu, made)) for _ in range(20))


@pytest.mark.parametrize("problem", [Problem(64, 8, 128, 128, 64), Problem(16, 1, 576, 512, 64)])
@pytest.mark.parametrize("splits", [1, 7, 66, 256])
def test_long_contexts(gpu: Gpu, problem: Problem, splits: int) -> None:
    case = Case(problem, ((1, 131_072), (1, 65_001)), splits=splits)
    made = big(case)
    assert error(run(decode, case, gpu, made), attention(problem, made)) < case.tolerance


@pytest.mark.parametrize("config", [Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 5)])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_long_prompts(gpu: Gpu, config: Config, page_tokens: int) -> None:
    case = Case(Problem(8, 1, 128, 128, page_tokens), ((3001, 4097), (1025, 1025), (17, 2048)))
    made = big(case)
    assert error(run(extend, case, gpu, made, config), attention(case.problem, made)) < case.tolerance


@pytest.mark.parametrize("kernel", [decode, extend])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_offsets_beyond_two_to_the_31(gpu: Gpu, kernel: ModuleType, page_tokens: int) -> None:
    """A pool of 2^31 + 2^29 elements, of which the last pages are used; the others are never written."""
    queries = 1 if kernel is decode else 20
    case = Case(Problem(8, 8, 128, 128, page_tokens, BF16, FP8), ((queries, 300),), splits=2)
    made = make(case, 0, "cuda")
    page = page_tokens * 8 * 128
    pages = (2**31 + 2**29) // page
    for name in ("k_cache", "v_cache"):
        small = made[name]
        made[name] = small.new_empty((pages, *small.shape[1:]))
        made[name][-len(small) :] = small
    made["page_table"] += pages - len(small)
    made["paged"] = replace(made["paged"], page_table=made["page_table"])
    assert (pages - 1) * page > 2**31
    assert error(run(kernel, case, gpu, made), attention(case.problem, made)) < case.tolerance


LAYERS = {
    "gqa": Problem(8, 2, 128, 128, 64),
    "fp8": Problem(8, 2, 128, 128, 16, kv_dtype=FP8),
    "window and sinks": Problem(8, 2, 64, 64, 16, window=True, sinks=BF16),
    "latent": Problem(16, 1, 576, 512, 64),
    "tree": Problem(8, 2, 128, 128, 64, tree=True),
}
STEPS = {
    "decode": ((1, 700), (1, 1), (3, 40)),
    "prefill": ((400, 400), (17, 900)),
    "both": ((1, 3000), (33, 100), (0, 4), (16, 16), (2, 9)),
}


def planned(made: dict[str, Any], case: Case, **options: Any) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The backend's plan of what `make` made, and its run."""
    plan = triton_paged.plan(
        made["query_start"], made["context_tokens"], made["page_table"].long(), tree=made["tree"], **options
    )
    window = case.window_tokens or None

    def launch() -> torch.Tensor:
        return triton_paged.run(
            made["q"], cache_of(made), plan, made["scale"], window_tokens=window, sinks=made["sinks"]
        )

    return plan, launch


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_the_backend_divides_a_step_between_the_kernels(layer: str, step: str) -> None:
    problem = LAYERS[layer]
    case = Case(problem, STEPS[step], window_tokens=100 if problem.window else 0)
    made = make(case, 0, "cuda")
    _, launch = planned(made, case)
    assert error(launch(), attention(problem, made)) < case.tolerance


def test_a_captured_step_is_replayed_with_another_ones_integers() -> None:
    """Capture with one context, refill with others of up to the bound, replay: equal to a fresh run, to the
    bit where both divide a context alike."""
    problem = LAYERS["gqa"]
    short = make(Case(problem, ((1, 5), (1, 5), (1, 5))), 0, "cuda")
    plan = triton_paged.plan(
        short["query_start"], short["context_tokens"],
        torch.zeros(3, 100, dtype=torch.int64, device="cuda"), context_bound=6400,
    )  # fmt: skip
    case = Case(problem, ((1, 6001), (1, 64), (1, 1)))
    made = make(case, 1, "cuda")
    q = made["q"].clone()

    def launch() -> torch.Tensor:
        return triton_paged.run(q, cache_of(made), plan, made["scale"])

    for _ in range(2):
        launch()  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    out.fill_(torch.nan)
    triton_paged.refill(plan, made["context_tokens"], made["page_table"].long())
    graph.replay()
    assert error(out, attention(problem, made)) < case.tolerance
    assert torch.equal(out, launch())


def big(case: Case) -> dict[str, Any]:
    """As `make`, for contexts that would take it long: keys and values are drawn on the GPU, pages are in
    random order, and what no request owns is NaN still."""
    problem, generator = case.problem, torch.Generator("cuda").manual_seed(0)
    small = make(replace(case, requests=tuple((queries, queries) for queries, _ in case.requests)), 0, "cuda")
    owned = [-(-context // problem.page_tokens) for _, context in case.requests]
    order = torch.randperm(sum(owned), generator=generator, device="cuda") + 1
    shape = (sum(owned) + 1, problem.page_tokens, problem.kv_heads, problem.head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator, device="cuda") for _ in range(2))
    page_table = torch.zeros(len(owned), max(owned), dtype=torch.int32, device="cuda")
    for request, (pages, (_, context)) in enumerate(zip(order.split(owned), case.requests, strict=True)):
        page_table[request, : len(pages)] = pages
        used = (context - 1) % problem.page_tokens + 1
        k_cache[pages[-1], used:] = v_cache[pages[-1], used:] = torch.nan
    k_cache[0] = v_cache[0] = torch.nan
    k_cache, v_cache = k_cache.to(problem.kv_dtype), v_cache.to(problem.kv_dtype)
    contexts = np.array([context for _, context in case.requests])
    paged = replace(
        small["paged"],
        page_table=page_table,
        context_tokens=torch.from_numpy(contexts).cuda().to(torch.int32),
    )
    return small | {
        "requests": case.requests, "k_cache": k_cache, "page_table": page_table, "paged": paged,
        "v_cache": k_cache[..., : problem.value_dim] if problem.latent else v_cache,
        "context_tokens": contexts,
    }  # fmt: skip
