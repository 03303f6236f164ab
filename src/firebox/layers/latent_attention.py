"""A multi-head latent attention layer (MLA: DeepSeek-V2, arXiv:2405.04434) with its norm and residual, in the
absorbed form.

Per token the cache keeps one row: the compressed keys and values c = norm(kv_a · h), and the rotated part r
of the key, which all heads share. A head's key is (W_k · c, r) and its value W_v · c, where W_k and W_v are
the two halves of kv_b_proj for that head; neither is ever computed, because

    q_nope · (W_k · c_j) = (W_kᵀ · q_nope) · c_j    and    Σ_j a_j · (W_v · c_j) = W_v · (Σ_j a_j · c_j)

so attention runs over the cached rows themselves: one key head of latent_dim + rope_dim for all query heads,
its first latent_dim values being the value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from firebox.attention.base import LatentSpec
from firebox.attention.base import select as select_backend
from firebox.formats.base import Cut, Slots
from firebox.formats.kv.base import scale_slots
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers import latent_attention_gpu
from firebox.layers.base import Build
from firebox.layers.latent_attention_gpu import Problem
from firebox.layers.linear import DENSE, Linear
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotate, rotate_pairs
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting

OP = "latent_attention_block"
LATENT_EPS = 1e-6  # of both inner norms, whatever config.json's rms_norm_eps is: the papers' code says so


class LatentAttentionBlock:
    """x + o(attend(q, c, r)). `name`: the module's path, whose parts are q_proj, or q_a_proj, q_a_layernorm
    and q_b_proj; kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj; o_proj. `tables`: cos and sin of layers.rope.
    `layer` is the index of its cache in `step.caches`, `spec` what that cache keeps.
    """

    def __init__(
        self,
        build: Build,
        norm: RMSNorm,
        name: str,
        layer: int,
        spec: LatentSpec,
        tables: tuple[torch.Tensor, torch.Tensor],
        *,
        heads: int,
        nope_dim: int,
        value_dim: int,
        q_latent_dim: int | None,
        scale: float,
        interleaved: bool,
    ) -> None:
        p = self.problem = Problem(
            hidden=norm.weight.shape[0],
            heads=heads,
            latent_dim=spec.latent_dim,
            rope_dim=spec.rope_dim,
            nope_dim=nope_dim,
            value_dim=value_dim,
            q_latent_dim=q_latent_dim,
            scale=scale,
            interleaved=interleaved,
            eps=norm.eps,
            dtype=build.dtype,
            kv_dtype=build.kv_dtype,
        )
        self.layer, self.name, self.tables, self.norm = layer, name, tables, norm
        self.kv_scales = build.kv_scales()
        self._q_rows = heads * (nope_dim + spec.rope_dim)
        first = (
            {f"{name}.q_proj": self._q_rows} if q_latent_dim is None else {f"{name}.q_a_proj": q_latent_dim}
        )
        kv_rows = spec.latent_dim + spec.rope_dim
        by_head, inwards = (Cut(axis, heads, "num_attention_heads") for axis in (0, 1))
        parts = {**first, f"{name}.kv_a_proj_with_mqa": kv_rows}  # every rank has the latent rows whole
        self.q_and_kv_a = Linear(
            build, p.hidden, parts, cuts=(by_head if q_latent_dim is None else None, None)
        )
        self.q_norm = RMSNorm(build, f"{name}.q_a_layernorm", q_latent_dim or 0, LATENT_EPS)
        q_b_rows = self._q_rows if q_latent_dim else 0
        self.q_b = Linear(build, q_latent_dim or 0, {f"{name}.q_b_proj": q_b_rows}, cuts=(by_head,))
        self.kv_norm = RMSNorm(build, f"{name}.kv_a_layernorm", spec.latent_dim, LATENT_EPS)
        kv_b = {f"{name}.kv_b_proj": heads * (nope_dim + value_dim)}
        self.kv_b = Linear(build, spec.latent_dim, kv_b, cuts=(by_head,), dense=DENSE)
        self.o = Linear(
            build, heads * value_dim, {f"{name}.o_proj": p.hidden}, cuts=(inwards,), residual=True
        )
        wanted = "auto" if build.attention_backend == "auto" else TORCH
        backend = select_backend(heads, spec, build.gpu, build.attention_backend)
        self.backend: ModuleType | None = backend
        self._build = build
        self._run: Callable[[torch.Tensor, Step], torch.Tensor] = self._compose
        self._choice = self._of_a_gpu(build, backend, select(OP, p, build.gpu, wanted))
        build.choices.append(self._choice)

    def _of_a_gpu(self, build: Build, backend: ModuleType, choice: Choice) -> Choice:
        """The choice of torch operators, or of a GPU's kernels where they accept the layer."""
        if build.shared is None:
            return choice
        why_not = latent_attention_gpu.refusal(self, build.gpu, self.problem, backend)
        if why_not is not None:
            return dataclasses.replace(choice, losers=choice.losers | {"latent_attention_gpu": why_not})
        how = f"kernels of kernels/, {backend.__name__.rpartition('.')[2]}"
        return dataclasses.replace(choice, why=how, losers={TORCH: "slower"}, composed="latent_attention_gpu")

    @property
    def format(self) -> str:
        """Of the projections' weights; of several, all."""
        return " and ".join(sorted({self.q_and_kv_a.format, self.q_b.format, self.o.format}))

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        return latent_attention_gpu.operations(self, setting)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        return bool(self._choice.composed)

    def slots(self) -> Slots:
        """The norms' and projections' tensors, and the scale of the cached rows."""
        yield from self.norm.slots()
        if self.kv_scales is not None:
            yield from scale_slots(self.name, self.kv_scales, values=False)
        yield from self.q_and_kv_a.slots()
        if self.problem.q_latent_dim is not None:
            yield from self.q_norm.slots()
            yield from self.q_b.slots()
        yield from self.kv_norm.slots()
        yield from self.kv_b.slots()
        yield from self.o.slots()

    def finish(self) -> None:
        """Splits kv_b_proj, whatever format it was stored in, into each head's key and value halves."""
        p = self.problem
        for linear in (self.q_and_kv_a, self.q_b, self.o):
            linear.finish()
        heads = self.kv_b.weight.view(p.heads, p.nope_dim + p.value_dim, p.latent_dim)
        self.key_half, self.value_half = heads.split([p.nope_dim, p.value_dim], dim=1)
        del self.kv_b
        if self._choice.composed:
            self._run = latent_attention_gpu.LatentAttentionKernels(self, self._build)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape; writes the step's latent rows to its cache."""
        return self._run(x, step)

    def _compose(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        p = self.problem
        assert self.backend is not None
        q, latent, k_rope = self.q_and_kv_a(self.norm(x)).split(
            [p.q_latent_dim or self._q_rows, p.latent_dim, p.rope_dim], dim=-1
        )
        if p.q_latent_dim is not None:
            q = self.q_b(self.q_norm(q))
        q_nope, q_rope = q.unflatten(-1, (p.heads, -1)).split([p.nope_dim, p.rope_dim], dim=-1)
        cos, sin = (table[step.positions].unsqueeze(1).to(x.dtype) for table in self.tables)
        turn = rotate_pairs if p.interleaved else rotate
        q_latent = (q_nope.transpose(0, 1) @ self.key_half).transpose(0, 1)  # [tokens, heads, latent_dim]
        q = torch.cat((q_latent, turn(q_rope, cos, sin)), dim=-1)
        row = torch.cat((self.kv_norm(latent).unsqueeze(1), turn(k_rope.unsqueeze(1), cos, sin)), dim=-1)
        cache = step.caches[self.layer]
        cache.write(step.full.token_slots, row)
        attended = self.backend.run(q, cache, step.full.attention, p.scale)  # [tokens, heads, latent_dim]
        values = (attended.transpose(0, 1) @ self.value_half.transpose(1, 2)).transpose(0, 1)
        return self.o(values.flatten(1), x)
