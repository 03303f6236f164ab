"""The end of a model: final norm and output matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from firebox.formats.base import Slot, Slots
from firebox.kernels import cpu_head
from firebox.kernels.select import select
from firebox.layers.base import Build
from firebox.layers.norm import RMSNorm


class Head:
    """logits = weight · norm(x), in float32. `tied`: the embedding matrix that serves as `weight`, if the
    checkpoint says so."""

    def __init__(
        self, build: Build, hidden: int, vocab: int, eps: float, tied: torch.Tensor | None = None
    ) -> None:
        self.norm = RMSNorm(build, hidden, eps)
        self.tied = tied is not None
        self.weight = build.empty(vocab, hidden) if tied is None else tied
        self._problem = cpu_head.Problem(hidden, vocab, eps, build.dtype)
        self._choice = select(cpu_head.OP, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        build.choices.append(self._choice)

    def slots(self, norm: str, head: str) -> Slots:
        """The checkpoint's `{norm}.weight` and, unless tied, `{head}.weight`."""
        yield from self.norm.slots(norm)
        if not self.tied:
            yield Slot(f"{head}.weight", self.weight)

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "head": self.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, hidden] → logits [rows, vocab] float32."""
        return self._run(x)

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(x), self.weight).float()
