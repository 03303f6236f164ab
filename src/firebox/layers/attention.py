"""A grouped-query attention layer with its norm and residual."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from firebox.attention.base import PagedSpec
from firebox.attention.base import select as select_backend
from firebox.formats.base import Slots
from firebox.kernels import cpu_attention_block
from firebox.kernels.cpu_attention_block import Problem
from firebox.kernels.select import TORCH, select
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotate
from firebox.step import Step


class AttentionBlock:
    """x + o(attend(q, k, v)), with q, k, v from norm(x), q and k normed per head where `qk_norm`, then
    rotated by `tables` (cos and sin of `layers.rope.rotary_tables`).

    `layer` is the index of its cache in `step.caches`, `spec` what that cache keeps. `backend` plans each
    step for the layer composed of torch operators; None where one kernel does it all.
    """

    def __init__(
        self,
        build: Build,
        layer: int,
        spec: PagedSpec,
        tables: tuple[torch.Tensor, torch.Tensor],
        *,
        hidden: int,
        heads: int,
        qk_norm: bool,
        bias: bool,
        eps: float,
    ) -> None:
        p = self.problem = Problem(
            hidden=hidden,
            heads=heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=2 * tables[0].shape[-1],
            qk_norm=qk_norm,
            bias=bias,
            eps=eps,
            dtype=build.dtype,
            kv_dtype=build.kv_dtype,
        )
        q_rows, kv_rows = p.heads * p.head_dim, p.kv_heads * p.head_dim
        self.layer = layer
        self.norm = RMSNorm(build, p.hidden, p.eps)
        self.qkv = Linear(
            build, p.hidden, {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}, bias=p.bias
        )
        self.q_norm = RMSNorm(build, p.head_dim if p.qk_norm else 0, p.eps)
        self.k_norm = RMSNorm(build, p.head_dim if p.qk_norm else 0, p.eps)
        self.o = Linear(build, q_rows, {"o_proj": p.hidden})
        self.tables = tables
        self._threads = build.threads
        self._run: Callable[[torch.Tensor, Step], torch.Tensor] = self._compose
        # a backend that is asked for by name runs inside the layer composed of torch operators
        wanted = "auto" if build.attention_backend == "auto" else TORCH
        self._choice = select(cpu_attention_block.OP, p, build.gpu, wanted)
        build.choices.append(self._choice)
        self.backend: ModuleType | None = None
        if self._choice.kernel is None:
            self.backend = select_backend(p.heads, spec, build.gpu, build.attention_backend)

    def slots(self, norm: str, attention: str) -> Slots:
        """The norm's tensor and `{attention}.q_proj` … `.o_proj`, `.q_norm`, `.k_norm`."""
        yield from self.norm.slots(norm)
        yield from self.qkv.slots(f"{attention}.")
        if self.problem.qk_norm:
            yield from self.q_norm.slots(f"{attention}.q_norm")
            yield from self.k_norm.slots(f"{attention}.k_norm")
        yield from self.o.slots(f"{attention}.")

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
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
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, p.head_dim))
        q, k, v = qkv.split([p.heads, p.kv_heads, p.kv_heads], dim=1)  # [tokens, heads, head_dim]
        if p.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (table[step.positions].unsqueeze(1).to(x.dtype) for table in self.tables)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache = step.caches[self.layer]
        cache.write(step.token_slots, k, v)
        attended = self.backend.run(q, cache, step.attention, p.head_dim**-0.5)
        return x + self.o(attended.flatten(1))
