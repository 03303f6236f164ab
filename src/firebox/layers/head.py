"""The end of a model: final norm and output matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from firebox.formats.base import Cut, Slots
from firebox.kernels import cpu_head
from firebox.kernels.select import select
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm


class Head:
    """logits = weight · norm(x), in float32. `tied`: the embedding matrix that serves as `weight`, if the
    checkpoint says so."""

    def __init__(
        self, build: Build, norm: RMSNorm, name: str, vocab: int, tied: torch.Tensor | None = None
    ) -> None:
        hidden = norm.weight.shape[0]
        self.name, self.vocab, self.tied = name, vocab, tied is not None
        self.norm = norm
        at = build if tied is None else dataclasses.replace(build, device=torch.device("meta"))
        self.linear = Linear(at, hidden, {name: vocab}, cuts=[Cut(0, vocab, "vocab_size")])
        if tied is not None:
            self.linear.weight = tied
        self._problem = cpu_head.Problem(hidden, vocab, norm.eps, build.dtype)
        self._choice = select(cpu_head.OP, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        build.choices.append(self._choice)

    def slots(self) -> Slots:
        """The norm's tensor and, unless tied, the output matrix."""
        yield from self.norm.slots()
        if not self.tied:
            yield from self.linear.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "head": self.linear.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, hidden] → logits [rows, vocab] float32."""
        return self._run(x)

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)).float()
