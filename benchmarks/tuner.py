"""The tuner against an exhaustive search, on one NVIDIA GPU.

    PYTHONPATH=src:. python benchmarks/tuner.py exhaustive --out DIR [--models …] [--tokens …]
    PYTHONPATH=src:. python benchmarks/tuner.py compare --out DIR
    PYTHONPATH=src:. python benchmarks/tuner.py regret --out DIR
    PYTHONPATH=src:. python benchmarks/tuner.py install --out DIR

`exhaustive` compiles and times every tile of both halves of a model's expert layer, each half on its own,
and keeps it all in DIR/<model>.jsonl.gz, one line a tile: what the compiler made of it and microseconds.
`compare` runs the tuner on the same problems and holds what it chose against the best lines: speed and GPU
seconds. `regret`: what the estimate alone would have chosen; needs no GPU. `install`: DIR/<gpu>/experts.json
with the fastest tiles of the lines; needs no GPU, but the Triton that they were measured with.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from scipy.stats import spearmanr

from firebox.errors import FireboxError
from firebox.hardware.base import Gpu, find_gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels._experts import Problem
from firebox.kernels.compile import Compiled, compile_all
from firebox.layers.expert_paths import SORTED
from firebox.tuning import estimate, experts
from firebox.tuning._launchers import launcher
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort, Graph, interleaved_us
from firebox.tuning.entries import MEASURED, Entry, interleave_keys
from firebox.tuning.journal import Journal
from firebox.tuning.search import KEYS, Search
from firebox.tuning.worker import Worker
from firebox.tuning.write import folder_of, merge

# A rank's share of the cards' expert layers; further shapes are there to fit the estimate.
MODELS = {
    "glm-4.7-fp8-tp4": Problem(5120, 384, 160, 8, "fp8_channel", residual=True),
    "gpt-oss-120b": Problem(2880, 2880, 128, 4, "mxfp4", "clamped_swiglu", biases=True, residual=True),
    "qwen3.5-397b-fp8-tp4": Problem(4096, 256, 512, 10, "fp8_block", residual=True),
    "qwen3-30b-a3b": Problem(2048, 768, 128, 8, "bf16", residual=True),
    "qwen3-30b-a3b-fp8": Problem(2048, 768, 128, 8, "fp8_block", residual=True),
    "kimi-k2.5-tp8": Problem(7168, 256, 384, 8, "int4_group", residual=True),
    "glm-4.7-nvfp4-tp4": Problem(5120, 384, 160, 8, "nvfp4", residual=True),
}
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
EFFORT = Effort(samples=5, sample_ms=1.5)
TOGETHER = 12  # candidates in turn


def exhaustive(
    name: str, all_tokens: Sequence[int], gpu: Gpu, folder: Path, every: int, limit_s: float
) -> None:
    """Everything about one model; `every`: only each such candidate. Stops after `limit_s`."""
    problem, began = MODELS[name], time.monotonic()
    tasks = [experts.task(problem, tokens) for tokens in all_tokens]
    candidates = {task: list(experts.candidates(task, gpu))[:: every or 1] for task in tasks}
    requests = [c.request for found in candidates.values() for c in found if c.request is not None]
    compiled = dict(zip(map(id, requests), compile_all(requests, keep_binaries=True), strict=True))
    compile_s = time.monotonic() - began
    make = experts.bench(problem, gpu)
    folder.mkdir(parents=True, exist_ok=True)
    lines, gpu_s = 0, 0.0
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        for task, found in candidates.items():
            if time.monotonic() - began > limit_s:
                print(f"{name}: out of time before {task.tokens} tokens", flush=True)
                break
            fitting = [c for c in found if compiled[id(c.request)].fits]
            _load(fitting)
            start = time.monotonic()
            bench = make(task.tokens)
            for group in _groups(fitting):
                for candidate, us in _timed(bench, group):
                    lines += 1
                    file.write(json.dumps(_line(task, candidate, compiled[id(candidate.request)], us)) + "\n")
            for line in _further(bench, task, fitting):
                file.write(json.dumps(line) + "\n")
            file.flush()
            gpu_s += time.monotonic() - start
            del bench
            torch.cuda.empty_cache()
    print(
        f"{name}: {len(compiled)} compiles {compile_s:.0f} s, {lines} tiles timed {gpu_s:.0f} s", flush=True
    )


def _load(candidates: Sequence[Candidate]) -> None:
    """Outside the clock, as the tuner does it."""
    for candidate in candidates:
        if candidate.request is not None:
            with contextlib.suppress(RuntimeError, FireboxError, triton.runtime.errors.OutOfResources):
                launcher(candidate.request).load()


def _groups(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    for first in range(0, len(candidates), TOGETHER):
        yield list(candidates[first : first + TOGETHER])


def _timed(bench: Any, group: list[Candidate]) -> Iterator[tuple[Candidate, float]]:
    right, graphs = [], []
    for candidate in group:
        try:
            error, limit = bench.error(candidate)
            if error > limit:
                print(f"wrong: {candidate.name}: {error:.3g}", flush=True)
                continue
            graphs.append(Graph(bench.calls(candidate)))
            right.append(candidate)
        except (RuntimeError, FireboxError, triton.runtime.errors.OutOfResources) as error:
            print(f"{candidate.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    if graphs:
        for candidate, samples in zip(right, interleaved_us(graphs, EFFORT), strict=True):
            yield candidate, statistics.median(samples)


def _line(task: Task, candidate: Candidate, compiled: Compiled, us: float) -> dict[str, Any]:
    return {
        "key": task.key,
        "tokens": task.tokens,
        "path": candidate.path,
        "part": candidate.part,
        "config": asdict(candidate.config),
        "us": round(us, 3),
        "shared": compiled.shared_bytes,
        "registers": compiled.registers,
        "spill": compiled.spill_bytes,
    }


def _further(bench: Any, task: Task, candidates: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """What sorting and summing take, for each size of a block."""
    seen: dict[int, dict[str, Candidate]] = {}
    for candidate in candidates:
        if candidate.path == SORTED:
            seen.setdefault(candidate.config.tokens, {}).setdefault(candidate.part, candidate)
    for block, parts in seen.items():
        if len(parts) == len(experts.PARTS):
            graph = Graph(bench.further(SORTED, parts))
            us = statistics.median(interleaved_us([graph], EFFORT)[0])
            yield {"tokens": task.tokens, "path": SORTED, "part": "further", "block": block, "us": us}


# ---- the tuner beside it


def compare(name: str, gpu: Gpu, folder: Path) -> dict[str, Any]:
    """Tunes afresh, and looks up in the exhaustive search what it chose."""
    found = _lines(folder, name)
    began = time.monotonic()
    with Worker(gpu) as worker:
        row = _tuned(name, gpu, worker, found)
        row |= {"gpu_s": round(worker.seconds, 2), "wall_s": round(time.monotonic() - began, 1)}
    print(json.dumps(row), flush=True)
    return row


def _tuned(name: str, gpu: Gpu, worker: Worker, found: Lines) -> dict[str, Any]:
    full, between = interleave_keys(KEYS, TOKENS)
    make = partial(experts.task, MODELS[name])
    journal = Journal(None, gpu.name, triton.__version__)
    search = Search(experts, make, gpu, journal, worker, keys=full, between=between)
    entries = {entry.task.tokens: entry for entry in search.entries()}
    for tokens, entry in entries.items():
        print(tokens, entry.option.path, [c.name for c in entry.option.parts.values()], flush=True)
    speeds = {}
    for tokens in sorted({key[0] for key in found}):
        nearest = min(entries, key=lambda t: abs(math.log(t / tokens)))
        speeds[tokens] = _best(found, tokens) / _chosen(found, tokens, entries[nearest])
    return {
        "model": name,
        "speed": round(statistics.geometric_mean(speeds.values()), 4),
        "least": round(min(speeds.values()), 3),
        "speeds": {tokens: round(speed, 3) for tokens, speed in speeds.items()},
        "candidates": search.report.candidates,
        "compiled": search.report.compiled,
        "measured": search.report.measured,
        "failed": len(search.report.failed),
    }


Lines = dict[tuple[int, str, str], list[dict[str, Any]]]


def _lines(folder: Path, name: str) -> Lines:
    found: Lines = {}
    packed = gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).decode()
    for line in packed.splitlines():
        row = json.loads(line)
        found.setdefault((row["tokens"], row["path"], row["part"]), []).append(row)
    return found


def _best(found: Lines, tokens: int) -> float:
    """The fastest path's gate_up and down, and what it launches besides."""
    paths = {path for of, path, part in found if of == tokens and part == experts.DOWN}
    return min(
        sum(min(row["us"] for row in found[tokens, path, part]) for part in experts.PARTS)
        + _least_further(found, tokens, path)
        for path in paths
    )


def _chosen(found: Lines, tokens: int, entry: Entry) -> float:
    """The same of an entry, whose tiles must be among the lines."""
    path, total = entry.option.path, 0.0
    for part, candidate in entry.option.parts.items():
        wanted = candidate.numbers
        lines = found.get((tokens, path, part), ())
        (us,) = {row["us"] for row in lines if row["config"] == wanted} or {math.inf}
        total += us
    return total + _least_further(found, tokens, path)


def _least_further(found: Lines, tokens: int, path: str) -> float:
    return min((row["us"] for row in found.get((tokens, path, "further"), ())), default=0.0)


# ---- the lines as a file in tuned/


def install(name: str, gpu: Gpu, folder: Path) -> None:
    """Entries for every number of tokens that was looked at."""
    found = _lines(folder, name)
    entries = [_entry(found, experts.task(MODELS[name], tokens), gpu) for tokens in {t for t, _, _ in found}]
    merge(folder_of(folder, gpu.name) / experts.FILE, experts, entries)


def _entry(found: Lines, task: Task, gpu: Gpu) -> Entry:
    """The fastest pair of tiles that are still candidates, with what is launched for blocks of their size."""
    by_config = {(c.path, c.part, repr(c.numbers)): c for c in experts.candidates(task, gpu)}
    best: tuple[float, str, dict[str, dict[str, Any]]] = (math.inf, "", {})
    for path in {path for tokens, path, part in found if tokens == task.tokens and part == experts.DOWN}:
        rows = [
            [row for row in found[task.tokens, path, part] if (path, part, repr(row["config"])) in by_config]
            for part in experts.PARTS
        ]
        further = {row["block"]: row["us"] for row in found.get((task.tokens, path, "further"), ())}
        for pair in itertools.product(*rows):
            block = max(row["config"]["tokens"] for row in pair)
            us = sum(row["us"] for row in pair) + (further[block] if further else 0.0)
            if any(row["config"].get("apart") for row in pair):
                us += estimate.summing_us(task.problem, task.tokens, gpu)
            if us < best[0]:
                best = us, path, dict(zip(experts.PARTS, pair, strict=True))
    us, path, parts = best
    chosen = {part: by_config[path, part, repr(row["config"])] for part, row in parts.items()}
    shared_bytes = {part: row["shared"] for part, row in parts.items()}
    roof_us = experts.roof_us(task, path, gpu)
    return Entry(task, Option(path, chosen, us), MEASURED, roof_us=roof_us, shared_bytes=shared_bytes)


# ---- the estimate alone


def regret(name: str, gpu: Gpu, folder: Path) -> dict[str, Any]:
    """How much slower the estimate's first choices are than the best, and how well it ranks."""
    problem, lost, ranks = MODELS[name], [], []
    for (tokens, path, part), rows in _lines(folder, name).items():
        if part == "further":
            continue
        product = estimate.expert_product(problem, tokens, path, part)
        guessed = [_estimated(product, row, gpu) for row in rows]
        taken = [row["us"] for row in rows]
        lost.append(math.log(taken[guessed.index(min(guessed))] / min(taken)))
        if len(rows) > 2:
            ranks.append(float(spearmanr(guessed, taken).statistic))
    return {
        "model": name,
        "regret": round(math.exp(statistics.mean(lost)) - 1, 4),
        "worst": round(math.exp(max(lost)) - 1, 3),
        "choices": len(lost),
        "rank_correlation": round(statistics.mean(ranks), 3),
    }


def _estimated(product: Any, row: dict[str, Any], gpu: Gpu) -> float:
    config, compiled = (
        SimpleNamespace(**row["config"]),
        SimpleNamespace(shared_bytes=row["shared"], registers=row["registers"], spill_bytes=row["spill"]),
    )
    return estimate.tile_us(product, estimate.tile_of(product, config, compiled), gpu)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("exhaustive", "compare", "regret", "install"))
    parser.add_argument("--models", default=",".join(list(MODELS)[:3]))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="only each such candidate")
    parser.add_argument("--limit-s", type=float, default=3600.0)
    arguments = parser.parse_args()
    if arguments.what == "regret":
        rows = [regret(name, find_gpu("h200"), arguments.out) for name in arguments.models.split(",")]
        print("\n".join(map(json.dumps, rows)))
        return 0
    if arguments.what == "install":
        for name in arguments.models.split(","):
            install(name, find_gpu("h200"), arguments.out)
        return 0
    gpu = probe_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    print(f"{gpu.name}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    for name in arguments.models.split(","):
        if arguments.what == "compare":
            compare(name, gpu, arguments.out)
            continue
        tokens = [int(n) for n in arguments.tokens.split(",")]
        exhaustive(name, tokens, gpu, arguments.out, arguments.every, arguments.limit_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
