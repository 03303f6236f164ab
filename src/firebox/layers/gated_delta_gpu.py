"""A gated delta net on an NVIDIA GPU, from residual stream to residual stream:

    rms_norm → linear (qkv, z, b, a) → layers/delta_gpu → linear, which adds x

Projections whose weights share a format are one product. Weights stay in their format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from firebox.attention.base import RecurrentSpec
from firebox.hardware.base import Gpu
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels._gated_delta import Problem
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.linear import Linear
    from firebox.layers.norm import RMSNorm


class Layer(Protocol):
    """What is read of a layers.gated_delta.GatedDeltaBlock."""

    layer: int
    spec: RecurrentSpec
    key_heads: int
    norm: RMSNorm
    ins: tuple[Linear, ...]
    conv: torch.Tensor
    dt_bias: torch.Tensor
    a_log: torch.Tensor
    out_norm: RMSNorm
    out: Linear

    def project(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """mixed, z, b and a."""
        ...


def refusal(layer: Layer, gpu: Gpu, dtype: torch.dtype, tp: int = 1) -> str | None:
    """Why the kernels of `gpu` cannot run one of `tp` shares of such a layer, or None."""
    if dtype not in KERNEL_DTYPES:
        return f"kernels compute in bfloat16, not {dtype}"
    from firebox.kernels import gated_delta_chunk, gated_delta_decode, rms_norm

    why = next(filter(None, (linear.refused(gpu, tp) for linear in (*layer.ins, layer.out))), None)
    p = problem(layer, dtype, tp)
    why = why or rms_norm.accepts(_norm_problem(layer, dtype), gpu)
    return why or gated_delta_decode.accepts(p, gpu) or gated_delta_chunk.accepts(p, gpu)


def operations(layer: Layer, dtype: torch.dtype, setting: Setting) -> tuple[Operation, ...] | str:
    """What such a layer launches on one of `setting.tp` GPUs, for the plan; or why the kernels cannot run
    it."""
    from firebox.kernels import rms_norm
    from firebox.kernels.plan import Operation, Single
    from firebox.layers import delta_gpu

    why = refusal(layer, setting.gpu, dtype, setting.tp)
    if why is not None:
        return why
    name = KERNEL_DTYPES[dtype]
    return (
        Single("norm", name, rms_norm, _norm_problem(layer, dtype)),
        *(linear.operation(_named(linear), setting) for linear in layer.ins),
        Operation("delta", name, delta_gpu, problem(layer, dtype, setting.tp)),
        layer.out.operation("out", setting),
    )


def problem(layer: Layer, dtype: torch.dtype, tp: int = 1) -> Problem:
    """Of the kernels, of one of `tp` shares."""
    from firebox.kernels._gated_delta import Problem

    spec = layer.spec
    widths = [linear.problem(tp).rows for linear in layer.ins for _ in linear.parts]
    mixed, z, b, a = widths
    return Problem(
        layer.key_heads // tp, spec.heads // tp, spec.key_dim, spec.value_dim, spec.conv_taps,
        layer.out_norm.eps, KERNEL_DTYPES[dtype], (mixed, z, b, a),
    )  # fmt: skip


def _named(linear: Linear) -> str:
    """For example "qkv, z, b, a"."""
    return ", ".join(path.rpartition("in_proj_")[2] for path in linear.parts)


def _norm_problem(layer: Layer, dtype: torch.dtype) -> Any:
    from firebox.kernels import rms_norm

    return rms_norm.Problem(layer.norm.weight.shape[0], layer.norm.eps, dtype=KERNEL_DTYPES[dtype])


class GatedDeltaKernels:
    """See above; bound to a layer whose slots are filled."""

    def __init__(self, layer: Layer, build: Build) -> None:
        from firebox.kernels import rms_norm
        from firebox.kernels._gated_delta import Weights

        device = build.shared
        assert device is not None
        self._layer = layer
        self._norm = device.launcher(rms_norm, _norm_problem(layer, build.dtype))
        weights = Weights(layer.conv, layer.dt_bias, layer.a_log, layer.out_norm.weight)
        self._recur = device.gated_delta(problem(layer, build.dtype), weights)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden], which becomes the result; advances the states of the step's requests."""
        from firebox.kernels import rms_norm
        from firebox.kernels._gated_delta import Inputs

        layer, p, h = self._layer, self._recur.problem, torch.empty_like(x)
        assert step.state_slots is not None and step.starts is not None
        rms_norm.run(self._norm, x, layer.norm.weight, out=h)
        mixed, z, b, a = layer.project(h)
        y = x.new_empty(x.shape[0], p.heads * p.value_dim)
        inputs = Inputs(mixed, z, a, b, step.starts, step.state_slots)
        self._recur(inputs, step.query_start, step.caches[layer.layer], y)
        return layer.out(y, x)
