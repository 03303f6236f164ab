"""Steps of one token, on an NVIDIA GPU: a norm and the one linear layer that reads its row in one launch,
kernels/linear_one.py, where other steps take two.

Only where it was measured to be faster (linear.json, "norm …"): Qwen3's 48 layers take 2.27 ms so on an H200,
2.32 in two launches. Where its results were wrong, steps take the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, _rows, _tuned, linear_one
from firebox.kernels._veto import Choice, why_not
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.linear_one import Config
from firebox.kernels.plan import Compile, Made
from firebox.layers import dense_gpu, norm_gpu
from firebox.layers._in_one import APART, NOT_MEASURED, ONE, SLOWER, apart


@dataclass(frozen=True)
class Problem:
    """`norm`: with `linear` as the layer that reads its row."""

    norm: norm_gpu.Problem
    linear: _linear.Problem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """What both kernels accept; rows of the linear layer's columns, and no residual branch."""
    norm = problem.norm.norm
    if norm.delta or norm.width != problem.linear.columns or norm.dtype != problem.linear.dtype:
        return "norms what the linear layer multiplies, without a residual branch"
    return linear_one.accepts(problem.linear, gpu)


def key(problem: Problem) -> str:
    """How linear.json calls a problem."""
    return f"norm {dense_gpu.key(problem.linear)}"


def choice_of(problem: Problem, config: Config) -> Choice:
    """What is vetoed."""
    return ("norm", problem, config)


@_tuned.cached
def config_of(problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    """The tile; None where steps of so many tokens take two launches."""
    config = _measured(problem, gpu, tokens)
    return None if config is None or why_not(choice_of(problem, config)) else config


def _measured(problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    if tokens != 1 or norm_gpu.kernel_problem(problem.norm, 1, gpu).outputs != _rows.PLAIN:
        return None
    entry = _tuned.measured(gpu.name, dense_gpu.TUNED, key(problem), 1)
    return Config(**entry["config"]) if entry and entry["path"] == ONE else None


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many tokens launch, for the plan."""
    config = config_of(problem, gpu, tokens)
    if config is not None:
        return _made(problem, config, gpu)
    found = _measured(problem, gpu, tokens)
    wrong = found and why_not(choice_of(problem, found))
    return apart("two launches", wrong or "", why_not="takes one token" if tokens > 1 else NOT_MEASURED)


@functools.cache
def _made(problem: Problem, config: Config, gpu: Gpu) -> Made:
    request, choice = _launcher(problem, config, gpu).request, choice_of(problem, config)
    why = f"measured{dense_gpu.multiplied(problem.linear, ONE)}"
    compile = Compile(linear_one.OP, request, config, choice=choice)
    return Made(ONE, why, (compile,), ((APART, SLOWER),))


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py."""
    yield 2


def run(
    problem: Problem,
    config: Config,
    gpu: Gpu,
    x: torch.Tensor,
    gain: torch.Tensor,
    weights: _linear.Weights,
) -> torch.Tensor:
    """`x` [1, columns] and the norm's `gain` [columns], in its dtype → y [1, rows] in the linear layer's
    output type."""
    y = x.new_empty(1, problem.linear.rows, dtype=dense_gpu.DTYPES[problem.linear.out_dtype])
    linear_one.run(_launcher(problem, config, gpu), problem.linear, x, weights, None, y, gain)
    return y


@functools.cache
def _launcher(problem: Problem, config: Config, gpu: Gpu) -> Launcher:
    eps = problem.norm.norm.eps
    return Launcher(linear_one.request(problem.linear, config, gpu, eps=eps, interpreted=INTERPRETED))
