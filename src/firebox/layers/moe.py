"""A mixture-of-experts layer with its norm and residual: router, routed experts, shared experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from firebox.formats.base import Slot, Slots
from firebox.kernels import cpu_moe_block
from firebox.kernels.cpu_moe_block import Problem
from firebox.kernels.select import select
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm


class MoeBlock:
    """x + Σ wⱼ · expertⱼ(h) + shared(h), h = norm(x). See kernels/cpu_moe_block.py for the formula and the
    sizes' meaning.

    With `expert_groups` > 1 only the experts of the `kept_groups` best groups can be chosen, a group's score
    being the sum of its two best (DeepSeek-V3).
    """

    def __init__(
        self,
        build: Build,
        *,
        hidden: int,
        inter: int,
        experts: int,
        top_k: int,
        shared_experts: int,
        scoring: str,
        renormalise: bool,
        routed_scale: float,
        eps: float,
        expert_groups: int = 1,
        kept_groups: int = 1,
    ) -> None:
        p = self.problem = Problem(
            hidden=hidden,
            inter=inter,
            experts=experts,
            top_k=top_k,
            shared_experts=shared_experts,
            scoring=scoring,
            renormalise=renormalise,
            routed_scale=routed_scale,
            eps=eps,
            expert_groups=expert_groups,
            dtype=build.dtype,
        )
        self.norm = RMSNorm(build, p.hidden, p.eps)
        self.router = build.empty(p.experts, p.hidden)
        self.correction_bias = build.empty(p.experts if p.scoring == "sigmoid" else 0, dtype=torch.float32)
        self.gate_up = build.empty(p.experts, 2 * p.inter, p.hidden)
        self.down = build.empty(p.experts, p.hidden, p.inter)
        wide = p.shared_experts * p.inter
        self.shared_gate_up = Linear(build, p.hidden, {"gate_proj": wide, "up_proj": wide})
        self.shared_down = Linear(build, wide, {"down_proj": p.hidden})
        self._kept_groups = kept_groups
        self._choice = select(cpu_moe_block.OP, p, build.gpu, build.moe_backend)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        build.choices.append(self._choice)

    def slots(self, norm: str, mlp: str) -> Slots:
        """The norm's tensor, `{mlp}.gate`, one gate, up and down per expert, and `{mlp}.shared_experts`."""
        p = self.problem
        yield from self.norm.slots(norm)
        yield Slot(f"{mlp}.gate.weight", self.router)
        if p.scoring == "sigmoid":
            yield Slot(f"{mlp}.gate.e_score_correction_bias", self.correction_bias)
        for e in range(p.experts):
            yield Slot(f"{mlp}.experts.{e}.gate_proj.weight", self.gate_up[e, : p.inter])
            yield Slot(f"{mlp}.experts.{e}.up_proj.weight", self.gate_up[e, p.inter :])
            yield Slot(f"{mlp}.experts.{e}.down_proj.weight", self.down[e])
        if p.shared_experts:
            yield from self.shared_gate_up.slots(f"{mlp}.shared_experts.")
            yield from self.shared_down.slots(f"{mlp}.shared_experts.")

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy, with the shared experts behind the routed ones, replaces
        the weights."""
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
        del (
            self.norm,
            self.router,
            self.correction_bias,
            self.gate_up,
            self.down,
            self.shared_gate_up,
            self.shared_down,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        return self._run(x)

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        expert_ids, weights = self._route(h)
        out = x.to(torch.float32, copy=True)
        for e in expert_ids.unique().tolist():
            token, choice = torch.where(expert_ids == e)
            gate, up = F.linear(h[token], self.gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[e])
            out.index_add_(0, token, y.float() * weights[token, choice].unsqueeze(-1))
        if self.problem.shared_experts:
            gate, up = self.shared_gate_up(h).chunk(2, dim=-1)
            out += self.shared_down(F.silu(gate) * up)
        return out.to(x.dtype)

    def _route(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both [tokens, top_k]; float32."""
        p = self.problem
        logits = F.linear(h.float(), self.router.float())
        scores = logits.sigmoid() if p.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores + self.correction_bias if p.scoring == "sigmoid" else scores
        if p.expert_groups > 1:
            groups = choice.unflatten(-1, (p.expert_groups, -1))  # [tokens, groups, experts per group]
            best = groups.topk(2, dim=-1).values.sum(-1).topk(self._kept_groups, dim=-1).indices
            keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = groups.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(1)
        expert_ids = choice.topk(p.top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        if p.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return expert_ids, weights * p.routed_scale
