"""The small kernels of a decoder layer on one NVIDIA GPU, as a share of what a device-to-device copy moves.

    PYTHONPATH=src:. python benchmarks/small.py [--only rms_norm,embed] [--tokens 1,16] [--sweep] [--json]

First each is compared with its reference; one that differs by more than rounding has no time. One call is
timed as it runs in the engine: in a CUDA graph with others like it, each with inputs and outputs of its own,
together four times the L2, but 16 to 256 of them; median of seven. Bytes are what must be read and written
once; embed's table has 300 rows and may stay in the L2. The copy, 1 GiB read and written outside a graph, is
measured in the same run. `--sweep` times every tile of the search spaces and names the fastest beside the
default's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from benchmarks.experts import graph_us
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _kv_write, latent_write, rms_norm, rope_write, sigmoid_mul, silu_mul
from firebox.kernels._rows import Outputs
from firebox.kernels.embed import Problem as Embed
from firebox.kernels.launch import Launcher
from tests.support.experts import DTYPES
from tests.support.small import KERNELS, faults, run_case

CODES, GROUPS = Outputs(plain=False, fp8=True), Outputs(plain=False, fp8=True, group=128)
SHAPES: dict[str, tuple[str, Any]] = {
    "embed GLM-4.7": ("embed", Embed(5120)),
    "norm GLM-4.7": ("rms_norm", rms_norm.Problem(5120, 1e-5, delta=True)),
    "norm GLM-4.7, FP8 a token": ("rms_norm", rms_norm.Problem(5120, 1e-5, delta=True, outputs=CODES)),
    "norm Qwen3.5, FP8 a group": ("rms_norm", rms_norm.Problem(4096, 1e-6, delta=True, outputs=GROUPS)),
    "norm gpt-oss": ("rms_norm", rms_norm.Problem(2880, 1e-5, delta=True)),
    "norm Kimi-K2": ("rms_norm", rms_norm.Problem(7168, 1e-5, delta=True)),
    "norm Kimi-K2 q latent": ("rms_norm", rms_norm.Problem(1536, 1e-6)),
    "rope GLM-4.7 TP4": ("rope_write", rope_write.Problem(24, 2, 128, 64, "head", 1e-5)),
    "rope GLM-4.7 TP4, FP8": ("rope_write", rope_write.Problem(24, 2, 128, 64, "head", 1e-5, kv_dtype="fp8")),
    "rope Qwen3-30B": ("rope_write", rope_write.Problem(32, 4, 128, 128, "head")),
    "rope Qwen3.5": ("rope_write", rope_write.Problem(32, 2, 256, 64, "head", gated=True)),
    "rope gpt-oss": ("rope_write", rope_write.Problem(64, 8, 64, 64)),
    "rope MiniMax-M2": ("rope_write", rope_write.Problem(48, 8, 128, 64, "row")),
    "latent Kimi-K2 TP8": ("latent_write", latent_write.Problem(8, 512, 64, 128, True)),
    "latent Kimi-K2, FP8": ("latent_write", latent_write.Problem(64, 512, 64, 128, True, kv_dtype="fp8")),
    "silu GLM-4.7 TP4 shared": ("silu_mul", silu_mul.Problem(384)),
    "silu GLM-4.7 TP4 dense": ("silu_mul", silu_mul.Problem(3072)),
    "silu GLM-4.7 dense, FP8 a token": ("silu_mul", silu_mul.Problem(12_288, outputs=CODES)),
    "silu Qwen3.5, FP8 a group": ("silu_mul", silu_mul.Problem(1024, outputs=GROUPS)),
    "swiglu gpt-oss": ("silu_mul", silu_mul.Problem(2880, "clamped_swiglu")),
    "gate Qwen3.5": ("sigmoid_mul", sigmoid_mul.Problem(32, 256)),
}
TOKENS = (1, 16, 256, 4096)
CHECKED_TOKENS = 300
PAGE_TOKENS = 64
LEAST_CALLS, MOST_CALLS = 16, 256
Call = Callable[[Launcher], None]


def made(op: str, problem: Any, tokens: int, generator: torch.Generator) -> Call:
    """A launch with tensors of its own."""
    kernel, kind = KERNELS[op], {"device": "cuda", "dtype": DTYPES[problem.dtype]}
    inputs = kernel.inputs(problem, tokens, generator, **kind)
    outputs = _written(op, problem, tokens, inputs)
    return lambda launcher: kernel.run(launcher, **inputs, **outputs)


def moved_bytes(op: str, p: Any, tokens: int) -> int:
    """What must be read and written once; bf16 has 2 bytes, cos and sin are float32, ids and slots int64."""
    if op == "embed":
        return tokens * (8 + 4 * p.hidden)
    if op == "rms_norm":
        return 2 * p.width + tokens * (2 * p.width * (3 if p.delta else 1) + _row_bytes(p.width, p.outputs))
    if op == "silu_mul":
        return tokens * (4 * p.inter + _row_bytes(p.inter, p.outputs))
    if op == "sigmoid_mul":
        return tokens * (4 * p.width + _row_bytes(p.width, p.outputs))
    stored = 1 if p.kv_dtype == _kv_write.FP8 else 2
    if op == "latent_write":
        row = p.latent_dim + p.rope_dim
        return tokens * (16 + 4 * p.rope_dim + (2 + stored) * row + 4 * p.heads * p.rope_dim)
    q, kv = p.heads * p.head_dim, 2 * p.kv_heads * p.head_dim
    return tokens * (16 + 4 * p.rotary_dim + 4 * q + (2 + stored) * kv)


def _row_bytes(width: int, outputs: Outputs) -> int:
    scales = (width // outputs.group if outputs.group else 1) * 4
    return outputs.plain * 2 * width + outputs.fp8 * (width + scales)


def _written(op: str, problem: Any, tokens: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs; caches with a page more than the tokens need, and their scales and slots."""
    if op not in ("rope_write", "latent_write"):
        found = KERNELS[op].reference(problem, **inputs)
        return {name: torch.empty_like(rows) for name, rows in found.items() if name != "x"}
    latent, coded = op == "latent_write", problem.kv_dtype == _kv_write.FP8
    pages = 2 + tokens // PAGE_TOKENS
    width = problem.latent_dim + problem.rope_dim if latent else problem.head_dim
    dtype = torch.float8_e4m3fn if coded else DTYPES[problem.dtype]
    shape = (pages, PAGE_TOKENS, 1 if latent else problem.kv_heads, width)
    names = ("cache",) if latent else ("k_cache", "v_cache")
    found = {name: torch.zeros(shape, device="cuda").to(dtype) for name in names}
    found["q"] = torch.zeros(tokens, problem.heads, width, dtype=DTYPES[problem.dtype], device="cuda")
    found["token_slots"] = torch.randperm(pages * PAGE_TOKENS, device="cuda")[:tokens]
    return found | ({"scales": torch.tensor([0.3, 0.6], device="cuda")} if coded else {})


def copy_gb_s() -> float:
    """Of 1 GiB, read plus written, the median of nine."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(11):
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 2**30 / statistics.median(times[2:]) / 1e6


def row_of(name: str, tokens: int, gpu: Gpu, copy: float, *, sweep: bool) -> dict[str, Any]:
    """The line of one shape and number of tokens."""
    op, problem = SHAPES[name]
    kernel, row = KERNELS[op], {"shape": name, "tokens": tokens, "us": None}
    wrong = faults(run_case(op, problem, min(tokens, CHECKED_TOKENS), "cuda", gpu))
    if wrong:
        return row | {"wrong": {output: list(off) for output, off in wrong.items()}}
    generator = torch.Generator("cuda").manual_seed(0)
    moved = moved_bytes(op, problem, tokens)
    count = min(MOST_CALLS, max(LEAST_CALLS, 4 * gpu.l2_bytes // moved))
    calls = [made(op, problem, tokens, generator) for _ in range(count)]

    def us(*config: Any) -> float:
        launcher = Launcher(kernel.request(problem, gpu, *config))
        return graph_us([lambda c=c: c(launcher) for c in calls], 7)

    default = us()
    row |= {
        "us": round(default, 2),
        "kib": round(moved / 1024, 1),
        "of_copy": round(moved / default / 1e3 / copy, 3),
    }
    if sweep and hasattr(kernel, "search_space"):
        timed = {config: us(config) for config in kernel.search_space(problem, gpu)}
        best = min(timed, key=timed.__getitem__)
        chosen = kernel.default(problem, gpu)
        row |= {
            "default": dataclasses.astuple(chosen),
            "best": dataclasses.astuple(best),
            "best_us": round(timed[best], 2),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(KERNELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    gpu = probe_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    copy, rows = copy_gb_s(), []
    print(
        f"{gpu.name}, torch {torch.__version__}, Triton {triton.__version__}, copy {copy:.0f} GB/s",
        flush=True,
    )
    for name, (op, _) in SHAPES.items():
        for tokens in map(int, arguments.tokens.split(",")) if op in arguments.only.split(",") else ():
            rows.append(row_of(name, tokens, gpu, copy, sweep=arguments.sweep))
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return 0 if all(row["us"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
