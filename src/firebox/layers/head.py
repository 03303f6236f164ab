"""The end of a model: final norm and output matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from firebox.formats import bf16
from firebox.formats.base import Cut, Slots
from firebox.kernels._blocks import HEAD, HeadProblem
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting


class Head:
    """logits = weight · norm(x), in float32. `tied`: the embedding matrix that serves as `weight`, if the
    checkpoint says so, or another head's product."""

    def __init__(
        self, build: Build, norm: RMSNorm, name: str, vocab: int, tied: torch.Tensor | Linear | None = None
    ) -> None:
        hidden = norm.weight.shape[0]
        self.name, self.vocab, self.tied = name, vocab, tied is not None
        self.norm = norm
        at = build if tied is None else dataclasses.replace(build, device=torch.device("meta"))
        cuts = [Cut(0, vocab, "vocab_size")]
        self.linear = Linear(at, hidden, {name: vocab}, cuts=cuts, out_dtype=torch.float32)
        self._tied = tied
        if tied is not None and self.linear.refusal is not None:
            self.linear.tie(tied)
        self._problem = HeadProblem(hidden, vocab, norm.eps, build.dtype)
        self._choice = select(HEAD, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[..., torch.Tensor] = self._compose
        self._build = build
        if self.linear.refusal is None:
            self._choice = Choice(HEAD, None, "kernels of kernels/", {TORCH: "slower"}, "head_gpu")
        build.choices.append(self._choice)

    def slots(self) -> Slots:
        """The norm's tensor and, unless tied, the output matrix."""
        yield from self.norm.slots()
        if not self.tied:
            yield from self.linear.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        if self._tied is not None and self.linear.refusal is None:
            self.linear.tie(self._tied)
        self.linear.finish()
        if self._choice.composed:
            self._run = self._with_kernels()
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "head": self.linear.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.linear

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [rows, hidden] → logits [rows, vocab] float32; in `out`, where that is given."""
        if self._choice.kernel is None:
            return self._run(x, out)
        logits = self._run(x)
        return logits if out is None else out.copy_(logits)

    @property
    def format(self) -> str:
        """Of the output matrix."""
        return "bf16" if self.tied else self.linear.format

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        why = self.linear.refused(setting.gpu, setting.tp)
        if why is not None:
            return why
        from firebox.kernels import rms_norm
        from firebox.kernels.plan import Operation, Single
        from firebox.layers import dense_gpu

        norm = Single("norm", KERNEL_DTYPES[self._problem.dtype], rms_norm, self._norm_problem())
        if not self.tied:
            return norm, self.linear.operation("head", setting)
        problem = self.linear.problem(setting.tp, bf16.Format())
        return norm, Operation("head", "bf16", dense_gpu, problem)

    def _norm_problem(self) -> Any:
        from firebox.kernels import rms_norm

        p = self._problem
        return rms_norm.Problem(p.hidden, p.eps, dtype=KERNEL_DTYPES[p.dtype])

    def _with_kernels(self) -> Callable[..., torch.Tensor]:
        """rms_norm → linear with float32 sums."""
        from firebox.kernels import rms_norm

        device = self._build.shared
        assert device is not None
        norm = device.launcher(rms_norm, self._norm_problem())

        def run(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            h = torch.empty_like(x)
            rms_norm.run(norm, x, self.norm.weight, out=h)
            return self.linear(h, out=out)

        return run

    def _compose(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.linear(self.norm(x)).float()
        return logits if out is None else out.copy_(logits)
