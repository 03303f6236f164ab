"""Dense linear layers on one NVIDIA GPU, as shares of the copy rate.

    PYTHONPATH=src:. python benchmarks/linear.py [--shapes glm_o_tp4,…] [--tokens 1,16] [--path cublas]
                                                 [--sweep DIR] [--json]

First the output is compared with float32 on dequantised weights; a configuration that fails has no time. One
call is timed as it runs in the engine: in a CUDA graph with others like it, each with its own copy of the
weights, together several times the L2; median of seven. of_copy = (weights with their scales, x and y once) /
time / copy rate of the GPU's file; tflop_s = 2 · tokens · rows · columns / time. `--sweep` compiles and times
every tile of the search spaces and the library, and writes the fastest to DIR/linear.json; the file of this
GPU in tuned/ is used otherwise, or with `--path` the default tile of that path.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path as FilePath
from typing import Any

import torch
import triton

from benchmarks.experts import graph_us
from firebox.errors import FireboxError
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _linear, _triton, linear, linear_few
from firebox.kernels._experts import INT4_ZERO
from firebox.kernels._linear import Problem, Weights
from firebox.kernels.compile import PINNED_OPTIONS, limit_bytes
from firebox.layers import _dense_library
from firebox.layers.dense_gpu import (
    CUBLAS,
    FEW,
    MANY,
    LinearKernels,
    Path,
    Workspace,
    key,
    like,
    path_of,
    requests,
    rounds,
    scratch,
)
from tests.support.experts import relative_error
from tests.support.linear import DTYPES, random_weights

SHAPES = {
    "glm_qkv": Problem(14_336, 5120, "fp8_channel"),
    "glm_qkv_tp4": Problem(3584, 5120, "fp8_channel"),
    "glm_o": Problem(5120, 12_288, "fp8_channel", residual=True),
    "glm_o_tp4": Problem(5120, 3072, "fp8_channel", residual=True),
    "glm_shared_up": Problem(3072, 5120, "fp8_channel"),
    "glm_shared_down": Problem(5120, 1536, "fp8_channel", residual=True),
    "glm_head_tp4": Problem(37_888, 5120, "bf16", out_dtype="f32"),
    "glm_router": Problem(160, 5120, "bf16", out_dtype="f32"),
    "glm_qkv_bf16": Problem(14_336, 5120, "bf16"),
    "gpt_oss_qkv": Problem(5120, 2880, "bf16", bias=True),
    "gpt_oss_o": Problem(2880, 4096, "bf16", bias=True, residual=True),
    "gpt_oss_head": Problem(201_088, 2880, "bf16", out_dtype="f32"),
    "qwen_qkv_block": Problem(9216, 4096, "fp8_block"),
    "qwen_o_block": Problem(4096, 8192, "fp8_block", residual=True),
    "awq_qkv": Problem(10_240, 5120, INT4_ZERO, 128),
    "int4_up": Problem(18_432, 7168, "int4_group", 32),
    "mxfp4_up": Problem(11_520, 2880, "mxfp4", 32),
    "nvfp4_qkv": Problem(14_336, 5120, "nvfp4", 16),
    "qwen3_qkv": Problem(5120, 2048, "bf16"),
    "qwen3_o": Problem(2048, 4096, "bf16", residual=True),
    "qwen3_router": Problem(128, 2048, "bf16", out_dtype="f32"),
    "qwen3_head": Problem(151_936, 2048, "bf16", out_dtype="f32"),
    "gpt_oss_router": Problem(128, 2880, "bf16", bias=True, out_dtype="f32"),
    "air_qkv": Problem(14_336, 4096, "fp8_channel", bias=True),
    "air_o": Problem(4096, 12_288, "fp8_channel", residual=True),
    "air_router": Problem(128, 4096, "bf16", out_dtype="f32"),
    "air_head": Problem(151_552, 4096, "bf16", out_dtype="f32"),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 4096)
COLD_BYTES = 300e6  # of weights that a graph goes through
# relative error; the reasons stand in tests/gpu/test_linear.py
LIMIT, FP8_LIMIT = 4e-3, 4e-2
CHECKED_TOKENS = 48
MANY_FROM = 32  # tokens from which the sweep tries kernels/linear.py too


class Bench:
    """One shape with copies of its weights, and a workspace that grows to what a tile needs."""

    def __init__(self, name: str, gpu: Gpu, max_tokens: int) -> None:
        self.name, self.problem, self.gpu = name, SHAPES[name], gpu
        p, self.generator = self.problem, torch.Generator("cuda").manual_seed(1)
        copies = max(2, min(24, int(COLD_BYTES / _linear.total_bytes(p))))
        first = random_weights(p, self.generator, "cuda")
        self.copies = [first] + [_copy(first) for _ in range(copies - 1)]
        self.workspace = Workspace([p], max_tokens, gpu, "cuda")

    def layer(self, weights: Weights, tokens: int, path: Path) -> LinearKernels:
        self.workspace.hold(*scratch(self.problem, tokens, path))
        return LinearKernels(self.problem, weights, self.gpu, self.workspace, {tokens: path})

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        p = self.problem
        x = torch.randn(tokens, p.columns, generator=self.generator, device="cuda").bfloat16()
        out = torch.full((tokens, p.rows), float("nan"), dtype=DTYPES[p.out_dtype], device="cuda")
        residual = None
        if p.residual:
            residual = torch.randn(tokens, p.rows, generator=self.generator, device="cuda").bfloat16()
        return x, out, residual

    def error(self, tokens: int, path: Path) -> float:
        """Relative, of the first tokens of one run."""
        x, out, residual = self.inputs(tokens)
        self.layer(self.copies[0], tokens, path)(x, out, residual)
        few = slice(0, CHECKED_TOKENS)
        wanted = _linear.reference(
            self.problem, x[few], self.copies[0], None if residual is None else residual[few]
        )
        return relative_error(out[few], wanted) if torch.isfinite(out).all() else float("inf")

    def limit(self, path: Path) -> float:
        return FP8_LIMIT if rounds(self.problem, path.name) else LIMIT

    def time_us(self, tokens: int, path: Path, samples: int = 7) -> float:
        """The median time of one call in a graph with one call for each copy of the weights."""
        x, out, residual = self.inputs(tokens)
        layers = [self.layer(weights, tokens, path) for weights in self.copies]
        return graph_us([lambda layer=layer: layer(x, out, residual) for layer in layers], samples)

    def moved_bytes(self, tokens: int) -> float:
        p = self.problem
        per_row = 2 * p.columns + p.rows * ((4 if p.out_dtype == "f32" else 2) + 2 * p.residual)
        return _linear.total_bytes(p) + tokens * per_row


def _copy(weights: Weights) -> Weights:
    fields = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return Weights(**{name: None if t is None else t.clone() for name, t in fields.items()})


# ---- the sweep


def candidates(problem: Problem, tokens: int, gpu: Gpu) -> list[Path]:
    found = []
    if tokens <= linear_few.MAX_TOKENS:
        few = (linear_few.default(problem, tokens, gpu), *linear_few.search_space(problem, tokens, gpu))
        found += [Path(FEW, config, "sweep") for config in dict.fromkeys(few)]
    if linear.accepts(problem, gpu) is None and tokens >= MANY_FROM:
        many = (linear.default(problem, tokens, gpu), *linear.search_space(problem, tokens, gpu))
        found += [Path(MANY, config, "sweep") for config in dict.fromkeys(many)]
    unquantised = linear.unquantised(problem)
    if unquantised or (tokens >= MANY_FROM and _dense_library.accepts(problem, gpu) is None):
        found.append(Path(CUBLAS, None, "sweep"))
    return found


def warm(job: tuple[Problem, int, Path, Gpu]) -> int:
    """Compiles into Triton's cache on disk, in a process without a GPU context → shared bytes at most; −1: it
    did not compile."""
    problem, tokens, path, gpu = job
    most = 0
    for request in requests(problem, tokens, gpu, path).values():
        given = {**request.signature, **dict.fromkeys(request.constexprs, "constexpr")}
        types = {name: given[name] for name in request.kernel.arg_names}
        source = _triton.source(request.kernel, types, dict(request.constexprs), request.aligned)
        chosen = {"num_warps": request.num_warps, "num_stages": request.num_stages}
        options = {**PINNED_OPTIONS, **request.options, **chosen}
        try:
            made = _triton.compile_in_process(source, gpu.triton_target, options)
        except Exception:  # noqa: BLE001 (a tile that does not compile is a result)
            return -1
        most = max(most, made.metadata.shared)
    return most


def sweep(names: list[str], all_tokens: list[int], gpu: Gpu, folder: FilePath) -> None:
    """Times every tile that compiles and fits, the best three again."""
    jobs: dict[tuple[Problem, int, Path, Gpu], None] = {}
    for name in names:
        for tokens in all_tokens:
            for path in candidates(SHAPES[name], tokens, gpu):
                jobs[SHAPES[name], like(tokens, path), path, gpu] = None
    began, most = time.monotonic(), limit_bytes(gpu)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shared = dict(zip(jobs, pool.map(warm, jobs, chunksize=4), strict=True))
    fits = {job for job, size in shared.items() if 0 <= size <= most}
    seconds = time.monotonic() - began
    print(f"{len(jobs)} tiles compiled in {seconds:.0f} s, {len(fits)} fit in {most} bytes", flush=True)
    tuned: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        bench = Bench(name, gpu, max(all_tokens))
        for tokens in all_tokens:
            paths = [
                path
                for path in candidates(bench.problem, tokens, gpu)
                if (bench.problem, like(tokens, path), path, gpu) in fits
            ]
            best = _best(bench, tokens, paths)
            if best is None:
                print(f"{name} {tokens}: nothing right among {len(paths)}", flush=True)
                continue
            us, path = best
            share = bench.moved_bytes(tokens) / us / 1e3 / (gpu.copy_gb_s or 1)
            print(f"{name} {tokens} {us:.1f} us, {share:.0%} of copy, {path.name} {path.config}", flush=True)
            config = None if path.config is None else dataclasses.asdict(path.config)
            entry = {"path": path.name, "config": config, "us": round(us, 1)}
            tuned.setdefault(key(bench.problem), {})[str(tokens)] = entry
            (folder / "linear.json").write_text(json.dumps(tuned, indent=1))
        del bench
        torch.cuda.empty_cache()


def _best(bench: Bench, tokens: int, paths: list[Path]) -> tuple[float, Path] | None:
    """The fastest of those that are right."""

    def us(path: Path, samples: int) -> float:
        try:
            return bench.time_us(tokens, path, samples)
        except (RuntimeError, triton.runtime.errors.OutOfResources, FireboxError) as error:
            print(f"{path}: {type(error).__name__}", flush=True)
            return float("inf")

    ranked = sorted(((us(path, 3), n, path) for n, path in enumerate(paths)), key=lambda found: found[:2])
    right = (path for _, _, path in ranked if bench.error(tokens, path) < bench.limit(path))
    again = [path for _, path in zip(range(3), right, strict=False)]
    return min(((us(path, 7), path) for path in again), key=lambda found: found[0], default=None)


# ---- the table


def asked_for(name: str, problem: Problem, tokens: int, gpu: Gpu) -> Path:
    """The path called `name`, with its default tile."""
    if name == CUBLAS:
        return Path(CUBLAS, None, "--path")
    kernel = linear_few if name == FEW else linear
    return Path(name, kernel.default(problem, tokens, gpu), "--path")


def table(names: list[str], all_tokens: list[int], gpu: Gpu, name_of_path: str = "") -> list[dict[str, Any]]:
    """One row per shape and number of tokens, printed as it is found."""
    rows = []
    for name in names:
        bench = Bench(name, gpu, max(all_tokens))
        p = bench.problem
        for tokens in all_tokens:
            path = asked_for(name_of_path, p, tokens, gpu) if name_of_path else path_of(p, tokens, gpu)
            error = bench.error(tokens, path)
            row: dict[str, Any] = {"shape": name, "format": p.format, "rows": p.rows, "columns": p.columns}
            row |= {"tokens": tokens, "path": path.name, "tiles": path.why, "error": error, "us": None}
            if error < bench.limit(path):
                us = bench.time_us(tokens, path)
                of_copy = bench.moved_bytes(tokens) / us / 1e3 / (gpu.copy_gb_s or 1)
                tflop_s = 2 * tokens * p.rows * p.columns / us / 1e6
                row |= {"us": round(us, 1), "of_copy": round(of_copy, 3), "tflop_s": round(tflop_s, 1)}
            rows.append(row)
            print(
                " ".join(f"{k} {v:.2g}" if k == "error" else f"{k} {v}" for k, v in row.items()), flush=True
            )
        del bench
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--path", choices=(FEW, MANY, CUBLAS), default="")
    parser.add_argument("--sweep", type=FilePath)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    gpu = probe_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    names, all_tokens = arguments.shapes.split(","), [int(n) for n in arguments.tokens.split(",")]
    print(
        f"{gpu.name}, torch {torch.__version__}, Triton {triton.__version__}, {limit_bytes(gpu)} bytes a "
        f"block, copy {gpu.copy_gb_s} GB/s",
        flush=True,
    )
    if arguments.sweep:
        sweep(names, all_tokens, gpu, arguments.sweep)
        return 0
    rows = table(names, all_tokens, gpu, arguments.path)
    if arguments.json:
        print(json.dumps(rows))
    return 0 if all(row["us"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
