"""A dense gated MLP with its norm and residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from firebox.formats.base import Cut, Slots
from firebox.kernels import cpu_dense_block
from firebox.kernels.select import select
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm


class DenseBlock:
    """x + down(silu(gate(h)) · up(h)), h = norm(x). `name`: the path of the MLP, whose parts are gate_proj,
    up_proj and down_proj."""

    def __init__(self, build: Build, norm: RMSNorm, name: str, inter: int) -> None:
        hidden = norm.weight.shape[0]
        self.norm = norm
        rows, columns = (Cut(axis, inter, "intermediate_size") for axis in (0, 1))
        gate_up = {f"{name}.gate_proj": inter, f"{name}.up_proj": inter}
        self.gate_up = Linear(build, hidden, gate_up, cuts=(rows, rows))
        self.down = Linear(build, inter, {f"{name}.down_proj": hidden}, cuts=(columns,))
        self._problem = cpu_dense_block.Problem(hidden, inter, norm.eps, build.dtype)
        self._choice = select(cpu_dense_block.OP, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        build.choices.append(self._choice)

    def slots(self) -> Slots:
        """The norm's and the three projections' tensors."""
        yield from self.norm.slots()
        yield from self.gate_up.slots()
        yield from self.down.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "gate_up": self.gate_up.weight, "down": self.down.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.gate_up, self.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        return self._run(x)

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)
