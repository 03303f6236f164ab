"""A norm and the layers behind it that read its rows, on an NVIDIA GPU. Where those multiply FP8 activations,
which depends on the number of tokens, the norm writes the codes and scales itself, and no quantise_fp8 is
launched in between; where all of them do, it writes nothing else.

Who may read codes is `normed` in its problem; such readers have one grouping of columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _experts, _linear, _tuned, linear, moe_gate_up, rms_norm
from firebox.kernels._rows import Outputs
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.plan import Compile, Made
from firebox.layers import dense_gpu, expert_paths

Codes = tuple[torch.Tensor, torch.Tensor]  # q [tokens, width] float8_e4m3fn, scales float32


@dataclass(frozen=True)
class Problem:
    """`norm`: without outputs. `linears`, `experts`: the layers that read its rows."""

    norm: rms_norm.Problem
    linears: tuple[_linear.Problem, ...] = ()
    experts: tuple[_experts.Problem, ...] = ()


def kernel_problem(problem: Problem, tokens: int, gpu: Gpu) -> rms_norm.Problem:
    """The norm with what it writes for so many tokens."""
    return dataclasses.replace(problem.norm, outputs=_outputs(problem, tokens, gpu))


@_tuned.cached
def _outputs(problem: Problem, tokens: int, gpu: Gpu) -> Outputs:
    groups = [
        linear.x_group(p) if p.normed and dense_gpu.rounds_at(p, tokens, gpu) else None
        for p in problem.linears
    ] + [
        moe_gate_up.x_group(p) if p.normed and expert_paths.rounds_at(p, tokens, gpu) else None
        for p in problem.experts
    ]  # fmt: skip
    rounding = {group for group in groups if group is not None}
    assert len(rounding) <= 1, f"readers of one norm with groups of {rounding} columns"
    if not rounding:
        return Outputs()
    return Outputs(plain=None in groups, fp8=True, group=rounding.pop())


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many tokens launch, for the plan."""
    return _made(kernel_problem(problem, tokens, gpu), gpu)


@functools.cache
def _made(problem: rms_norm.Problem, gpu: Gpu) -> Made:
    return Made("one", "default", (Compile(rms_norm.OP, rms_norm.request(problem, gpu)),))


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py: those of the readers that may read codes."""
    for line in problem.linears:
        yield from dense_gpu.turns(line, max_tokens, gpu) if line.normed else ()
    for routed in problem.experts:
        yield from expert_paths.turns(routed, max_tokens, gpu) if routed.normed else ()


class NormKernels:
    """One norm; see above."""

    def __init__(self, problem: Problem, gpu: Gpu) -> None:
        self._problem, self._gpu = problem, gpu

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Codes | None]:
        """`x` [tokens, width] → its rows in bf16, which hold nothing where no reader takes them, and their
        codes if a reader takes these."""
        problem = kernel_problem(self._problem, len(x), self._gpu)
        outputs, rows = problem.outputs, torch.empty_like(x)
        written = {"out": rows} if outputs.plain else {}
        codes = None
        if outputs.fp8:
            groups = x.shape[1] // (outputs.group or x.shape[1])
            codes = (
                torch.empty_like(x, dtype=torch.float8_e4m3fn),
                x.new_empty(len(x) * groups, dtype=torch.float32),
            )
            written |= {"q": codes[0], "scales": codes[1]}
        rms_norm.run(_launcher(problem, self._gpu), x, weight, **written)
        return rows, codes


@functools.cache
def _launcher(problem: rms_norm.Problem, gpu: Gpu) -> Launcher:
    return Launcher(rms_norm.request(problem, gpu, interpreted=INTERPRETED))
