"""Tuning of dense linear layers: one part, on the paths of layers/dense_gpu.py. A library's product is a
candidate without a config; how it divides its work is its own affair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import linear, linear_few, linear_one
from firebox.kernels._linear import Problem
from firebox.kernels.compile import Compiled, CompileRequest
from firebox.layers import _dense_library
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, ONE, Path, key, requests, rounds, stock_path
from firebox.tuning import _linear_estimate
from firebox.tuning._linear_bench import Weighted
from firebox.tuning.base import Bench, Candidate, Option, Task

OP = "linear"
FILE = "linear.json"
WHOLE = "whole"
MANY_FROM = 16  # tokens; with fewer, tiles of many tokens are mostly empty


def task(problem: Problem, tokens: int) -> Task:
    """The task of one linear layer. Layers that differ in bias, residual or output type share a key."""
    return Task(OP, key(problem), problem, tokens)


def candidates(task: Task, gpu: Gpu) -> Iterator[Candidate]:
    """Every tile of the kernels' search spaces that can pay for so many tokens, and the stock one."""
    stock = stock_path(task.problem, task.tokens, gpu)
    for path, configs in _spaces(task, gpu):
        first = [stock.config] if stock.name == path else []
        for config in dict.fromkeys([*first, *configs]):
            yield _candidate(task, path, config, gpu)


def _spaces(task: Task, gpu: Gpu) -> Iterator[tuple[str, Iterator[Any]]]:
    """(path, configs). A library has what is unquantised at any number of tokens."""
    problem, tokens = task.problem, task.tokens
    if tokens == 1 and linear_one.accepts(problem, gpu) is None:
        yield ONE, linear_one.search_space(problem, gpu)
    if tokens <= linear_few.MAX_TOKENS:
        yield FEW, linear_few.search_space(problem, tokens, gpu)
    if linear.accepts(problem, gpu) is None and tokens >= MANY_FROM:
        yield MANY, linear.search_space(problem, tokens, gpu)
    unquantised = problem.format == "bf16"
    if unquantised or (tokens >= MANY_FROM and _dense_library.accepts(problem, gpu) is None):
        yield CUBLAS, iter([None])


def _candidate(task: Task, path: str, config: Any, gpu: Gpu) -> Candidate:
    made = requests(task.problem, task.tokens, gpu, Path(path, config, "tuning"))
    of_other = linear.quantised if path == CUBLAS else linear.unquantised  # than the estimates were made for
    unproven = path == ONE or (path in (CUBLAS, MANY) and of_other(task.problem))
    return Candidate(path, WHOLE, config, made.get(linear.OP), unproven)


def stock(task: Task, gpu: Gpu) -> Option:
    """What runs without a tuned entry."""
    path = stock_path(task.problem, task.tokens, gpu)
    return Option(path.name, {WHOLE: _candidate(task, path.name, path.config, gpu)}, 0.0)


def estimate_us(task: Task, candidate: Candidate, compiled: Compiled | None, gpu: Gpu) -> float:
    """See tuning/_linear_estimate.py."""
    problem, tokens = task.problem, task.tokens
    if candidate.path == CUBLAS:
        return _linear_estimate.cublas_us(problem, tokens, gpu)
    if candidate.path == ONE:
        return _linear_estimate.one_us(problem, gpu)
    estimated = _linear_estimate.few_us if candidate.path == FEW else _linear_estimate.many_us
    return estimated(problem, tokens, candidate.config, compiled, gpu)


def further_us(task: Task, path: str, parts: Mapping[str, Candidate], gpu: Gpu) -> float:
    """Rounding the activations to FP8."""
    if not rounds(task.problem, path):
        return 0.0
    return _linear_estimate.rounding_us(task.problem, task.tokens, gpu)


def roof_us(task: Task, path: str, gpu: Gpu) -> float:
    """See tuning/_linear_estimate.py."""
    return _linear_estimate.roof_us(task.problem, task.tokens, gpu, few=path in (ONE, FEW))


def options(task: Task, ranked: Mapping[tuple[str, str], Sequence[Candidate]]) -> Iterator[Option]:
    """Every candidate is one."""
    for (path, _), found in ranked.items():
        for candidate in found:
            yield Option(path, {WHOLE: candidate}, 0.0)


def entry(option: Option) -> dict[str, Any]:
    """As layers/dense_gpu.py reads it."""
    config = option.parts[WHOLE].config
    return {"path": option.path, "config": None if config is None else asdict(config)}


def further_requests(task: Task, gpu: Gpu) -> Iterator[CompileRequest]:
    """What rounds the activations."""
    if linear.accepts(task.problem, gpu) is None:
        many = Path(MANY, linear.default(task.problem, task.tokens, gpu), "tuning")
        found = requests(task.problem, task.tokens, gpu, many)
        yield from (request for op, request in found.items() if op != linear.OP)


def bench(problem: Problem, gpu: Gpu) -> Callable[[int], Bench]:
    """Copies of one layer's weights on this GPU; tokens → its bench."""
    return Weighted(problem, gpu).bench
