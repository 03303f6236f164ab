"""Whole expert layers on one NVIDIA GPU against their floor and the best peer we know: from hidden states and
the router's choices to the summed output.

    PYTHONPATH=src:. python benchmarks/experts.py [--shapes A,E] [--tokens 1,16] [--hot SECONDS] [--json]
        [--sweep DIR | --grid | --smem-limit 101376]

First the output is compared with float32 on dequantised weights; a configuration that fails has no time. One
call is timed as it runs in the engine: in a CUDA graph with others like it, each with its own routing,
weights far larger than the L2; median of seven. floor = max(bytes / 4.60 TB/s, operations / rate), the
definition and the peers of docs/log/2026-11-21-gpu-kernels.md. `--sweep` compiles and times every tile of
the search spaces and writes the fastest to DIR/experts.json; the file of this GPU in tuned/ is used
otherwise. `--hot`: the GPU is kept busy for so long before each figure of the table, as a server keeps it;
benchmarks/expert_tiles.py compares tiles so. `--grid`: 40 numbers of tokens from 1 to 4096, and which are
slower than the next larger one. `--smem-limit`: the paths chosen under that many bytes a block against those
without it. Both, with exit status 1 where there is a dip or a shape loses more than 8 %, are
benchmarks/_expert_tables.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import _expert_tables
import torch
import triton

from firebox.errors import FireboxError
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import (
    _experts,
    _triton,
    _tuned,
    moe_down_few,
    moe_gate_up_few,
    moe_gate_up_one,
    moe_gate_up_scaled,
)
from firebox.kernels._experts import FP8, Problem
from firebox.kernels.compile import PINNED_OPTIONS, CompileRequest, limit_bytes
from firebox.layers.expert_paths import FEW, MODULES, ONE, SCALED, SORTED, Path, path_of, requests, stored_as
from firebox.layers.experts import Experts, Workspace
from tests.support.experts import random_routing, random_weights, relative_error

SHAPES = {
    "A": ("GLM-4.7 TP4", Problem(5120, 384, 160, 8, "fp8_channel")),
    "B": ("GLM-4.7 TP8 + shared", Problem(5120, 192, 161, 9, "fp8_channel")),
    "C8": ("Qwen3.5-397B TP4", Problem(4096, 256, 512, 10, "fp8_block")),
    "C16": ("Qwen3.5-397B TP4", Problem(4096, 256, 512, 10, "bf16")),
    "F8": ("Qwen3-30B-A3B", Problem(2048, 768, 128, 8, "fp8_block")),
    "F16": ("Qwen3-30B-A3B", Problem(2048, 768, 128, 8, "bf16")),
    "E": ("gpt-oss-120b", Problem(2880, 2880, 128, 4, "mxfp4", "clamped_swiglu", biases=True)),
    "D": ("Kimi-K2.5 TP8", Problem(7168, 256, 384, 8, "int4_group")),
    "A4": ("GLM-4.7 TP4", Problem(5120, 384, 160, 8, "nvfp4")),
    "C4": ("Qwen3.5-397B TP4", Problem(4096, 256, 512, 10, "nvfp4")),
    "F4": ("Qwen3-30B-A3B AWQ", Problem(2048, 768, 128, 8, "int4_zero", int4_columns=128)),
    "G": ("GLM-4.7 TP4 + shared", Problem(5120, 384, 161, 9, "fp8_channel")),
    "H": ("GLM-4.5-Air + shared", Problem(4096, 1408, 129, 9, "fp8_channel")),
}
SHARED_EXPERT = ("B", "G", "H")  # the last expert is every token's
OF_ENGINE = ("G", "H")  # only where they are named: they have neither goal nor peer
TOKENS = (1, 16, 64, 4096)
# SGLang's kernel tuned by us, triton_kernels tuned (E), Marlin (D); same kind of machine, 2026-11-20
PEERS_US = {
    "A": {1: 26, 2: 37, 4: 58, 8: 95, 16: 144, 32: 197, 64: 234, 128: 247, 256: 266, 1024: 334, 4096: 794},
    "B": {1: 22, 2: 28, 4: 42, 8: 60, 16: 86, 32: 116, 64: 137, 128: 147, 256: 162, 1024: 234, 4096: 636},
    "C8": {1: 23, 2: 30, 4: 47, 8: 76, 16: 126, 32: 195, 64: 288, 128: 371, 256: 402, 1024: 487, 4096: 888},
    "C16": {
        1: 27,
        2: 42,
        4: 71,
        8: 126,
        16: 214,
        32: 358,
        64: 534,
        128: 697,
        256: 757,
        1024: 826,
        4096: 1188,
    },
    "F8": {1: 22, 2: 31, 4: 47, 8: 74, 16: 108, 32: 142, 64: 160, 128: 167, 256: 182, 1024: 234, 4096: 601},
    "F16": {1: 27, 2: 44, 4: 75, 8: 125, 16: 191, 32: 257, 64: 287, 128: 298, 256: 313, 1024: 363, 4096: 721},
    "E": {1: 42, 2: 59, 4: 88, 8: 150, 16: 251, 32: 371, 64: 505, 128: 565, 256: 574, 1024: 933, 4096: 2201},
    "D": {1: 26, 2: 40, 4: 54, 8: 81, 16: 132, 32: 206, 64: 299, 128: 378, 256: 447, 1024: 808, 4096: 2406},
}
GOALS_US = {
    "A": (18, 132, 220, 560),
    "B": (13, 74, 118, 440),
    "C8": (15, 115, 274, 740),
    "C16": (21, 205, 520, 1080),
    "F8": (15, 98, 145, 470),
    "F16": (22, 184, 280, 600),
    "E": (22, 190, 390, 1500),
    "D": (13, 98, 235, 1500),
}
READ_TB_S, BF16_TFLOP_S, FP8_TFLOP_S = 4.60, 793.0, 1520.0
FEW_LIMIT, FP8_LIMIT = 6e-3, 6e-2  # relative error; the reasons stand in tests/gpu/test_experts.py
SCALED_LIMIT = {"nvfp4_nibbles": 0.2, "mxfp4_nibbles": 0.06}
CHECKED_TOKENS = 48
BLOCKS = (16, 32, 64, 128)


class Bench:
    """One shape with its weights, workspace and routings."""

    def __init__(self, name: str, gpu: Gpu, max_tokens: int) -> None:
        self.name, (self.model, problem), self.gpu = name, SHAPES[name], gpu
        self.problem = stored_as(problem, gpu)
        p, self.generator = self.problem, torch.Generator("cuda").manual_seed(1)
        self.gate_up = random_weights(p, 2 * p.inter, p.hidden, self.generator, "cuda")
        self.down = random_weights(p, p.hidden, p.inter, self.generator, "cuda")
        self.workspace = Workspace(p, max_tokens, "cuda")

    def inputs(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Hidden states with so many routings that the L2 holds no weights of an earlier call."""
        calls = 16 if tokens <= 8 else 8 if tokens <= 64 else 4 if tokens <= 1024 else 2
        return [(self._hidden(tokens), *self._routing(tokens)) for _ in range(calls)]

    def _hidden(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.problem.hidden, generator=self.generator, device="cuda").bfloat16()

    def _routing(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.problem
        if self.name not in SHARED_EXPERT:
            return random_routing(p, tokens, self.generator, "cuda")
        others = dataclasses.replace(p, experts=p.experts - 1, top_k=p.top_k - 1)
        ids, _ = random_routing(others, tokens, self.generator, "cuda")
        weights = torch.rand(tokens, p.top_k, generator=self.generator, device="cuda")
        shared = torch.full((tokens, 1), p.experts - 1, dtype=torch.int32, device="cuda")
        return torch.cat((ids, shared), 1).contiguous(), weights / weights.sum(1, keepdim=True)

    def floor_us(self, calls: list[tuple[torch.Tensor, ...]]) -> float:
        """The least time: weights of the experts these routings touch, input, output and h once; or the
        arithmetic."""
        p, tokens = self.problem, calls[0][0].shape[0]
        touched = statistics.mean(ids.unique().numel() for _, ids, _ in calls)
        scale_bytes = {"int4_group": 2, "int4_zero": 4}.get(p.format, 1)
        per_weight = _experts.weight_bytes(p) + (scale_bytes / p.group if p.group else 0.0)
        inner_bytes = 1 if p.format in FP8 else 2
        moved = touched * 3 * p.hidden * p.inter * per_weight + tokens * (
            4 * p.hidden + 2 * p.top_k * p.inter * inner_bytes
        )
        operations = 2 * tokens * p.top_k * 3 * p.hidden * p.inter
        rate = FP8_TFLOP_S if p.format in FP8 else BF16_TFLOP_S
        return max(moved / READ_TB_S / 1e6, operations / rate / 1e6)

    def error(self, tokens: int, path: Path) -> float:
        """Relative, of the first tokens of one run."""
        x, ids, weights = self._hidden(tokens), *self._routing(tokens)
        out = torch.full_like(x, float("nan"))
        self.layer({tokens: path})(x, ids, weights, out)
        if not torch.isfinite(out).all():
            return float("inf")
        some, ids, weights = x[:CHECKED_TOKENS], ids[:CHECKED_TOKENS], weights[:CHECKED_TOKENS]
        h = moe_gate_up_few.reference(self.problem, some, self.gate_up, ids)
        wanted = moe_down_few.reference(self.problem, h, self.down, ids, weights)
        return relative_error(out[:CHECKED_TOKENS], wanted)

    def limit(self, path: Path) -> float:
        if path.name == SCALED:
            return SCALED_LIMIT[self.problem.format]
        return FP8_LIMIT if path.name == SORTED and self.problem.format in FP8 else FEW_LIMIT

    def layer(self, paths: dict[int, Path] | None = None) -> Experts:
        return Experts(self.problem, self.gate_up, self.down, self.gpu, self.workspace, paths)

    def time_us(
        self, calls: list[tuple[torch.Tensor, ...]], path: Path, samples: int = 7, busy_s: float = 0.0
    ) -> float:
        """The median time of one call in a graph of all of them. `busy_s` as in graph_us."""
        layer, out = self.layer({calls[0][0].shape[0]: path}), torch.empty_like(calls[0][0])
        return graph_us([lambda c=c: layer(*c, out) for c in calls], samples, busy_s)


def graph_us(calls: list[Callable[[], None]], samples: int, busy_s: float = 0.0) -> float:
    """Median microseconds of one of `calls`, captured together; a sample is at least 4 ms long. `busy_s`: the
    GPU runs them for so long before, as it does in a server. At its power limit it lowers its clock then, and
    what takes many instructions takes longer (gpt-oss, 64 tokens: 373 us, and 430 after two seconds)."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay_ms(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times

    replay_ms(1)
    times = max(2, int(4.0 / max(replay_ms(1), 1e-3)))
    until = time.monotonic() + busy_s
    while time.monotonic() < until:
        replay_ms(times)
    return statistics.median(replay_ms(times) for _ in range(samples)) / len(calls) * 1e3


# ---- the sweep


def candidates(
    problem: Problem, tokens: int, gpu: Gpu, wanted: Sequence[str]
) -> dict[str, tuple[list[Any], list[Any]]]:
    """Path, of those that are wanted → tiles of the two halves."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    if ONE in wanted and tokens == 1 and moe_gate_up_one.accepts(problem, gpu) is None:
        found[ONE] = tuple(list(module.search_space(problem, 1, gpu)) for module in MODULES[ONE])
    if FEW in wanted and tokens <= moe_gate_up_few.MAX_TOKENS:
        few = (moe_gate_up_few, moe_down_few)
        found[FEW] = tuple(list(module.search_space(problem, tokens, gpu)) for module in few)
    many = [SORTED] if moe_gate_up_scaled.accepts(problem, gpu) else [SORTED, SCALED]
    for path in (path for path in many if path in wanted and tokens >= 8):
        each = tokens * problem.top_k / problem.experts  # choices of an expert
        blocks = [block for block in BLOCKS if each / 4 <= block <= 4 * each + 16]
        found[path] = tuple(
            [tile for block in blocks for tile in module.search_space(problem, block, gpu)]
            for module in MODULES[path]
        )
    return found


def compiles(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> Iterator[CompileRequest]:
    yield from requests(problem, tokens, path, gpu).values()


def warm(job: tuple[Problem, int, Path, Gpu]) -> list[int]:
    """Compiles into Triton's cache on disk, in a process without a GPU context → shared bytes; −1: it did not
    compile."""
    problem, tokens, path, gpu = job
    sizes = []
    for request in compiles(problem, tokens, path, gpu):
        given = {**request.signature, **dict.fromkeys(request.constexprs, "constexpr")}
        types = {name: given[name] for name in request.kernel.arg_names}
        source = _triton.source(request.kernel, types, dict(request.constexprs), request.aligned)
        options = {
            **PINNED_OPTIONS,
            **request.options,
            "num_warps": request.num_warps,
            "num_stages": request.num_stages,
        }
        try:
            sizes.append(_triton.compile_in_process(source, gpu.triton_target, options).metadata.shared)
        except Exception:  # noqa: BLE001 (a tile that does not compile is a result)
            sizes.append(-1)
    return sizes


def sweep(names: list[str], all_tokens: list[int], gpu: Gpu, folder: FilePath, wanted: Sequence[str]) -> None:
    """Times every tile of one half beside a middling tile of the other, then the best of each together."""
    jobs: dict[tuple[Problem, int, Path, Gpu], None] = {}
    for name in names:
        problem = stored_as(SHAPES[name][1], gpu)
        for tokens in all_tokens:
            for path, (ups, downs) in candidates(problem, tokens, gpu, wanted).items():
                for up, down in _paired(ups, downs):
                    jobs[problem, tokens, Path(path, up, down, "sweep"), gpu] = None
    began, most = time.monotonic(), limit_bytes(gpu)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shared = dict(zip(jobs, pool.map(warm, jobs, chunksize=2), strict=True))
    fits = {job for job, sizes in shared.items() if all(0 <= size <= most for size in sizes)}
    print(
        f"{len(jobs)} pairs compiled in {time.monotonic() - began:.0f} s, {len(fits)} fit in {most} bytes",
        flush=True,
    )
    tuned: dict[str, dict[str, Any]] = {}
    for name in names:
        bench = Bench(name, gpu, max(all_tokens))
        for tokens in all_tokens:
            calls, ranked = bench.inputs(tokens), []
            for path, (ups, downs) in candidates(bench.problem, tokens, gpu, wanted).items():
                fitting = [
                    Path(path, up, down, "sweep")
                    for up, down in _paired(ups, downs)
                    if (bench.problem, tokens, Path(path, up, down, "sweep"), gpu) in fits
                ]
                ranked += _best_pairs(bench, calls, fitting)
            ranked.sort(key=lambda pair: pair[0])
            best = next(
                (pair for pair in ranked if bench.error(tokens, pair[1]) < bench.limit(pair[1])), None
            )
            if best is None:
                print(f"{name} {tokens}: nothing right among {len(ranked)}", flush=True)
                continue
            us, path = best
            goal = dict(zip(TOKENS, GOALS_US.get(name, ()), strict=False)).get(tokens, "none")
            peer = PEERS_US.get(name, {}).get(tokens, "none")
            print(
                f"{name} {tokens} {us:.1f} us, goal {goal}, peer {peer} "
                f"{path.name} {path.gate_up} {path.down}",
                flush=True,
            )
            entry = {
                "path": path.name,
                "gate_up": dataclasses.asdict(path.gate_up),
                "down": dataclasses.asdict(path.down),
                "us": round(us, 1),
            }
            tuned.setdefault(_tuned.key(bench.problem), {})[str(tokens)] = entry
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "experts.json").write_text(json.dumps(tuned, indent=1))
        del bench
        torch.cuda.empty_cache()


def _paired(ups: list[Any], downs: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Every tile of either half once."""
    for i in range(max(len(ups), len(downs)) if ups and downs else 0):
        yield ups[i % len(ups)], downs[i % len(downs)]


def _best_pairs(bench: Bench, calls: list[Any], paths: list[Path]) -> list[tuple[float, Path]]:
    """The best of each half, found beside the others, then timed together."""
    if not paths:
        return []
    ups, downs = list(dict.fromkeys(p.gate_up for p in paths)), list(dict.fromkeys(p.down for p in paths))
    name, timed = paths[0].name, {}

    def us(up: Any, down: Any, samples: int = 3) -> float:
        path = Path(name, up, down, "sweep")
        if (up, down, samples) not in timed:
            try:
                timed[up, down, samples] = bench.time_us(calls, path, samples)
            except (RuntimeError, triton.runtime.errors.OutOfResources, FireboxError) as error:
                print(f"{path}: {type(error).__name__}", flush=True)
                timed[up, down, samples] = float("inf")
        return timed[up, down, samples]

    up, down = ups[len(ups) // 2], downs[len(downs) // 2]
    for _ in range(2):
        down = min(downs, key=lambda d: us(up, d))
        up = min(ups, key=lambda u: us(u, down))
    final = sorted(((us(up, d), Path(name, up, d, "sweep")) for d in downs), key=lambda pair: pair[0])[:3]
    return sorted(((us(p.gate_up, p.down, 7), p) for _, p in final), key=lambda pair: pair[0])


# ---- the table


def table(names: list[str], all_tokens: list[int], gpu: Gpu, busy_s: float) -> list[dict[str, Any]]:
    """One row per shape and number of tokens, printed as it is found."""
    rows = []
    for name in names:
        bench = Bench(name, gpu, max(all_tokens))
        for tokens in all_tokens:
            path = path_of(bench.problem, tokens, gpu)
            error = bench.error(tokens, path)
            row: dict[str, Any] = {
                "shape": name,
                "format": bench.problem.format,
                "tokens": tokens,
                "path": path.name,
            }
            row |= {"tiles": path.why, "error": error, "us": None}
            if error < bench.limit(path):
                calls = bench.inputs(tokens)
                us, floor = bench.time_us(calls, path, busy_s=busy_s), bench.floor_us(calls)
                goal = dict(zip(TOKENS, GOALS_US.get(name, ()), strict=False)).get(tokens)
                peer = PEERS_US.get(name, {}).get(tokens)
                row |= {
                    "us": round(us, 1),
                    "floor_us": round(floor, 1),
                    "of_roofline": round(floor / us, 3),
                    "goal_us": goal,
                    "peer_us": peer,
                }
            rows.append(row)
            print(
                " ".join(f"{k} {v:.2g}" if k == "error" else f"{k} {v}" for k, v in row.items()), flush=True
            )
        del bench
        torch.cuda.empty_cache()
    return rows


def compare(names: list[str], all_tokens: list[int], gpu: Gpu, arguments: argparse.Namespace) -> int:
    """--grid or --smem-limit; the exit status."""
    stored = {name: stored_as(problem, gpu) for name, (_, problem) in SHAPES.items()}
    if arguments.grid:
        numbers = _expert_tables.grid()
        found = _expert_tables.run_grid(
            names, stored, lambda name: Bench(name, gpu, numbers[-1]), gpu, numbers
        )
        good = all(_expert_tables.smooth(rows) for rows in found)
    else:
        found = _expert_tables.run_limit(
            names,
            stored,
            lambda name: Bench(name, gpu, max(all_tokens)),
            gpu,
            all_tokens,
            arguments.smem_limit,
        )
        good = all(_expert_tables.acceptable(rows) for rows in found)
    if arguments.json:
        print(json.dumps([row for rows in found for row in rows]))
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name not in OF_ENGINE))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--paths", default=f"{ONE},{FEW},{SORTED},{SCALED}", help="which the sweep looks at")
    parser.add_argument("--hot", type=float, default=0.0, metavar="SECONDS", help="busy before each figure")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--grid", action="store_true", help="40 numbers of tokens, and the dips among them")
    only.add_argument("--smem-limit", type=int, metavar="BYTES", help="with so much a block against without")
    only.add_argument("--sweep", type=FilePath, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names, all_tokens = arguments.shapes.split(","), [int(n) for n in arguments.tokens.split(",")]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"no shape is called {unknown[0]!r}; there are: {', '.join(SHAPES)}")
    gpu = probe_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    print(
        f"{gpu.name}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"{limit_bytes(gpu)} bytes a block",
        flush=True,
    )
    if arguments.sweep:
        sweep(names, all_tokens, gpu, arguments.sweep, arguments.paths.split(","))
        return 0
    if arguments.grid or arguments.smem_limit:
        return compare(names, all_tokens, gpu, arguments)
    rows = table(names, all_tokens, gpu, arguments.hot)
    with_goal = [row for row in rows if row.get("goal_us") and row["us"]]
    reached = sum(row["us"] <= row["goal_us"] for row in with_goal)
    with_peer = [row["us"] / row["peer_us"] for row in rows if row.get("peer_us") and row["us"]]
    if with_peer:
        print(
            f"goals reached {reached} of {len(with_goal)}; against the best peer "
            f"{statistics.geometric_mean(with_peer):.3f} (geometric mean), slowest {max(with_peer):.2f}"
        )
    if arguments.json:
        print(json.dumps(rows))
    return 0 if all(row["us"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
