"""A multi-head latent attention layer on an NVIDIA GPU, from residual stream to residual stream:

    rms_norm → linear (q_a, kv_a) → rms_norm, linear (q_b) → product with each head's key half → latent_write
    → attention/triton_paged → product with each head's value half → linear, which adds x

Without compressed queries the first linear layer makes them. The products with the halves of kv_b_proj are
cuBLAS's, one matrix a head: they read queries and write what attention reads where it lies. Weights stay in
their format, those halves apart, which are dequantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from firebox.attention.base import LatentSpec
from firebox.attention.base import select as select_backend
from firebox.hardware.base import Gpu
from firebox.layers.attention_gpu import verified
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.layers.linear import DENSE
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.linear import Linear
    from firebox.layers.norm import RMSNorm


@dataclass(frozen=True)
class Problem:
    """Sizes of one layer. `q_latent_dim` None: queries are not compressed. `interleaved`: the rotated
    dimensions come in pairs (see layers.rope). `scale` multiplies the scores."""

    hidden: int
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    q_latent_dim: int | None
    scale: float
    interleaved: bool
    eps: float
    dtype: torch.dtype
    kv_dtype: torch.dtype


class Layer(Protocol):
    """What is read of a layers.latent_attention.LatentAttentionBlock. `key_half` [heads, nope_dim,
    latent_dim], `value_half` [heads, value_dim, latent_dim]."""

    problem: Problem
    layer: int
    norm: RMSNorm
    q_and_kv_a: Linear
    q_norm: RMSNorm
    q_b: Linear
    kv_norm: RMSNorm
    o: Linear
    key_half: torch.Tensor
    value_half: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    kv_scales: torch.Tensor | None
    backend: ModuleType | None


def refusal(layer: Layer, gpu: Gpu, p: Problem, backend: ModuleType, tp: int = 1) -> str | None:
    """Why the kernels of `gpu` cannot run one of `tp` shares of such a layer, whose sizes are `p`, or
    None."""
    if p.dtype not in KERNEL_DTYPES or p.kv_dtype not in (p.dtype, torch.float8_e4m3fn):
        return f"computes in bfloat16 over a cache in bfloat16 or FP8, not {p.dtype} and {p.kv_dtype}"
    if not backend.__name__.endswith("triton_paged"):
        return f"attends with triton_paged, not with {backend.__name__.rpartition('.')[2]}"
    from firebox.kernels import latent_write, rms_norm

    inner = () if p.q_latent_dim is None else (layer.q_b,)
    linears = (linear.refused(gpu, tp) for linear in (layer.q_and_kv_a, *inner, layer.o))
    norms = (rms_norm.accepts(norm, gpu) for norm in _norm_problems(layer, p))
    return next(filter(None, (*linears, *norms, latent_write.accepts(_write_problem(layer, p), gpu))), None)


def operations(layer: Layer, setting: Setting) -> tuple[Operation, ...] | str:
    """What such a layer launches on one of `setting.tp` GPUs, for the plan; or why the kernels cannot run
    it."""
    from firebox.kernels import _attention, latent_write, rms_norm
    from firebox.kernels.plan import Library, Operation, Single
    from firebox.layers import dense_gpu

    p, gpu = layer.problem, setting.gpu
    p = dataclasses.replace(p, heads=p.heads // setting.tp, kv_dtype=setting.kv_dtype)
    backend = select_backend(p.heads, LatentSpec(p.latent_dim, p.rope_dim), gpu)
    why = refusal(layer, gpu, p, backend, setting.tp)
    if why is not None:
        return why
    dtype, kv = KERNEL_DTYPES[p.dtype], KERNEL_DTYPES[p.kv_dtype]
    first, *others = (Single("norm", dtype, rms_norm, norm) for norm in _norm_problems(layer, p))
    paged = _attention.Problem(
        p.heads, 1, p.latent_dim + p.rope_dim, p.latent_dim, setting.page_tokens, p.dtype, p.kv_dtype
    )
    inner = (layer.q_b.operation("q_b", setting),) if others else ()
    return (
        first,
        layer.q_and_kv_a.operation("q_and_kv_a", setting),
        *(dataclasses.replace(norm, name="q_norm") for norm in others),
        *inner,
        Library("key_half", dtype, dense_gpu, DENSE),
        Single("latent_write", kv, latent_write, _write_problem(layer, p)),
        Operation("attention", kv, backend, paged),
        *verified("attention", kv, backend, paged, setting),
        Library("value_half", dtype, dense_gpu, DENSE),
        layer.o.operation("o", setting),
    )


def _norm_problems(layer: Layer, p: Problem) -> Iterator[Any]:
    """Of the hidden states, then, if there are any, of compressed queries."""
    from firebox.kernels import rms_norm

    yield rms_norm.Problem(p.hidden, p.eps, dtype=KERNEL_DTYPES[p.dtype])
    if p.q_latent_dim is not None:
        yield rms_norm.Problem(p.q_latent_dim, layer.q_norm.eps, dtype=KERNEL_DTYPES[p.dtype])


def _write_problem(layer: Layer, p: Problem) -> Any:
    from firebox.kernels import latent_write

    return latent_write.Problem(
        p.heads, p.latent_dim, p.rope_dim, p.nope_dim, p.interleaved, layer.kv_norm.eps,
        KERNEL_DTYPES[p.dtype], KERNEL_DTYPES[p.kv_dtype],
    )  # fmt: skip


class LatentAttentionKernels:
    """See above; bound to a layer whose slots are filled."""

    def __init__(self, layer: Layer, build: Build) -> None:
        from firebox.kernels import latent_write, rms_norm

        p, device = layer.problem, build.shared
        assert device is not None
        self._layer, self._p = layer, p
        self._norms = [device.launcher(rms_norm, norm) for norm in _norm_problems(layer, p)]
        self._write = device.launcher(latent_write, _write_problem(layer, p))
        self._given = {"weight": layer.kv_norm.weight, "cos": layer.tables[0], "sin": layer.tables[1]}
        if p.kv_dtype == torch.float8_e4m3fn:
            assert layer.kv_scales is not None
            self._given["scales"] = layer.kv_scales

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden], which becomes the result; writes the step's latent rows to its cache."""
        from firebox.kernels import latent_write, rms_norm

        layer, p = self._layer, self._p
        assert layer.backend is not None
        cache, h, tokens = step.caches[layer.layer], torch.empty_like(x), x.shape[0]
        rms_norm.run(self._norms[0], x, layer.norm.weight, out=h)
        latent_rows = p.latent_dim + p.rope_dim
        first = layer.q_and_kv_a(h)
        queries, kv_a = first.split([first.shape[1] - latent_rows, latent_rows], dim=-1)
        if p.q_latent_dim is not None:
            normed = x.new_empty(tokens, p.q_latent_dim)
            rms_norm.run(self._norms[1], queries, layer.q_norm.weight, out=normed)
            queries = layer.q_b(normed)
        q = x.new_empty(tokens, p.heads, latent_rows)
        of_heads = queries.unflatten(-1, (p.heads, -1)).transpose(
            0, 1
        )  # [heads, tokens, nope_dim + rope_dim]
        absorbed = q.transpose(0, 1)[..., : p.latent_dim]
        torch.bmm(of_heads[..., : p.nope_dim], layer.key_half, out=absorbed)
        latent_write.run(
            self._write, kv_a, queries, q=q, cache=cache.k, positions=step.positions,
            token_slots=step.full.token_slots, **self._given,
        )  # fmt: skip
        attended = layer.backend.run(q, cache, step.full.attention, p.scale)  # [tokens, heads, latent_dim]
        values = x.new_empty(tokens, p.heads, layer.value_half.shape[1])
        torch.bmm(attended.transpose(0, 1), layer.value_half.transpose(1, 2), out=values.transpose(0, 1))
        return layer.o(values.flatten(1), x)
