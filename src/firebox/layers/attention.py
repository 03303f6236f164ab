"""A grouped-query attention layer with its norm and residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from firebox.attention.base import PagedSpec, WindowSpec
from firebox.attention.base import select as select_backend
from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.formats.kv.base import scale_slots
from firebox.kernels._blocks import ATTENTION_BLOCK, AttentionProblem
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers import attention_gpu
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotate
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting


class AttentionBlock:
    """x + o(attend(q, k, v)), with q, k, v from norm(x), q and k perhaps normed, then rotated by `tables`
    (cos and sin of `layers.rope`). `name`: the module's path, whose parts are q_proj … o_proj, q_norm, k_norm
    and sinks. `options`: fields of the Problem in kernels/cpu_attention_block.py, where they are explained.

    `layer` is the index of its cache in `step.caches`, `spec` what that cache keeps. `backend` plans each
    step for the layer composed of torch operators; None where one kernel does it all.
    """

    def __init__(
        self,
        build: Build,
        norm: RMSNorm,
        name: str,
        layer: int,
        spec: PagedSpec | WindowSpec,
        tables: tuple[torch.Tensor, torch.Tensor],
        *,
        norm_plus_one: bool = False,
        **options: Any,
    ) -> None:
        p = self.problem = AttentionProblem(
            hidden=norm.weight.shape[0],
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=2 * tables[0].shape[-1],
            eps=norm.eps,
            window_tokens=spec.window_tokens if isinstance(spec, WindowSpec) else None,
            dtype=build.dtype,
            kv_dtype=build.kv_dtype,
            **options,
        )
        self.layer, self.name, self.tables, self.norm, self.spec = layer, name, tables, norm, spec
        self._kv_rows = p.kv_heads * p.head_dim
        self._q_rows = p.heads * p.head_dim * (2 if p.output_gate else 1)
        rows = {"q_proj": self._q_rows, "k_proj": self._kv_rows, "v_proj": self._kv_rows}
        query = self._query_cut = Cut(0, p.heads, "num_attention_heads")
        kv = Cut(0, p.kv_heads, "num_key_value_heads", shared=True)
        parts = {f"{name}.{part}": n for part, n in rows.items()}
        self.qkv = Linear(build, p.hidden, parts, bias=p.bias, cuts=(query, kv, kv), normed=True)
        normed = {"": (0, 0), "head": (p.head_dim, p.head_dim), "row": (p.heads * p.head_dim, self._kv_rows)}[
            p.qk_norm
        ]
        over_heads = (query, kv) if p.qk_norm == "row" else (None, None)
        self.q_norm, self.k_norm = (
            RMSNorm(build, f"{name}.{part}", width, p.eps, plus_one=norm_plus_one, cut=cut)
            for part, width, cut in zip(("q_norm", "k_norm"), normed, over_heads, strict=True)
        )
        self.sinks = build.empty(p.heads) if p.sinks else None
        self.kv_scales = build.kv_scales()
        inwards = Cut(1, p.heads, "num_attention_heads")
        self.o = Linear(
            build,
            p.heads * p.head_dim,
            {f"{name}.o_proj": p.hidden},
            bias=p.o_bias,
            cuts=(inwards,),
            residual=True,
        )
        self._threads = build.threads
        self._run: Callable[[torch.Tensor, Step], torch.Tensor] = self._compose
        # a backend that is asked for by name runs inside the layer composed of torch operators
        wanted = "auto" if build.attention_backend == "auto" else TORCH
        self._choice = select(ATTENTION_BLOCK, p, build.gpu, wanted)
        self.backend: ModuleType | None = None
        if self._choice.kernel is None:
            self.backend = select_backend(p.heads, spec, build.gpu, build.attention_backend)
            self._choice = self._of_a_gpu(build, self.backend)
        build.choices.append(self._choice)
        self._build = build

    def _of_a_gpu(self, build: Build, backend: ModuleType) -> Choice:
        """The choice of torch operators, or of a GPU's kernels where they accept the layer."""
        if build.shared is None:
            return self._choice
        why_not = attention_gpu.refusal(build.gpu, self.problem, backend)
        if why_not is None and self.qkv.refusal is None and self.o.refusal is None:
            how = f"kernels of kernels/, {backend.__name__.rpartition('.')[2]}"
            return dataclasses.replace(
                self._choice, why=how, losers={TORCH: "slower"}, composed="attention_gpu"
            )
        losers = {"attention_gpu": why_not or self.qkv.refusal or self.o.refusal or ""}
        return dataclasses.replace(self._choice, losers=self._choice.losers | losers)

    @property
    def format(self) -> str:
        """Of the projections' weights; of several, all."""
        return " and ".join(sorted({self.qkv.format, self.o.format}))

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        return attention_gpu.operations(self, setting)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        return bool(self._choice.composed)

    def slots(self) -> Slots:
        """The norms' and projections' tensors, the sinks, and the cache's scales."""
        yield from self.norm.slots()
        yield from self.qkv.slots()
        if self.problem.qk_norm:
            yield from self.q_norm.slots()
            yield from self.k_norm.slots()
        if self.sinks is not None:
            yield PlainSlot(f"{self.name}.sinks", self.sinks, cut=self._query_cut)
        if self.kv_scales is not None:
            yield from scale_slots(self.name, self.kv_scales)
        yield from self.o.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        self.qkv.finish()
        self.o.finish()
        if self._choice.composed:
            self._run = attention_gpu.AttentionKernels(self, self._build)
        if self._choice.kernel is None:
            return
        cos, sin = self.tables
        weights = {
            "norm": self.norm.weight,
            "qkv": self.qkv.weight,
            "qkv_bias": self.norm.weight[:0] if self.qkv.bias is None else self.qkv.bias,
            "q_norm": self.q_norm.weight,
            "k_norm": self.k_norm.weight,
            "o": self.o.weight,
            "cos": cos,
            "sin": sin,
        }
        launch = self._choice.kernel.bind(self.problem, weights, self._threads)
        self._run = lambda x, step: launch(x, step, step.caches[self.layer])
        del self.norm, self.qkv, self.q_norm, self.k_norm, self.o

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape; writes the step's keys and values to its cache."""
        return self._run(x, step)

    def _compose(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        p = self.problem
        assert self.backend is not None
        q, k, v = self.qkv(self.norm(x)).split([self._q_rows, self._kv_rows, self._kv_rows], dim=-1)
        gate = None
        if p.output_gate:  # q_proj's rows: for each head its query, then its gate
            q, gate = (part.flatten(1) for part in q.unflatten(-1, (p.heads, -1)).chunk(2, dim=-1))
        if p.qk_norm == "row":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, p.head_dim)) for part in (q, k, v))  # [tokens, heads, head_dim]
        if p.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (table[step.positions].unsqueeze(1).to(x.dtype) for table in self.tables)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        pages = step.full if p.window_tokens is None else step.window
        assert pages is not None
        cache = step.caches[self.layer]
        cache.write(pages.token_slots, k, v)
        attended = self.backend.run(
            q, cache, pages.attention, p.head_dim**-0.5, window_tokens=p.window_tokens, sinks=self.sinks
        ).flatten(1)
        return self.o(attended if gate is None else attended * gate.sigmoid(), x)
