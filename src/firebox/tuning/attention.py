"""Tuning of attention over paged keys: decode of one query a request, `tokens` requests of one context, and
extend of a chunk of `tokens`, each the whole of a task. How keys are divided follows from the tile, as in
attention/triton_paged.py, which reads what is found.

What a step really holds, contexts above all, is not known when it is tuned: a tile is measured at the context
that its problem states. Operations do not say how wide a window is; it is stated too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import _attention, attention_decode, attention_extend
from firebox.kernels._attention import Config
from firebox.kernels._attention_choice import DECODE, EXTEND, key
from firebox.kernels.compile import Compiled, CompileRequest
from firebox.tuning import _attention_estimate
from firebox.tuning._attention_bench import AttentionBench
from firebox.tuning._attention_estimate import Problem
from firebox.tuning.base import Bench, Candidate, Option, Task

OP = "attention"
FILE = "attention.json"
WHOLE = "whole"
CONTEXT_TOKENS = 8192
WINDOW_TOKENS = 128  # gpt-oss; other windows are wider, and then nearly as if there were none
DECODE_UP_TO = 256  # requests; of more, the cache would be larger than GPUs are


def problems(layer: _attention.Problem) -> tuple[Problem, ...]:
    """What there is to tune of one layer."""
    window = WINDOW_TOKENS if layer.window else 0
    return tuple(Problem(kernel, layer, CONTEXT_TOKENS, window) for kernel in (DECODE, EXTEND))


def task(problem: Problem, tokens: int) -> Task:
    """`tokens`: requests, or the tokens of a chunk. Contexts do not tell tasks apart."""
    return Task(OP, key(problem.kernel, problem.layer), problem, tokens)


def candidates(task: Task, gpu: Gpu) -> Iterator[Candidate]:
    """Every tile of the kernel's search space, and the stock one; none for numbers of tokens that the kernel
    does not serve."""
    p = task.problem
    if p.kernel == DECODE and task.tokens <= DECODE_UP_TO:
        space = attention_decode.search_space(p.layer, gpu, 1)
    elif p.kernel == EXTEND and task.tokens > attention_decode.MAX_QUERIES:
        space = attention_extend.search_space(p.layer, gpu)
    else:
        return
    for config in dict.fromkeys([_stock(p, gpu), *space]):
        yield _candidate(task, config, gpu)


def _stock(p: Problem, gpu: Gpu) -> Config:
    if p.kernel == DECODE:
        return attention_decode.default(p.layer, gpu, 1)
    return attention_extend.default(p.layer, gpu)


def _candidate(task: Task, config: Config, gpu: Gpu) -> Candidate:
    return Candidate(task.problem.kernel, WHOLE, config, _requests(task, config, gpu)[0])


def _requests(task: Task, config: Config, gpu: Gpu) -> tuple[CompileRequest, ...]:
    p = task.problem
    if p.kernel == EXTEND:
        return attention_extend.requests(p.layer, config, gpu)
    split = p.splits(task.tokens, config, gpu) > 1
    return attention_decode.requests(p.layer, config, gpu, split=split)


def stock(task: Task, gpu: Gpu) -> Option:
    """What runs without a tuned entry."""
    return Option(task.problem.kernel, {WHOLE: _candidate(task, _stock(task.problem, gpu), gpu)}, 0.0)


def estimate_us(task: Task, candidate: Candidate, compiled: Compiled | None, gpu: Gpu) -> float:
    """See tuning/_attention_estimate.py."""
    p, config = task.problem, candidate.config
    estimated = _attention_estimate.decode_us if p.kernel == DECODE else _attention_estimate.extend_us
    return estimated(p, task.tokens, config, compiled, gpu)


def further_us(task: Task, path: str, parts: Mapping[str, Candidate], gpu: Gpu) -> float:
    """Nothing: the launch that adds up what splits leave is part of its candidate."""
    return 0.0


def roof_us(task: Task, path: str, gpu: Gpu) -> float:
    """See tuning/_attention_estimate.py."""
    return _attention_estimate.roof_us(task.problem, task.tokens, gpu)


def options(task: Task, ranked: Mapping[tuple[str, str], Sequence[Candidate]]) -> Iterator[Option]:
    """Every candidate is one."""
    for (path, _), found in ranked.items():
        for candidate in found:
            yield Option(path, {WHOLE: candidate}, 0.0)


def entry(option: Option) -> dict[str, Any]:
    """As attention/triton_paged.py reads it."""
    return {"path": option.path, "config": asdict(option.parts[WHOLE].config)}


def further_requests(task: Task, gpu: Gpu) -> Iterator[CompileRequest]:
    """The launches that add up, where keys are divided."""
    for candidate in candidates(task, gpu):
        yield from _requests(task, candidate.config, gpu)[1:]


def bench(problem: Problem, gpu: Gpu) -> Callable[[int], Bench]:
    """Tokens → the bench of a step."""
    return functools.partial(AttentionBench, problem, gpu)
