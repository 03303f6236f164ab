"""Tuning of expert layers: two parts, gate_up and down, on the paths of layers/expert_paths.py. On sorted
paths a part's tile also sets how many choices a block has; both parts run with the larger of the two.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import _tuned, moe_down_few, moe_gate_up_few
from firebox.kernels._block_scaled import native_from
from firebox.kernels._experts import Problem
from firebox.kernels.compile import Compiled, CompileRequest
from firebox.layers.expert_paths import FEW, MODULES, ONE, SCALED, SORTED, default_path, requests, stock_path
from firebox.tuning import estimate
from firebox.tuning._expert_bench import DOWN, Weighted, tables_request
from firebox.tuning.base import Bench, Candidate, Option, Task
from firebox.tuning.estimate import GATE_UP

OP = "experts"
FILE = "experts.json"
PARTS = (GATE_UP, DOWN)
BLOCKS = (16, 32, 64, 128)
SORTED_FROM = 8  # tokens; with fewer, sorting costs more than it can bring
PLAIN_FEW = 64  # up to so many, weights of 8 and 16 bits go without: with more they are near the roof sorted
PAIRED = 3  # of the best tiles of each part that are weighed together


def task(problem: Problem, tokens: int) -> Task:
    """The task of one expert layer."""
    return Task(OP, _tuned.key(problem), problem, tokens)


def candidates(task: Task, gpu: Gpu) -> Iterator[Candidate]:
    """Every tile of the kernels' search spaces that can pay for so many tokens, and the stock one."""
    stock = stock_path(task.problem, task.tokens, gpu)
    for path in _paths(task, gpu):
        for part, module in zip(PARTS, MODULES[path], strict=True):
            configs = [getattr(stock, part)] if stock.name == path else []
            for block in _blocks(task, path):
                configs += module.search_space(task.problem, block, gpu)
            for config in dict.fromkeys(configs):
                yield _candidate(task, path, part, config, gpu)


def _paths(task: Task, gpu: Gpu) -> Iterator[str]:
    if task.tokens == 1:
        yield ONE
    if task.tokens <= (moe_gate_up_few.MAX_TOKENS if task.problem.group else PLAIN_FEW):
        yield FEW
    if task.tokens >= SORTED_FROM:
        yield SORTED
        if task.tokens >= native_from(task.problem, gpu):  # before that rounding would gain nothing
            yield SCALED


def _blocks(task: Task, path: str) -> list[int]:
    """What search spaces are asked for: the layer's tokens, or tiles from a quarter of to four times what an
    expert has."""
    if path in (ONE, FEW):
        return [task.tokens]
    each = task.tokens * task.problem.top_k / task.problem.experts
    return [block for block in BLOCKS if each / 4 <= block <= 4 * each + 16] or [BLOCKS[-1]]


def _candidate(task: Task, path: str, part: str, config: Any, gpu: Gpu) -> Candidate:
    return Candidate(path, part, config, _request(task, path, part, config, gpu), unproven=path == ONE)


def _request(task: Task, path: str, part: str, config: Any, gpu: Gpu) -> CompileRequest:
    module: Any = MODULES[path][PARTS.index(part)]
    if path == FEW:
        found: CompileRequest = module.request(task.problem, task.tokens, config, gpu)
    else:
        found = module.request(task.problem, config, gpu)
    return found


def stock(task: Task, gpu: Gpu) -> Option:
    """What runs without a tuned entry."""
    path = stock_path(task.problem, task.tokens, gpu)
    parts = {part: _candidate(task, path.name, part, getattr(path, part), gpu) for part in PARTS}
    return Option(path.name, parts, 0.0)


def estimate_us(task: Task, candidate: Candidate, compiled: Compiled | None, gpu: Gpu) -> float:
    """See tuning/estimate.py. One token's own tiles, for want of a fit, take the memory's time: they are told
    apart by measuring them."""
    if candidate.path == ONE:
        return estimate.one_us(_product(task.problem, 1, FEW, candidate.part), gpu)
    product = _product(task.problem, task.tokens, candidate.path, candidate.part)
    return estimate.tile_us(product, estimate.tile_of(product, candidate.config, compiled), gpu)


_product = functools.lru_cache(256)(estimate.expert_product)


def further_us(task: Task, path: str, parts: Mapping[str, Candidate], gpu: Gpu) -> float:
    """Sorting, rounding and summing."""
    if path == ONE:
        return 0.0
    if path == FEW:
        apart = moe_down_few.adds_apart(parts[DOWN].config, task.tokens)
        return estimate.summing_us(task.problem, task.tokens, gpu) if apart else 0.0
    rounding = estimate.rounding_us(task.problem, task.tokens, gpu) if path == SCALED else 0.0
    return rounding + estimate.sorting_us(task.problem, task.tokens, gpu)


def roof_us(task: Task, path: str, gpu: Gpu) -> float:
    """See tuning/estimate.py."""
    return estimate.roof_us(task.problem, task.tokens, FEW if path == ONE else path, gpu)


def options(task: Task, ranked: Mapping[tuple[str, str], Sequence[Candidate]]) -> Iterator[Option]:
    """The best of either part with each other."""
    for path in dict.fromkeys(path for path, _ in ranked):
        best = [ranked.get((path, part), ())[:PAIRED] for part in PARTS]
        for pair in itertools.product(*best):
            yield Option(path, dict(zip(PARTS, pair, strict=True)), 0.0)


def entry(option: Option) -> dict[str, Any]:
    """As kernels/_tuned.py reads it."""
    return {"path": option.path} | {part: asdict(option.parts[part].config) for part in PARTS}


def further_requests(task: Task, gpu: Gpu) -> Iterator[CompileRequest]:
    """Sorting and what belongs to it, and the stock tiles that make the second halves' inputs."""
    for path in _paths(task, gpu):
        for block in _blocks(task, path):
            stock_tiles = default_path(task.problem, path, block, gpu)
            yield from requests(task.problem, task.tokens, stock_tiles, gpu).values()
        if path == FEW:
            yield tables_request(task.problem, task.tokens, gpu)
    if task.tokens >= SORTED_FROM:
        smallest = default_path(task.problem, SORTED, BLOCKS[0], gpu)
        yield from requests(task.problem, task.tokens, smallest, gpu).values()


def bench(problem: Problem, gpu: Gpu) -> Callable[[int], Bench]:
    """The weights of one layer on this GPU; tokens → its bench."""
    return Weighted(problem, gpu).bench
