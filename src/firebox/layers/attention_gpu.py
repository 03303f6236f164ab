"""A grouped-query attention layer on an NVIDIA GPU, from residual stream to residual stream:

    rms_norm → linear (q, k, v) → rope_write → attention/triton_paged → (sigmoid_mul) → linear, which adds x

Where every request has one query, rope_write and attention may be one launch (rope_decode_gpu.py), and for
one token the norm and the linear layer behind it (norm_linear_gpu.py). Weights stay in their format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from firebox.attention.base import PagedSpec, WindowSpec
from firebox.attention.base import select as select_backend
from firebox.hardware.base import Gpu
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.step import Pages, Step

if TYPE_CHECKING:
    from firebox.kernels.cpu_attention_block import Problem
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.linear import Linear
    from firebox.layers.norm import RMSNorm


class Layer(Protocol):
    """What is read of a layers.attention.AttentionBlock."""

    problem: Problem
    spec: PagedSpec | WindowSpec
    layer: int
    norm: RMSNorm
    q_norm: RMSNorm
    k_norm: RMSNorm
    qkv: Linear
    o: Linear
    tables: tuple[torch.Tensor, torch.Tensor]
    sinks: torch.Tensor | None
    kv_scales: torch.Tensor | None
    backend: ModuleType | None


def refusal(gpu: Gpu, p: Problem, backend: ModuleType) -> str | None:
    """Why the kernels of `gpu` cannot run such a layer, or None."""
    if p.dtype not in KERNEL_DTYPES or p.kv_dtype not in (p.dtype, torch.float8_e4m3fn):
        return f"computes in bfloat16 over a cache in bfloat16 or FP8, not {p.dtype} and {p.kv_dtype}"
    if not backend.__name__.endswith("triton_paged"):
        return f"attends with triton_paged, not with {backend.__name__.rpartition('.')[2]}"
    from firebox.kernels import rms_norm, rope_write

    why = rms_norm.accepts(_norm_problem(p), gpu)
    return why or rope_write.accepts(_rope_problem(p), gpu)


def operations(layer: Layer, setting: Setting) -> tuple[Operation, ...] | str:
    """What such a layer launches on one of `setting.tp` GPUs, for the plan; or why the kernels cannot run
    it."""
    from firebox.kernels import rope_write, sigmoid_mul
    from firebox.kernels.plan import Operation, Single
    from firebox.layers import norm_gpu, norm_linear_gpu, rope_decode_gpu

    gpu, tp, p = setting.gpu, setting.tp, layer.problem
    shared = max(1, p.kv_heads // tp)
    p = dataclasses.replace(p, heads=p.heads // tp, kv_heads=shared, kv_dtype=setting.kv_dtype)
    backend = select_backend(p.heads, dataclasses.replace(layer.spec, kv_heads=shared), gpu)
    why = refusal(gpu, p, backend) or layer.qkv.refused(gpu, tp) or layer.o.refused(gpu, tp)
    if why is not None:
        return why
    dtype, kv = KERNEL_DTYPES[p.dtype], KERNEL_DTYPES[p.kv_dtype]
    gate = (Single("gate", dtype, sigmoid_mul, _gate_problem(p)),) if p.output_gate else ()
    paged = _paged_problem(p, setting.page_tokens)
    both = _rope_decode_problem(p, setting.page_tokens, gpu)
    in_one = (Operation("rope_attention", kv, rope_decode_gpu, both),) if both else ()
    qkv = layer.qkv.problem(tp)
    projects = _norm_linear_problem(p, qkv, gpu)
    return (
        *((Operation("norm_qkv", qkv.format, norm_linear_gpu, projects),) if projects else ()),
        Operation("norm", dtype, norm_gpu, norm_gpu.Problem(_norm_problem(p), (qkv,))),
        layer.qkv.operation("qkv", setting),
        *in_one,
        Single("rope_write", kv, rope_write, _rope_problem(p)),
        Operation("attention", kv, backend, paged),
        *verified("attention", kv, backend, paged, setting),
        *gate,
        layer.o.operation("o", setting),
    )


def verified(
    name: str, format: str, backend: Any, problem: Any, setting: Setting
) -> Iterator[Operation]:  # fmt: skip
    """With drafts: the same attention for steps whose requests have trees of tokens."""
    from firebox.kernels.plan import Operation

    if setting.drafts:
        yield Operation(f"{name} with drafts", format, backend, dataclasses.replace(problem, tree=True))


def _gate_problem(p: Problem) -> Any:
    from firebox.kernels import sigmoid_mul

    return sigmoid_mul.Problem(p.heads, p.head_dim, dtype=KERNEL_DTYPES[p.dtype])


def _paged_problem(p: Problem, page_tokens: int) -> Any:
    """As the backend makes it of a step's tensors."""
    from firebox.kernels import _attention

    return _attention.Problem(
        p.heads, p.kv_heads, p.head_dim, p.head_dim, page_tokens, p.dtype, p.kv_dtype,
        window=p.window_tokens is not None, sinks=p.dtype if p.sinks else None,
    )  # fmt: skip


def _norm_problem(p: Problem) -> Any:
    from firebox.kernels import rms_norm

    return rms_norm.Problem(p.hidden, p.eps, dtype=KERNEL_DTYPES[p.dtype])


def _norm_linear_problem(p: Problem, qkv: Any, gpu: Gpu) -> Any:
    """None where the two are not one launch."""
    from firebox.layers import norm_gpu, norm_linear_gpu

    both = norm_linear_gpu.Problem(norm_gpu.Problem(_norm_problem(p), (qkv,)), qkv)
    return None if norm_linear_gpu.accepts(both, gpu) else both


def _rope_problem(p: Problem) -> Any:
    from firebox.kernels import rope_write

    return rope_write.Problem(
        p.heads, p.kv_heads, p.head_dim, p.rotary_dim, p.qk_norm, p.eps, p.output_gate,
        KERNEL_DTYPES[p.dtype], KERNEL_DTYPES[p.kv_dtype],
    )  # fmt: skip


def _rope_decode_problem(p: Problem, page_tokens: int, gpu: Gpu) -> Any:
    """None where the two are not one launch."""
    from firebox.kernels import attention_rope_decode

    both = attention_rope_decode.Problem(_rope_problem(p), _paged_problem(p, page_tokens))
    return None if attention_rope_decode.accepts(both, gpu) else both


class AttentionKernels:
    """See above; bound to a layer whose slots are filled."""

    def __init__(self, layer: Layer, build: Build) -> None:
        from firebox.kernels import rope_write, sigmoid_mul
        from firebox.layers import norm_gpu

        p, device = layer.problem, build.shared
        assert device is not None
        self._layer, self._p, self._gpu = layer, p, build.gpu
        qkv = layer.qkv.problem()
        self._norm = norm_gpu.NormKernels(norm_gpu.Problem(_norm_problem(p), (qkv,)), build.gpu)
        self._projects = _norm_linear_problem(p, qkv, build.gpu)
        self._rope = device.launcher(rope_write, _rope_problem(p))
        self._given = {"cos": layer.tables[0], "sin": layer.tables[1]}
        if p.qk_norm:
            self._given |= {"q_weight": layer.q_norm.weight, "k_weight": layer.k_norm.weight}
        if p.kv_dtype == torch.float8_e4m3fn:
            assert layer.kv_scales is not None
            self._given["scales"] = layer.kv_scales
        if p.output_gate:
            self._gate = device.launcher(sigmoid_mul, _gate_problem(p))
        self._in_one = functools.cache(functools.partial(_rope_decode_problem, p, gpu=build.gpu))

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden], which becomes the result."""
        from firebox.kernels import sigmoid_mul

        layer, p = self._layer, self._p
        pages = step.full if p.window_tokens is None else step.window
        assert pages is not None
        qkv = self._projected(x)
        attended = self._attended(qkv, step, pages).flatten(1)
        if p.output_gate:
            gated = torch.empty_like(attended)
            sigmoid_mul.run(self._gate, attended, qkv, out=gated)
            attended = gated
        return layer.o(attended, x)

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values [tokens, columns] of the normed rows."""
        from firebox.layers import norm_linear_gpu

        layer, both = self._layer, self._projects
        if both is not None:
            config = norm_linear_gpu.config_of(both, self._gpu, len(x))
            if config is not None:
                return norm_linear_gpu.run(both, config, self._gpu, x, layer.norm.weight, layer.qkv.weights)
        h, codes = self._norm(x, layer.norm.weight)
        return layer.qkv(h, codes=codes)

    def _attended(self, qkv: torch.Tensor, step: Step, pages: Pages) -> torch.Tensor:
        """[tokens, heads, head_dim]; the tokens' keys and values are then in the cache."""
        from firebox.kernels import rope_write
        from firebox.layers import rope_decode_gpu

        layer, p, scale = self._layer, self._p, self._p.head_dim**-0.5
        assert layer.backend is not None
        cache, window_tokens, sinks = step.caches[layer.layer], p.window_tokens, layer.sinks
        given = {**self._given, "positions": step.positions, "token_slots": pages.token_slots}
        both = self._in_one(cache.k.shape[1])
        if both is not None and pages.attention.single:
            config = rope_decode_gpu.config_of(both, self._gpu, len(qkv))
            if config is not None:
                return rope_decode_gpu.run(
                    both, config, self._gpu, qkv, cache, pages.attention, scale,
                    window_tokens=window_tokens, sinks=sinks, **given,
                )  # fmt: skip
        q = qkv.new_empty(len(qkv), p.heads, p.head_dim)
        rope_write.run(self._rope, qkv, q=q, k_cache=cache.k, v_cache=cache.v, **given)
        attended: torch.Tensor = layer.backend.run(
            q, cache, pages.attention, scale, window_tokens=window_tokens, sinks=sinks
        )
        return attended
