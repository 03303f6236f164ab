"""A dense gated MLP with its norm and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from firebox.formats.base import Cut, Slots
from firebox.kernels._blocks import DENSE_BLOCK, DenseProblem
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.layers.linear import INNER_UNIT, Linear, fitted, grown
from firebox.layers.norm import RMSNorm

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting


class DenseBlock:
    """x + down(silu(gate(h)) · up(h)), h = norm(x). `name`: the path of the MLP, whose parts are gate_proj,
    up_proj and down_proj."""

    def __init__(self, build: Build, norm: RMSNorm, name: str, inter: int) -> None:
        hidden = norm.weight.shape[0]
        self.norm, self._inter = norm, inter
        rows, columns = (Cut(axis, inter, "intermediate_size") for axis in (0, 1))
        gate_up = {f"{name}.gate_proj": inter, f"{name}.up_proj": inter}
        self.gate_up = Linear(build, hidden, gate_up, cuts=(rows, rows), unit=INNER_UNIT, normed=True)
        down = {f"{name}.down_proj": hidden}
        self.down = Linear(build, inter, down, cuts=(columns,), residual=True, unit=INNER_UNIT)
        self._problem = DenseProblem(hidden, inter, norm.eps, build.dtype)
        self._choice = select(DENSE_BLOCK, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        self._build = build
        if build.shared is not None and not (self.gate_up.refusal or self.down.refusal):
            losers = {TORCH: "slower"}
            self._choice = Choice(DENSE_BLOCK, None, "kernels of kernels/", losers, "dense_gpu")
        build.choices.append(self._choice)

    @property
    def format(self) -> str:
        """Of the projections' weights; of several, all."""
        return " and ".join(sorted({self.gate_up.format, self.down.format}))

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        return bool(self._choice.composed)

    def slots(self) -> Slots:
        """The norm's and the three projections' tensors."""
        yield from self.norm.slots()
        yield from self.gate_up.slots()
        yield from self.down.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        self.gate_up.finish()
        self.down.finish()
        if self._choice.composed:
            self._run = self._with_kernels()
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "gate_up": self.gate_up.weight, "down": self.down.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.gate_up, self.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        return self._run(x)

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        gpu, tp = setting.gpu, setting.tp
        why = self.gate_up.refused(gpu, tp) or self.down.refused(gpu, tp)
        if why is not None:
            return why
        from firebox.kernels import silu_mul
        from firebox.kernels.plan import Operation, Single
        from firebox.layers import norm_gpu

        dtype, (norm, activation) = KERNEL_DTYPES[self._problem.dtype], self._problems(tp)
        return (
            Operation("norm", dtype, norm_gpu, norm_gpu.Problem(norm, (self.gate_up.problem(tp),))),
            self.gate_up.operation("gate_up", setting),
            Single("silu_mul", dtype, silu_mul, activation),
            self.down.operation("down", setting),
        )

    def _problems(self, tp: int = 1) -> tuple[Any, Any]:
        """Of norm and activation."""
        from firebox.kernels import rms_norm, silu_mul

        p, dtype = self._problem, KERNEL_DTYPES[self._problem.dtype]
        inner = grown(self._inter // tp, INNER_UNIT)
        return rms_norm.Problem(p.hidden, p.eps, dtype=dtype), silu_mul.Problem(inner, dtype=dtype)

    def _with_kernels(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """rms_norm → linear → silu_mul → linear, which adds x; x becomes the result."""
        from firebox.kernels import silu_mul
        from firebox.layers import norm_gpu

        device, problems = self._build.shared, self._problems()
        inter = problems[1].inter
        assert device is not None
        activate = device.launcher(silu_mul, problems[1])
        behind = norm_gpu.Problem(problems[0], (self.gate_up.problem(),))
        norm = norm_gpu.NormKernels(behind, self._build.gpu)

        def run(x: torch.Tensor) -> torch.Tensor:
            inner = x.new_empty(x.shape[0], inter)
            h, codes = norm(x, self.norm.weight)
            silu_mul.run(activate, self.gate_up(h, codes=codes), out=inner)
            return self.down(inner, x)

        return run

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(fitted(F.silu(gate) * up, self.down), x)
