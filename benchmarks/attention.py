"""The attention kernels against what the GPU can do: decode as a share of a measured device-to-device copy,
prefill as a share of a measured bf16 matrix product.

    PYTHONPATH=src python benchmarks/attention.py [--only glm] [--page-tokens 16] [--quick] [--json]
        [--decode 64x300,256x300]

Each row is checked against the reference first, on its first and last request. Keys come from several pools
in turn, which together are several times the L2 cache. Launches are captured in a CUDA graph; the time is the
median of nine replays, divided by the launches in one. Every configuration and number of splits of a small
set is measured; a row shows the best, and what the default gave. Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import triton

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _triton
from firebox.kernels import attention_decode as decode
from firebox.kernels import attention_extend as extend
from firebox.kernels._attention import FP8, Config, Paged, Problem
from firebox.kernels._attention_cases import Case, attention
from firebox.kernels.compile import PINNED_OPTIONS

BF16 = torch.bfloat16
LAYERS = {
    "gqa 64/8 x 128": Problem(64, 8, 128, 128, 64),
    "gqa 64/8 x 128, fp8": Problem(64, 8, 128, 128, 64, kv_dtype=FP8),
    "glm-4.7 tp4 24/2 x 128": Problem(24, 2, 128, 128, 64),
    "glm-4.5-air 96/8 x 128": Problem(96, 8, 128, 128, 64),
    "qwen3 32/4 x 128": Problem(32, 4, 128, 128, 64),
    "gpt-oss 64/8 x 64": Problem(64, 8, 64, 64, 64, sinks=BF16),
    "gpt-oss 64/8 x 64, window": Problem(64, 8, 64, 64, 64, sinks=BF16, window=True),
    "mla 128 x 576": Problem(128, 1, 576, 512, 64),
    "mla 16 x 576": Problem(16, 1, 576, 512, 64),
    "mla 16 x 576, fp8": Problem(16, 1, 576, 512, 64, kv_dtype=FP8),
}
WINDOW_TOKENS = 128
DECODE = ((1, 131_072), (8, 8192), (64, 1024), (64, 4096), (256, 2048))  # batch, context
PREFILL = ((1, 8192, 8192), (4, 2048, 2048), (1, 2048, 32_768))  # batch, queries, context
PREFILL_LAYERS = ("gqa 64/8 x 128", "gqa 64/8 x 128, fp8", "glm-4.7 tp4 24/2 x 128", "gpt-oss 64/8 x 64")
COLD_BYTES, REPLAYS = 600e6, 9
Row = dict[str, Any]


def timed(launches: list[Callable[[], Any]]) -> float:
    """Microseconds of one of these, in the median over the replays of a graph that makes each of them."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(2 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(launches))
    return statistics.median(times[2:])


def copy_gb_s() -> float:
    """Bytes read and written by a copy of 2 GiB, in a second: by the driver, outside a graph. In one it is a
    memcpy node, which was a third slower on an H200 (2,775 against 4,240 GB/s, 2026-11-21)."""
    source = torch.randint(256, (2 * 1024**3,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(2 + REPLAYS):
        begin.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 4)
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def bf16_tflop_s() -> float:
    """Of a product of 8192 × 8192 random matrices."""
    a, b = (torch.randn(8192, 8192, dtype=BF16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / timed([lambda: torch.mm(a, b, out=out)] * 4) / 1e6


def step(problem: Problem, batch: int, queries: int, context: int) -> dict[str, Any]:
    """A step of equal requests: as `_attention_cases.make` gives it, with `pools` of (k_cache, v_cache)."""
    pages = -(-context // problem.page_tokens)
    shape = (batch * pages + 1, problem.page_tokens, problem.kv_heads, problem.head_dim)
    size = int(np.prod(shape)) * problem.kv_dtype.itemsize * (1 if problem.latent else 2)
    pools = []
    for _ in range(max(2, int(-(-COLD_BYTES // size)))):
        k = torch.randn(shape, dtype=torch.float16, device="cuda").to(problem.kv_dtype)
        v = k[..., : problem.value_dim] if problem.latent else torch.randn_like(k.half()).to(problem.kv_dtype)
        pools.append((k, v))
    page_table = (torch.randperm(batch * pages, device="cuda") + 1).view(batch, pages).to(torch.int32)
    query_start, contexts = np.arange(batch + 1) * queries, np.full(batch, context)
    on_device, starts = (torch.from_numpy(a).cuda().to(torch.int32) for a in (contexts, query_start))
    shape = (batch * queries, problem.heads)
    q = torch.randn(*shape, problem.head_dim, dtype=problem.dtype, device="cuda")
    seen = min(context, WINDOW_TOKENS) if problem.window else context
    tokens_bytes = problem.kv_heads * problem.head_dim * problem.kv_dtype.itemsize
    return {
        "requests": ((queries, context),) * batch,
        "pools": pools,
        "page_table": page_table,
        "tree": None,
        "q": q,
        "query_start": query_start,
        "context_tokens": contexts,
        "paged": Paged(page_table, on_device, starts),
        "sinks": torch.randn(problem.heads, dtype=problem.sinks, device="cuda") if problem.sinks else None,
        "window_tokens": WINDOW_TOKENS if problem.window else 0,
        "scale": problem.head_dim**-0.5,
        "scales": (1.0, 1.0),
        "out": q.new_full((*shape, problem.value_dim), torch.nan),
        "bytes": batch * seen * tokens_bytes * (1 if problem.latent else 2),
    }


def wrong_by(problem: Problem, made: dict[str, Any], launch: Callable[..., Any]) -> float:
    """Error of the first and the last request's last 64 queries, over the tolerance."""
    k, v = made["pools"][0]
    launch(k, v)
    worst = 0.0
    for request in {0, len(made["requests"]) - 1}:
        queries, context = made["requests"][request]
        last = min(queries, 64)
        end = int(made["query_start"][request + 1])
        part = made | {
            "requests": ((last, context),), "q": made["q"][end - last : end], "query_start": [0, last],
            "page_table": made["page_table"][request : request + 1], "k_cache": k, "v_cache": v,
        }  # fmt: skip
        expected = attention(problem, part)
        difference = made["out"][end - last : end].float() - expected
        error = float(difference.pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
        worst = max(worst, error if error == error else float("inf"))
    return worst / Case(problem, ()).tolerance


def measured(problem: Problem, made: dict[str, Any], launch: Callable[..., Any]) -> float | None:
    """Microseconds; None where the tile does not fit. Stops the benchmark where the result is wrong."""
    try:
        wrong = wrong_by(problem, made, launch)
    except triton.runtime.errors.OutOfResources:
        return None
    if not wrong < 1:
        sys.exit(f"error: the result is wrong by {wrong:.2f} times the tolerance: {problem}")
    pools = made["pools"] * -(-4 // len(made["pools"]))
    return timed([lambda pool=pool: launch(*pool) for pool in pools])  # type: ignore[misc]


def arguments(made: dict[str, Any], problem: Problem, config: Config) -> dict[str, Any]:
    """What both launchers take by name."""
    shared = ("sinks", "scales", "window_tokens")
    return {"problem": problem, "config": config} | {name: made[name] for name in shared}


def compile_all(problems: Sequence[Problem], gpu: Gpu) -> None:
    """Decode's tiles, side by side in processes without a GPU, into Triton's cache on disk."""
    jobs = [
        (problem, config, gpu)
        for problem in problems
        for config in (decode.default(problem, gpu, 1), *decode.search_space(problem, gpu, 1))
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[Problem, Config, Gpu]) -> None:
    problem, config, gpu = job
    for split in (False, True):
        for request in decode.requests(problem, config, gpu, split=split):
            given = {**request.signature, **dict.fromkeys(request.constexprs, "constexpr")}
            types = {name: given[name] for name in request.kernel.arg_names}
            source = _triton.source(request.kernel, types, dict(request.constexprs), request.aligned)
            options = {"num_warps": request.num_warps, "num_stages": request.num_stages, **request.options}
            with contextlib.suppress(Exception):  # the launch that needs it says why
                _triton.compile_in_process(source, gpu.triton_target, {**PINNED_OPTIONS, **options})


def decode_row(name: str, problem: Problem, batch: int, context: int, gpu: Gpu, *, quick: bool) -> Row:
    """The best of the configurations and splits, and the default's time."""
    made, found = step(problem, batch, 1, context), []
    chosen = decode.default(problem, gpu, 1)
    row_blocks = -(-problem.group // chosen.block_m)
    programs = batch * problem.kv_heads * row_blocks
    places = decode.places(problem, chosen, gpu)
    whole, fewest = decode.whole_tiles(problem, chosen), decode.min_tiles(problem, chosen)
    seen = min(context, WINDOW_TOKENS + 1) if problem.window else context
    normal = decode.split_count(programs, (seen, seen), places, chosen.block_n, whole, fewest)
    tried = {normal} if quick else {normal, max(1, normal // 2), min(2 * normal, decode.MAX_SPLITS), 1}
    for config in dict.fromkeys([chosen] if quick else [chosen, *decode.search_space(problem, gpu, 1)]):
        for splits in sorted(tried) if config == chosen else (normal,):
            options = arguments(made, problem, config) | {"max_queries": 1, "splits": splits}
            options["pdl"] = decode.depends(gpu)

            def launch(k: torch.Tensor, v: torch.Tensor, options: dict[str, Any] = options) -> None:
                decode.attend(made["q"], k, v, made["paged"], made["scale"], made["out"], **options)

            if (us := measured(problem, made, launch)) is not None:
                found.append((us, config, splits))
    us, config, splits = min(found, key=lambda entry: entry[0])
    default_us = next(us for us, config, splits in found if (config, splits) == (chosen, normal))
    return {
        "kernel": "decode", "layer": name, "batch": batch, "queries": 1, "context": context, "us": us,
        "gb_s": made["bytes"] / us / 1e3, "default_us": default_us, "splits": splits,
        "default_splits": normal, "config": asdict(config),
        "tflop_s": 2 * batch * context * problem.heads * (problem.head_dim + problem.value_dim) / us / 1e6,
    }  # fmt: skip


def prefill_row(name: str, problem: Problem, shape: tuple[int, int, int], gpu: Gpu, *, quick: bool) -> Row:
    """The best of the configurations, and the default's time."""
    batch, queries, context = shape
    made, found = step(problem, batch, queries, context), []
    chosen = extend.default(problem, gpu)
    for config in dict.fromkeys([chosen] if quick else [chosen, *extend.search_space(problem, gpu)]):
        host = extend.list_tiles(made["query_start"], made["context_tokens"], problem.group, config.block_m)
        tiles, options = torch.from_numpy(host).cuda(), arguments(made, problem, config)

        def launch(
            k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor = tiles, options: dict[str, Any] = options
        ) -> None:
            extend.attend(made["q"], k, v, made["paged"], tiles, made["scale"], made["out"], **options)

        if (us := measured(problem, made, launch)) is not None:
            found.append((us, config))
    us, config = min(found, key=lambda entry: entry[0])
    pairs = batch * (
        queries * (context - queries) + queries * (queries + 1) / 2
    )  # of a query and a key it sees
    return {
        "kernel": "extend", "layer": name, "batch": batch, "queries": queries, "context": context, "us": us,
        "default_us": next(us for us, config in found if config == chosen), "config": asdict(config),
        "tflop_s": 2 * pairs * problem.heads * (problem.head_dim + problem.value_dim) / us / 1e6,
        "gb_s": made["bytes"] / us / 1e3,
    }  # fmt: skip


def rows(
    gpu: Gpu, only: str, page_tokens: int, steps: Sequence[tuple[int, int]], *, quick: bool
) -> Iterator[Row]:
    """All rows whose layer's name contains `only`, or, with `steps`, those of these alone."""
    layers = {name: replace(p, page_tokens=page_tokens) for name, p in LAYERS.items() if only in name}
    if not quick:
        compile_all(list(layers.values()), gpu)
    for name, problem in layers.items():
        for batch, context in steps or DECODE:
            yield decode_row(name, problem, batch, context, gpu, quick=quick)
        for shape in PREFILL if name in PREFILL_LAYERS and not steps else ():
            yield prefill_row(name, problem, shape, gpu, quick=quick)


def line(row: Row, copy: float, matrix: float) -> str:
    """A row of the table."""
    config = row["config"]
    tile = f"{config['block_m']}x{config['block_n']} w{config['num_warps']} s{config['num_stages']}"
    tile += f" r{config['max_registers']}" if config["max_registers"] else ""
    splits = f"{row['splits']} ({row['default_splits']})" if "splits" in row else "-"
    return (
        f"{row['kernel']:7} {row['layer']:24} {row['batch']:>4} x {row['queries']:>5} @ {row['context']:>6} "
        f"{row['us']:9.1f} us  {row['gb_s']:6.0f} GB/s {row['gb_s'] / copy:6.1%}  "
        f"{row['tflop_s']:6.1f} TFLOP/s {row['tflop_s'] / matrix:6.1%}  {tile:19} splits {splits:10} "
        f"default {row['default_us']:9.1f} us"
    )


def main() -> None:
    """Measures the two roofs, then the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose layer's name contains this")
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--decode", default="", metavar="BATCHxCONTEXT,…", help="these steps alone")
    parser.add_argument("--quick", action="store_true", help="the default configuration alone")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    options = parser.parse_args()
    gpu = probe_gpu()
    if gpu is None:
        sys.exit("error: this benchmark needs an NVIDIA GPU")
    copy, matrix = copy_gb_s(), bf16_tflop_s()
    head = {"gpu": gpu.name, "torch": torch.__version__, "triton": triton.__version__, "copy_gb_s": copy}
    head |= {"bf16_tflop_s": matrix, "page_tokens": options.page_tokens}
    print(" ".join(f"{name}={value}" for name, value in head.items()))
    done = []
    steps = [
        (int(a), int(b)) for a, _, b in (each.partition("x") for each in options.decode.split(",") if each)
    ]
    for row in rows(gpu, options.only, options.page_tokens, steps, quick=options.quick):
        done.append(row)
        print(line(row, copy, matrix), flush=True)
    if options.json:
        print(json.dumps(head | {"rows": done}))


if __name__ == "__main__":
    main()
