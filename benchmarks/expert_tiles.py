"""Tiles of whole expert layers beside those in use, on one NVIDIA GPU that is as hot as a server's.

    PYTHONPATH=src:. python benchmarks/expert_tiles.py FILE [--hot 2] [--seconds 300] [--show 6] [--json]

FILE says what to try, as JSON:

    [{"shape": "E", "tokens": 64,                    a shape of benchmarks/experts.py
      "gate_up": [{"rows": 128, "warps": 1, …}, …],  tiles as in tuned/*/experts.json; what is left out is as
      "down": […],                                   in the tile in use, or its type's own
      "path": "few",                                 if it is another path's
      "pairs": true}, …]                             each of one half with each of the other

Without "pairs" a tile of one half runs beside the other half in use, and at the end the best of both halves
run together. All are compiled first, side by side; every candidate is timed between two measurements of what
is in use, for a GPU at its power limit changes its clock by a tenth within seconds; and compared with float32
like the rest. What does not compile, fit or come out right has no time. The tiles in use stay as they are.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
import triton
from experts import SHAPES, Bench, warm

from firebox.errors import FireboxError
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels.compile import limit_bytes
from firebox.layers.expert_paths import MODULES, Path, path_of, stored_as

SAMPLES, BUSY_S = 7, 0.1  # of a measurement, once the GPU is hot
BETTER = 0.997  # of what is in use; above it they are alike


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate's microseconds, and those of what is in use around it."""

    path: Path
    us: float
    usual_us: float

    @property
    def ratio(self) -> float:
        return self.us / self.usual_us


def tiles(given: Sequence[dict[str, Any]], kind: Any, usual: Any) -> list[Any]:
    """What a file says of one half, as tiles of the type `kind`. Raises TypeError for a field it lacks."""
    as_usual = dataclasses.asdict(usual) if isinstance(usual, kind) else {}
    return [kind(**{**as_usual, **each}) for each in given]


def in_pairs(wanted: dict[str, Any], usual: Path) -> bool:
    """Each tile of one half with each of the other? Another path's have no other half in use."""
    return bool(wanted.get("pairs")) or wanted.get("path", usual.name) != usual.name


def candidates(wanted: dict[str, Any], usual: Path) -> list[Path]:
    """The paths that one entry of the file stands for."""
    name = wanted.get("path", usual.name)
    first, second = (module.Config for module in MODULES[name])
    ups = tiles(wanted.get("gate_up", ()), first, usual.gate_up)
    downs = tiles(wanted.get("down", ()), second, usual.down)
    if in_pairs(wanted, usual):
        return [Path(name, up, down, "candidate") for up in ups for down in downs]
    beside = [(up, usual.down) for up in ups] + [(usual.gate_up, down) for down in downs]
    return [Path(name, up, down, "candidate") for up, down in beside]


def together(found: Sequence[Found], usual: Path) -> Path | None:
    """The best tile of either half, if both are better than what is in use."""
    better = sorted((each for each in found if each.ratio < BETTER), key=lambda each: each.ratio)
    up = next((each.path.gate_up for each in better if each.path.gate_up != usual.gate_up), None)
    down = next((each.path.down for each in better if each.path.down != usual.down), None)
    return Path(usual.name, up, down, "candidate") if up and down else None


def compare(paths: Sequence[Path], usual: Path, time_us: Callable[[Path], float]) -> list[Found]:
    """Each of `paths` between two measurements of `usual`; those that have no time are left out."""
    found, before = [], time_us(usual)
    for path in paths:
        us = time_us(path)
        after = time_us(usual)
        if us < math.inf and after < math.inf:
            found.append(Found(path, us, (before + after) / 2))
        before = after
    return found


def compiled(jobs: Sequence[tuple[Any, int, Path, Gpu]], most: int) -> set[tuple[Any, int, Path, Gpu]]:
    """Those of `jobs` that compile and fit into `most` bytes."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shared = dict(zip(jobs, pool.map(warm, jobs, chunksize=2), strict=True))
    return {job for job, sizes in shared.items() if all(0 <= size <= most for size in sizes)}


def run(
    entries: Sequence[dict[str, Any]], gpu: Gpu, busy_s: float, ends: float, show: int
) -> list[dict[str, Any]]:
    """Rows of what was found, the best of each entry printed."""
    plan = []
    for wanted in entries:
        problem, tokens = stored_as(SHAPES[wanted["shape"]][1], gpu), int(wanted["tokens"])
        usual = path_of(problem, tokens, gpu)
        plan.append((wanted, problem, tokens, usual, candidates(wanted, usual)))
    jobs = dict.fromkeys((p, n, path, gpu) for _, p, n, _, paths in plan for path in paths)
    fits, rows = compiled(list(jobs), limit_bytes(gpu)), []
    for wanted, problem, tokens, usual, paths in plan:
        bench = Bench(wanted["shape"], gpu, tokens)
        calls = bench.inputs(tokens)
        fitting = [path for path in paths if (problem, tokens, path, gpu) in fits]

        def time_us(path: Path, bench: Bench = bench, calls: Any = calls) -> float:
            if time.monotonic() > ends:
                return math.inf
            try:
                return bench.time_us(calls, path, SAMPLES, min(busy_s, BUSY_S))
            except (RuntimeError, triton.runtime.errors.OutOfResources, FireboxError) as error:
                print(f"{path}: {type(error).__name__}", flush=True)
                return math.inf

        bench.time_us(calls, usual, 1, busy_s)
        found = compare(fitting, usual, time_us)
        both = None if in_pairs(wanted, usual) else together(found, usual)
        if both is not None:
            found += compare([both], usual, time_us)
        errors = {each.path: bench.error(tokens, each.path) for each in found}
        right = [each for each in found if errors[each.path] < bench.limit(each.path)]
        right.sort(key=lambda each: each.ratio)
        name = f"{wanted['shape']} {tokens}"
        print(f"{name}: {len(right)} of {len(paths)} right and timed, in use {usual}", flush=True)
        for each in right[:show]:
            print(
                f"{name} {each.ratio:.3f} {each.us:.1f} us, in use {each.usual_us:.1f}, "
                f"error {errors[each.path]:.2g} {each.path.gate_up} {each.path.down}",
                flush=True,
            )
        rows += [
            {"shape": wanted["shape"], "tokens": tokens, "ratio": each.ratio, "error": errors[each.path]}
            | dataclasses.asdict(each)
            for each in right
        ]
        del bench, calls
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=FilePath)
    parser.add_argument(
        "--hot", type=float, default=2.0, help="seconds that the GPU is busy before the first"
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--show", type=int, default=6, help="candidates of an entry")
    parser.add_argument("--json", action="store_true", help="all of them on the last line")
    arguments = parser.parse_args()
    entries = json.loads(arguments.file.read_text(encoding="utf-8"))
    unknown = [entry["shape"] for entry in entries if entry["shape"] not in SHAPES]
    if unknown:
        parser.error(f"no shape is called {unknown[0]!r}; there are: {', '.join(SHAPES)}")
    gpu = probe_gpu()
    if gpu is None:
        sys.exit("error: this needs an NVIDIA GPU")
    rows = run(entries, gpu, arguments.hot, time.monotonic() + arguments.seconds, arguments.show)
    if arguments.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
