"""Two questions to the path choice of whole expert layers, for benchmarks/experts.py:

    --grid            is any number of tokens slower than a larger one? 40 numbers from 1 to 4096, whose paths
                      were measured at a few and are taken from the nearest
    --smem-limit N    what does it cost to stay below N bytes of shared memory a block?

The output of every path and tile is compared with float32 before it is timed, once for every compile of it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from firebox.hardware.base import Gpu
from firebox.kernels._experts import Problem
from firebox.kernels.compile import compile_all
from firebox.layers.expert_paths import Path, like, path_of, requests

GRID_POINTS, GRID_LAST = 40, 4096
GRID_SAMPLES = 5  # of at least 4 ms each; the main table takes 7
DIP = 1.03  # so much slower than the next larger number of tokens is a dip
LIMIT_SAMPLES = 5  # of either side, in turns
MOST_LOSS = 1.08  # of the geometric mean

Row = dict[str, Any]
Calls = list[tuple[torch.Tensor, ...]]
Misfits = dict[tuple[Problem, Path, Gpu], str]  # why a path cannot be launched


class Timed(Protocol):
    """What experts.Bench is here."""

    name: str
    problem: Problem

    def inputs(self, tokens: int) -> Calls: ...

    def error(self, tokens: int, path: Path) -> float: ...

    def limit(self, path: Path) -> float: ...

    def time_us(self, calls: Calls, path: Path, samples: int = 7) -> float: ...


def grid(points: int = GRID_POINTS, last: int = GRID_LAST) -> tuple[int, ...]:
    """`points` different numbers from 1 to `last`, as evenly by ratio as whole numbers can be."""
    assert points <= last, (points, last)
    found = [1]
    for i in range(1, points):
        # the ratio that is left for the steps that are left: small numbers are used up first
        step = (last / found[-1]) ** (1 / (points - i))
        found.append(max(found[-1] + 1, round(found[-1] * step)))
    return tuple(found)


def dips(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Neighbours of which the one of fewer tokens is slower by more than DIP; rows are of one shape."""
    ordered = sorted((row for row in rows if row["us"] is not None), key=lambda row: row["tokens"])
    return [(few, more) for few, more in itertools.pairwise(ordered) if few["us"] > DIP * more["us"]]


def smooth(rows: Sequence[Row]) -> bool:
    """Was every number of tokens timed, and is none a dip?"""
    return not dips(rows) and all(row["us"] is not None for row in rows)


def dip_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """What is printed of a shape."""
    found = dips(rows)
    lines = [
        f"{name} dip at {few['tokens']}: {few['us']} us, {few['path']} {few['tiles']}; "
        f"{more['tokens']} take {more['us']} us, {more['path']} {more['tiles']}"
        for few, more in found
    ]
    wrong = [row for row in rows if row["us"] is None]
    lines += [f"{name} {row['tokens']}: not timed, {row['why']}" for row in wrong]
    return [*lines, f"{name} dips: {len(found)} of {len(rows) - 1}"]


def tiles_of(path: Path) -> str:
    """Both tiles of a path in a few characters: rows x tokens x depth, stages and warps."""
    parts = (f"{t.rows}x{t.tokens}x{t.depth}s{t.stages}w{t.warps}" for t in (path.gate_up, path.down))
    return "+".join(parts)


# ---- on a GPU


def compile_ahead(wanted: Iterable[tuple[Problem, int, Path, Gpu]]) -> Misfits:
    """Everything that these launch, a compile a core at a time, into Triton's cache."""
    kinds = dict.fromkeys((p, like(p, tokens, path), path, gpu) for p, tokens, path, gpu in wanted)
    owners = [(kind, request) for kind in kinds for request in requests(*kind).values()]
    began, misfits = time.monotonic(), Misfits()
    results = compile_all([request for _, request in owners], keep_binaries=True)
    for ((problem, _, path, gpu), _), result in zip(owners, results, strict=True):
        if not result.fits:
            too_much = f"{result.shared_bytes} bytes of shared memory of {result.limit_bytes}"
            misfits[problem, path, gpu] = f"{result.kernel}: {result.error or too_much}"
    print(
        f"{len(results)} kernels are ready after {time.monotonic() - began:.0f} s, "
        f"{len(misfits)} paths do not fit",
        flush=True,
    )
    return misfits


class Checked:
    """What is wrong with paths of one shape; each path's error is computed once."""

    def __init__(self, bench: Timed, misfits: Misfits) -> None:
        self._bench, self._misfits, self._errors = bench, misfits, dict[tuple[Any, ...], float]()

    def __call__(self, tokens: int, path: Path, gpu: Gpu) -> str | None:
        """Why it must not be timed, or None."""
        if (self._bench.problem, path, gpu) in self._misfits:
            return self._misfits[self._bench.problem, path, gpu]
        key = (like(self._bench.problem, tokens, path), path.name, path.gate_up, path.down)
        if key not in self._errors:
            self._errors[key] = self._bench.error(tokens, path)
        error, limit = self._errors[key], self._bench.limit(path)
        return None if error < limit else f"its relative error is {error:.2g}, the limit {limit:.2g}"


def grid_rows(bench: Timed, gpu: Gpu, numbers: Sequence[int], misfits: Misfits) -> list[Row]:
    """One row a number of tokens."""
    checked = Checked(bench, misfits)
    paths = {tokens: path_of(bench.problem, tokens, gpu) for tokens in numbers}
    wrong = {tokens: checked(tokens, path, gpu) for tokens, path in paths.items()}
    rows = list[Row]()
    for tokens, path in paths.items():
        why, us = wrong[tokens], None
        if why is None:
            us = round(bench.time_us(bench.inputs(tokens), path, GRID_SAMPLES), 1)
        row = {"shape": bench.name, "tokens": tokens, "us": us, "path": path.name, "tiles": tiles_of(path)}
        rows.append(row | {"why": why or path.why})
    return rows


def run_grid(
    names: Sequence[str],
    problems: dict[str, Problem],
    make: Callable[[str], Timed],
    gpu: Gpu,
    numbers: Sequence[int],
) -> list[list[Row]]:
    """The rows of every shape, printed shape by shape."""
    found = list[list[Row]]()
    wanted = [(problems[name], n, path_of(problems[name], n, gpu), gpu) for name in names for n in numbers]
    misfits = compile_ahead(wanted)
    for name in names:
        began = time.monotonic()
        rows = grid_rows(make(name), gpu, numbers, misfits)
        torch.cuda.empty_cache()
        found.append(rows)
        print(" ".join(f"{row['tokens']}:{row['us']}" for row in rows))
        print("\n".join(dip_lines(name, rows)), f"({time.monotonic() - began:.1f} s)", flush=True)
    return found


# ---- with and without a limit


def limited(gpu: Gpu, smem_bytes: int) -> Gpu:
    """The same GPU, whose blocks may ask for so much, as with FIREBOX_SMEM_LIMIT."""
    return dataclasses.replace(gpu, smem_per_block_bytes=min(gpu.smem_per_block_bytes, smem_bytes))


def same(one: Path, other: Path) -> bool:
    """Are the same kernels launched?"""
    return (one.name, one.gate_up, one.down) == (other.name, other.gate_up, other.down)


def chosen(job: tuple[Problem, int, Gpu]) -> Path:
    """The choice under a limit compiles what it looks at: in a process of its own, many at once."""
    return path_of(*job)


Side = tuple[Path, Gpu]


def limit_row(bench: Timed, tokens: int, free: Side, small: Side, checked: Checked) -> Row:
    """Both are timed in turns, so that heat favours neither."""
    paths = free[0], small[0]
    tiles = [f"{path.name} {tiles_of(path)}" for path in paths]
    row: Row = {"shape": bench.name, "tokens": tokens, "same": same(*paths), "us": None, "limited_us": None}
    row |= {"ratio": None, "tiles": tiles[0], "limited_tiles": tiles[1], "why": paths[1].why}
    for side in (free, small):
        wrong = checked(tokens, *side)
        if wrong:
            return row | {"why": wrong}
    if row["same"]:
        return row | {"ratio": 1.0}
    calls = bench.inputs(tokens)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(LIMIT_SAMPLES):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            times[which].append(bench.time_us(calls, paths[which], samples=1))
    us, limited_us = map(statistics.median, times)
    return row | {"us": round(us, 1), "limited_us": round(limited_us, 1), "ratio": limited_us / us}


def loss(rows: Sequence[Row]) -> float | None:
    """The geometric mean of limited / unlimited; None where a path was wrong."""
    ratios = [row["ratio"] for row in rows]
    return None if None in ratios else statistics.geometric_mean(ratios)


def limit_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """What is printed of a shape."""
    lines = []
    for row in rows:
        at = f"{name} {row['tokens']}"
        if row["ratio"] is None:
            lines.append(f"{at}: not timed; {row['why']}")
        elif row["same"]:
            lines.append(f"{at}: the same path, {row['tiles']}; not timed")
        else:
            lines.append(
                f"{at}: {row['us']} us {row['tiles']}; limited {row['limited_us']} us "
                f"{row['limited_tiles']}; {row['ratio']:.3f} ({row['why']})"
            )
    mean = loss(rows)
    if mean is None:
        return [*lines, f"{name} loses nobody knows what: a path is wrong"]
    timed = sum(not row["same"] for row in rows)
    return [
        *lines,
        f"{name} loses {(mean - 1) * 100:.1f} % ({timed} of {len(rows)} numbers of tokens differ)",
    ]


def acceptable(rows: Sequence[Row]) -> bool:
    """Is the loss known, and at most MOST_LOSS?"""
    mean = loss(rows)
    return mean is not None and mean <= MOST_LOSS


def run_limit(
    names: Sequence[str],
    problems: dict[str, Problem],
    make: Callable[[str], Timed],
    gpu: Gpu,
    all_tokens: Sequence[int],
    smem_bytes: int,
) -> list[list[Row]]:
    """The rows of every shape, printed shape by shape."""
    small = limited(gpu, smem_bytes)
    jobs = [(problems[name], tokens, one) for name in names for tokens in all_tokens for one in (gpu, small)]
    began = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        paths = dict(zip(jobs, pool.map(chosen, jobs), strict=True))
    print(f"{len(jobs)} paths chosen in {time.monotonic() - began:.0f} s", flush=True)
    misfits = compile_ahead([(p, n, path, one) for (p, n, one), path in paths.items()])
    found = []
    for name in names:
        bench = make(name)
        checked, p = Checked(bench, misfits), problems[name]
        rows = [
            limit_row(bench, n, (paths[p, n, gpu], gpu), (paths[p, n, small], small), checked)
            for n in all_tokens
        ]
        del bench, checked
        torch.cuda.empty_cache()
        found.append(rows)
        print("\n".join(limit_lines(name, rows)), flush=True)
    return found
