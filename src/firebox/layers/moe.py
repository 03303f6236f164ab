"""A mixture-of-experts layer with its norm and residual: router, routed experts, shared experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from firebox.errors import ConfigError
from firebox.formats.base import Cut, Format, OneOf, PlainSlot, Slot, Slots, WeightSlot
from firebox.kernels._blocks import MOE_BLOCK, MoeProblem
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers.base import Build
from firebox.layers.linear import INNER_UNIT, ONE_ROW, Linear, fitted
from firebox.layers.moe_names import MoeNames
from firebox.layers.norm import RMSNorm

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.moe_gpu import MoeKernels


ON_GPU = "moe_gpu"  # the file that composes such a layer of kernels


class MoeBlock:
    """x + Σ wⱼ · expertⱼ(h) + shared(h), h = norm(x). See kernels/cpu_moe_block.py for the formula and what
    `options` (fields of its Problem) mean.

    With `expert_groups` > 1 only the experts of the `kept_groups` best groups can be chosen, a group's score
    being the sum of its two best (DeepSeek-V3). `interleaved`: the fused layout is gpt-oss's, [experts, in,
    out] with gate and up rows in turn. `inter_key`: what config.json calls the experts' width.
    """

    def __init__(
        self,
        build: Build,
        norm: RMSNorm,
        names: MoeNames,
        *,
        kept_groups: int = 1,
        interleaved: bool = False,
        inter_key: str = "moe_intermediate_size",
        **options: Any,
    ) -> None:
        hidden = norm.weight.shape[0]
        p = self.problem = MoeProblem(hidden=hidden, eps=norm.eps, dtype=build.dtype, **options)
        self.norm, self.names = norm, names
        self.format_of, self.kept_groups, self._interleaved = build.format_of, kept_groups, interleaved
        unit = max(format.cut_unit(axis) for format in self.expert_formats for axis in (0, 1))
        self._rows, self._columns = (Cut(axis, p.inter, inter_key, unit=unit) for axis in (0, 1))
        self.requantises: Callable[[str], bool] = build.requantises
        self._kernels = self._of_a_gpu(build)
        self.router = build.empty(p.experts, p.hidden)
        self.router_bias = build.empty(p.experts if p.biases else 0)
        self.correction_bias = build.empty(p.experts if p.scoring == "sigmoid" else 0, dtype=torch.float32)
        experts = 0 if self._kernels else p.experts
        self.gate_up = build.empty(experts, 2 * p.inter, p.hidden)
        self.down = build.empty(experts, p.hidden, p.inter)
        self.gate_up_bias = build.empty(experts if p.biases else 0, 2 * p.inter)
        self.down_bias = build.empty(experts if p.biases else 0, p.hidden)
        wide = p.shared_experts * p.inter
        gate_up = {f"{names.shared}.{names.gate}": wide, f"{names.shared}.{names.up}": wide}
        label = inter_key if p.shared_experts == 1 else f"{p.shared_experts} · {inter_key}"
        rows, columns = (Cut(axis, wide, label) for axis in (0, 1))
        down = {f"{names.shared}.{names.down}": p.hidden}
        self.shared_gate_up = Linear(build, p.hidden, gate_up, cuts=(rows, rows), unit=INNER_UNIT)
        self.shared_down = Linear(build, wide, down, cuts=(columns,), unit=INNER_UNIT)
        shared_gate = {names.shared_gate: int(p.shared_gate)}
        self.shared_gate = Linear(build, p.hidden, shared_gate, requantisable=False, dense=ONE_ROW)
        self._build = build
        self._choice = self._chosen(build)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        build.choices.append(self._choice)

    def _of_a_gpu(self, build: Build) -> MoeKernels | None:
        """The kernels of a GPU, if there is one and they accept the layer; `self._why_not` otherwise."""
        p, names = self.problem, self.names
        self._why_not = None
        if build.shared is None:
            return None
        from firebox.layers import moe_gpu

        if build.moe_backend not in ("auto", ON_GPU, TORCH):
            raise ConfigError(
                f"no kernel {build.moe_backend!r} for experts", hint=f"there are: {ON_GPU}, {TORCH}"
            )
        self._why_not = moe_gpu.refusal(build.gpu, p, self.expert_formats)
        if self._why_not is not None and build.moe_backend == ON_GPU:
            raise ConfigError(f"{ON_GPU} cannot run these experts: {self._why_not}")
        if self._why_not is not None or build.moe_backend == TORCH:
            return None
        return moe_gpu.MoeKernels(build, p, names, self.kept_groups, (self._rows, self._columns))

    def inner_share(self, tp: int) -> int:
        """Columns of a routed expert that one of `tp` GPUs has at most, where the cut allows so many."""
        return self._rows.share(self.problem.inter, tp)

    @property
    def expert_formats(self) -> set[Format]:
        """Of the routed experts' matrices."""
        names = self.names
        if names.expert:
            parts = [f"{names.expert.format(e=0)}.{part}" for part in (names.gate, names.up, names.down)]
        else:
            parts = [f"{names.fused}.gate_up_proj", f"{names.fused}.down_proj"]
        return {self.format_of(path) for path in parts}

    def _chosen(self, build: Build) -> Choice:
        if build.shared is None:
            return select(MOE_BLOCK, self.problem, build.gpu, build.moe_backend)
        if self._kernels is not None:
            return Choice(MOE_BLOCK, None, "kernels of kernels/moe_*.py", {TORCH: "slower"}, ON_GPU)
        if build.moe_backend == TORCH:
            return Choice(MOE_BLOCK, None, "asked for", {ON_GPU: f"{TORCH} was asked for"})
        return Choice(MOE_BLOCK, None, "no kernel accepts", {ON_GPU: self._why_not or ""})

    @property
    def format(self) -> str:
        """Of the routed experts' weights; of several, all."""
        return " and ".join(sorted({format.name for format in self.expert_formats}))

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        from firebox.layers import moe_gpu

        return moe_gpu.operations(self, setting)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        return self._kernels is not None

    def slots(self) -> Slots:
        """The norm's tensor, the router's, the experts' one by one or all in one, and the shared experts'."""
        yield from self._router_slots()
        yield from self._kernels.slots(self._interleaved) if self._kernels else self.expert_slots()
        yield from self._shared_slots()

    def other_slots(self) -> Slots:
        """All but the routed experts', of a plan."""
        assert self._kernels is None, "a plan has no kernels"
        yield from self._router_slots()
        yield from self._shared_slots()

    def _router_slots(self) -> Slots:
        p, names = self.problem, self.names
        yield from self.norm.slots()
        yield PlainSlot(f"{names.router}.weight", self.router)
        if p.biases:
            yield PlainSlot(f"{names.router}.bias", self.router_bias)
        if p.scoring == "sigmoid":
            yield PlainSlot(names.correction_bias, self.correction_bias)

    def _shared_slots(self) -> Slots:
        p = self.problem
        if p.shared_experts and not (self._kernels and self._kernels.fused):
            yield from self.shared_gate_up.slots()
            yield from self.shared_down.slots()
        if p.shared_gate:
            yield from self.shared_gate.slots()

    def expert_slots(self) -> Slots:
        """The routed experts' tensors: of these a token reads top_k in `experts`."""
        if self._kernels is not None:
            yield from self._kernels.routed_slots(self._interleaved)
        elif self._interleaved:
            yield from self._gpt_oss()
        else:
            fused = (tuple(self._all_in_one()),) if self.names.fused else ()
            yield OneOf((tuple(self._one_by_one()), *fused))

    def counted_expert_slots(self) -> Iterator[tuple[Slot, int]]:
        """`expert_slots` of a plan, in their first layout: those of one of the experts whose formats are
        alike, and how many experts that are."""
        assert self._kernels is None, "a plan has no kernels"
        if self._interleaved:
            yield from ((slot, 1) for slot in self._gpt_oss())
            return
        names, alike = self.names, dict[tuple[Format, ...], list[int]]()
        for e in range(self.problem.experts):
            expert = names.expert.format(e=e)
            parts = (names.gate, names.up, names.down)
            alike.setdefault(tuple(self.format_of(f"{expert}.{part}") for part in parts), []).append(e)
        for experts in alike.values():
            yield from ((slot, len(experts)) for slot in self._of_expert(experts[0]))

    def _one_by_one(self) -> Iterator[Slot]:
        for e in range(self.problem.experts):
            yield from self._of_expert(e)

    def _of_expert(self, e: int) -> Iterator[Slot]:
        inter, names = self.problem.inter, self.names
        expert = names.expert.format(e=e)
        for part, target, cut in (
            (names.gate, self.gate_up[e, :inter], self._rows),
            (names.up, self.gate_up[e, inter:], self._rows),
            (names.down, self.down[e], self._columns),
        ):
            path = f"{expert}.{part}"
            yield WeightSlot(path, self.format_of(path), target, cut=cut)

    def _all_in_one(self) -> Iterator[Slot]:
        """Unquantised: [experts, 2 · inter, hidden], gate rows first, and [experts, hidden, inter]."""
        halves = dataclasses.replace(self._rows, runs=(self.problem.inter, self.problem.inter))
        yield PlainSlot(f"{self.names.fused}.gate_up_proj", self.gate_up, cut=halves)
        yield PlainSlot(f"{self.names.fused}.down_proj", self.down, cut=self._columns)

    def _gpt_oss(self) -> Iterator[Slot]:
        """Gate and up rows in turn; unquantised ones transposed, MXFP4 ones not, with their parts behind an
        underscore."""
        p, fused = self.problem, self.names.fused
        for part, target, bias, arrange, cut in (
            ("gate_up_proj", self.gate_up, self.gate_up_bias, _gate_then_up, self._rows),
            ("down_proj", self.down, self.down_bias, _as_it_is, self._columns),
        ):
            path = f"{fused}.{part}"
            format = self.format_of(path)
            if format.name != "bf16":
                yield WeightSlot(path, format, target, separator="_", arrange=arrange, cut=cut)
            else:
                stored = (p.experts, target.shape[2], target.shape[1])
                yield PlainSlot(path, target, stored, partial(_transposed, arrange), cut=cut)
            along = cut if cut.axis == 0 else None
            numbers = partial(_each_number, arrange)
            yield PlainSlot(f"{path}_bias", bias, tuple(bias.shape), numbers, cut=along)

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy, with the shared experts behind the routed ones, replaces
        the weights."""
        shared = (self.shared_gate_up, self.shared_down, self.shared_gate)
        for linear in shared:
            linear.finish()
        if self._kernels is not None:
            self._kernels.finish(self.norm, self._router(), self.correction_bias, shared)
            self._run = self._kernels
        if self._choice.kernel is None:
            return
        p = self.problem
        # a shared MLP of n experts' width is n experts that every token takes
        shared_gate_up = self.shared_gate_up.weight.view(2, p.shared_experts, p.inter, p.hidden)
        shared_down = self.shared_down.weight.view(p.hidden, p.shared_experts, p.inter)
        weights = {
            "norm": self.norm.weight,
            "router": self.router,
            "correction_bias": self.correction_bias,
            "gate_up": torch.cat((self.gate_up, shared_gate_up.transpose(0, 1).flatten(1, 2))),
            "down": torch.cat((self.down, shared_down.transpose(0, 1))),
        }
        self._run = self._choice.kernel.bind(p, weights, self._threads)
        del self.norm, self.router, self.correction_bias, self.gate_up, self.down
        del self.shared_gate_up, self.shared_down

    def _router(self) -> Linear:
        """The router as a layer of kernels, with float32 logits."""
        p = self.problem
        router = Linear(
            self._build, p.hidden, {self.names.router: p.experts}, bias=p.biases, out_dtype=torch.float32
        )
        router.bias = self.router_bias if p.biases else None
        router.tie(self.router)
        return router

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        return self._run(x)

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        p = self.problem
        h = self.norm(x)
        expert_ids, weights = self._route(h)
        out = x.to(torch.float32, copy=True)
        for e in expert_ids.unique().tolist():
            token, choice = torch.where(expert_ids == e)
            gate_up = F.linear(h[token], self.gate_up[e], self.gate_up_bias[e] if p.biases else None)
            y = F.linear(self._activate(gate_up), self.down[e], self.down_bias[e] if p.biases else None)
            out.index_add_(0, token, y.float() * weights[token, choice].unsqueeze(-1))
        if p.shared_experts:
            shared = self.shared_down(fitted(self._activate(self.shared_gate_up(h)), self.shared_down))
            out += shared * self.shared_gate(h).sigmoid() if p.shared_gate else shared
        return out.to(x.dtype)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        p = self.problem
        gate, up = gate_up.chunk(2, dim=-1)
        if p.activation == "silu_mul":
            return F.silu(gate) * up
        assert p.activation == "clamped_swiglu", p.activation
        gate, up = gate.clamp(max=p.limit), up.clamp(-p.limit, p.limit)
        return (up + 1) * gate * (gate * p.alpha).sigmoid()

    def _route(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both [tokens, top_k]; float32."""
        p = self.problem
        logits = F.linear(h.float(), self.router.float(), self.router_bias.float() if p.biases else None)
        if p.scoring == "softmax_top_k":
            chosen, expert_ids = logits.topk(p.top_k, dim=-1)
            return expert_ids, chosen.softmax(-1) * p.routed_scale
        scores = logits.sigmoid() if p.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores + self.correction_bias if p.scoring == "sigmoid" else scores
        if p.expert_groups > 1:
            groups = choice.unflatten(-1, (p.expert_groups, -1))  # [tokens, groups, experts per group]
            best = groups.topk(2, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1).indices
            keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = groups.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(1)
        expert_ids = choice.topk(p.top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        if p.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return expert_ids, weights * p.routed_scale


Arrange = Callable[[torch.Tensor], torch.Tensor]  # of rows [..., rows, n]


def _transposed(arrange: Arrange, stored: torch.Tensor) -> torch.Tensor:
    return arrange(stored.transpose(1, 2))


def _each_number(arrange: Arrange, bias: torch.Tensor) -> torch.Tensor:
    return arrange(bias.unsqueeze(-1)).squeeze(-1)


def _gate_then_up(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [..., 2 · inter, n], gate and up in turn → all gate rows, then all up rows."""
    return torch.cat((rows[..., ::2, :], rows[..., 1::2, :]), dim=-2)


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    return rows
