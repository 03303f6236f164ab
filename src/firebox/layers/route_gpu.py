"""Steps of one token, on an NVIDIA GPU: norm, the router's logits and the choice of experts in one launch,
kernels/moe_norm_route.py, where other steps take three (moe_gpu.py).

Only where it was measured to be faster (route.json), and where nobody reads FP8 codes of the rows. Where its
results were wrong, steps take the three launches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, _rows, _tuned
from firebox.kernels import moe_norm_route as kernel
from firebox.kernels._veto import Choice, why_not
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.moe_norm_route import Config
from firebox.kernels.plan import Compile, Made
from firebox.layers import norm_gpu
from firebox.layers._in_one import APART, NOT_MEASURED, ONE, SLOWER, apart

TUNED_FILE = "route"  # the file in tuned/<gpu>/
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Problem:
    """`norm`: with the layers that read its rows."""

    norm: norm_gpu.Problem
    kernel: kernel.Problem


def key(problem: Problem) -> str:
    """How route.json calls a problem."""
    p, route = problem.kernel, problem.kernel.route
    sizes = (
        f"{p.norm.dtype} hidden={p.norm.width} experts={route.experts} top_k={route.top_k} {route.scoring}"
    )
    groups = f"groups={route.kept_groups}/{route.expert_groups}"
    further = {groups: route.expert_groups > 1, f"shared={route.shared}": route.shared, "bias": p.bias}
    return " ".join([sizes, *(name for name, there in further.items() if there)])


def choice_of(problem: Problem, config: Config) -> Choice:
    """What is vetoed."""
    return (TUNED_FILE, problem.kernel, config)


@_tuned.cached
def config_of(problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    """The tile; None where steps of so many tokens take three launches."""
    config = _measured(problem, gpu, tokens)
    return None if config is None or why_not(choice_of(problem, config)) else config


def _measured(problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    if tokens != 1 or norm_gpu.kernel_problem(problem.norm, 1, gpu).outputs != _rows.PLAIN:
        return None
    entry = _tuned.measured(gpu.name, TUNED_FILE, key(problem), 1)
    return Config(**entry["config"]) if entry and entry["path"] == ONE else None


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many tokens launch, for the plan."""
    config = config_of(problem, gpu, tokens)
    if config is not None:
        return _made(problem, config, gpu)
    found = _measured(problem, gpu, tokens)
    wrong = found and why_not(choice_of(problem, found))
    return apart("three launches", wrong or "", why_not="takes one token" if tokens > 1 else NOT_MEASURED)


@functools.cache
def _made(problem: Problem, config: Config, gpu: Gpu) -> Made:
    request, choice = _launcher(problem.kernel, config, gpu).request, choice_of(problem, config)
    compile = Compile(kernel.OP, request, config, choice=choice)
    return Made(ONE, "measured", (compile,), ((APART, SLOWER),))


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py."""
    yield 2


class Workspace:
    """What programs hand to each other; layers that run one after the other share it."""

    def __init__(self, device: torch.device | str) -> None:
        self.logits = torch.empty(MAX_EXPERTS, dtype=torch.float32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)


def run(
    problem: Problem,
    config: Config,
    gpu: Gpu,
    space: Workspace,
    x: torch.Tensor,
    gain: torch.Tensor,
    router: _linear.Weights,
    correction_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """`x` [1, hidden] → its normed row, no codes of it, and its experts and their weights [1, choices]."""
    h, choices = torch.empty_like(x), problem.kernel.route.choices
    ids = x.new_empty(1, choices, dtype=torch.int32)
    weights = x.new_empty(1, choices, dtype=torch.float32)
    kernel.run(
        _launcher(problem.kernel, config, gpu), problem.kernel, x, gain, router, correction_bias,
        logits=space.logits, counter=space.counter, out=h, expert_ids=ids, routing_weights=weights,
    )  # fmt: skip
    return h, None, ids, weights


@functools.cache
def _launcher(problem: kernel.Problem, config: Config, gpu: Gpu) -> Launcher:
    return Launcher(kernel.request(problem, config, gpu, interpreted=INTERPRETED))
