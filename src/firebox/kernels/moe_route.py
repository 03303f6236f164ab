"""Chooses each token's experts from the router's logits, and their weights:

    scores = softmax(l) or sigmoid(l);  choice = scores + correction_bias (sigmoid)
    experts outside the kept_groups best groups are out; a group's score is the sum of its two best choices
    ids = the top_k largest choices, largest first;  w = scores[ids], / (Σ w + 10⁻²⁰) if asked, · routed_scale

"softmax_top_k": w = softmax over the chosen logits, · routed_scale. logits [tokens, experts] float32;
correction_bias [experts] float32; expert_ids [tokens, top_k + shared] int32, routing_weights the same shape,
float32. Shared experts are the last choices, numbers `experts` and up, with weight 1 or sigmoid(gate_t), gate
[tokens] float32.

Among equal choices, and equal groups, the lower number wins (torch.topk leaves that open). A softmax is
monotone, so it is the logits that are compared: two that differ always differ, also where their scores round
to the same number. NaN counts as the largest; no number is chosen twice.

One warp a token. A choice becomes an integer that sorts like it, and top_k times the largest one and the
first number that has it are found, each with one instruction across the warp (redux).

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_route"
SCORINGS = ("softmax_top_k", "softmax", "sigmoid")
TAKEN = tl.constexpr(-(2**31))  # below every choice's integer


@dataclass(frozen=True)
class Problem:
    """As kernels/cpu_moe_block.py's, and `kept_groups` of `expert_groups`. `shared`: shared experts that are
    appended; `shared_gate`: their weight is a sigmoid."""

    experts: int
    top_k: int
    scoring: str
    renormalise: bool = True
    routed_scale: float = 1.0
    expert_groups: int = 1
    kept_groups: int = 1
    shared: int = 0
    shared_gate: bool = False

    @property
    def choices(self) -> int:
        """Experts a token goes to, shared ones included."""
        return self.top_k + self.shared


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs, up to 1,024 experts and 32 choices."""
    p = problem
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if p.scoring not in SCORINGS:
        return f"knows no scoring {p.scoring!r}; it knows {', '.join(SCORINGS)}"
    if p.experts > 1024 or p.choices > 32:
        return f"routes to up to 32 of 1,024 experts, not {p.choices} of {p.experts}"
    if p.experts % p.expert_groups or (p.expert_groups > 1 and p.experts // p.expert_groups < 2):
        return f"needs groups of equal size, 2 or more: {p.experts} experts in {p.expert_groups} groups"
    if p.top_k > p.experts // p.expert_groups * p.kept_groups or p.kept_groups > p.expert_groups:
        return f"cannot choose {p.top_k} of {p.kept_groups} in {p.expert_groups} groups of {p.experts}"
    if p.expert_groups > 1 and p.scoring == "softmax_top_k":
        return "chooses by groups from scores of all experts only, not with softmax_top_k"
    return None


# ---- 2. the device code


@triton.jit
def sortable(x):
    """float32 → int32 in the same order; −0 as 0, NaN above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 2147483647))


@triton.jit
def unsortable(key):
    """The inverse of `sortable`; NaN stays NaN."""
    return (key ^ ((key >> 31) & 2147483647)).to(tl.float32, bitcast=True)


@triton.jit
def first_largest(key, number, NONE: tl.constexpr):
    """The largest `key` along the last axis, and the least `number` that has it."""
    axis: tl.constexpr = len(key.shape) - 1
    largest = tl.max(key, axis, keep_dims=True)
    return largest, tl.min(tl.where(key == largest, number, NONE), axis, keep_dims=True)


@triton.jit
def _best_groups(choice, there, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """`choice` [copies, GROUPS padded, SIZE] → which groups may be chosen from [copies, GROUPS padded, 1]."""
    member = tl.arange(0, choice.shape[2])[None, None, :]
    key = tl.where(there, sortable(choice), TAKEN)
    first, at = first_largest(key, member, choice.shape[2])
    second = tl.max(tl.where(member == at, TAKEN, key), 2, keep_dims=True)
    score = tl.sum(unsortable(first) + unsortable(second), 2)  # of one item: drops the axis
    group = tl.arange(0, choice.shape[1])[None, :]
    left = tl.where(group < GROUPS, sortable(score), TAKEN)
    kept = group < 0
    for _ in tl.static_range(KEPT):
        _, best = first_largest(left, group, choice.shape[1])
        kept = kept | (group == best)
        left = tl.where(group == best, TAKEN, left)
    return kept[:, :, None]


@triton.jit
def choose(
    logits, bias, expert, there,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, SCORING: tl.constexpr, RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """`logits` [copies, groups, size], the last two padded to powers of two; `expert` the number of each,
    `there` which are real, `bias` the same shape, or None. Without groups (GROUPS 1) experts may be divided
    among these axes in any way. Chosen numbers and their weights [copies, WIDTH], those from TOP_K on
    undefined."""
    COPIES: tl.constexpr = logits.shape[0]
    PADDED: tl.constexpr = logits.shape[1] * logits.shape[2]
    choice = logits
    total = 1.0
    if SCORING == "sigmoid":
        choice = tl.sigmoid(logits)
        if bias is not None:
            choice += bias
    elif SCORING == "softmax":
        masked = tl.where(there, logits, float("-inf"))
        top = tl.max(tl.max(masked, 2, keep_dims=True), 1, keep_dims=True)
        score = tl.exp(masked - top)
        total = tl.sum(tl.sum(score, 2), 1)[:, None]
        top = tl.reshape(top, (COPIES, 1))
        if GROUPS > 1:
            choice = score
    if GROUPS > 1:
        there = there & _best_groups(choice, there, GROUPS, KEPT)
        if SCORING == "softmax":
            choice = logits
    key = tl.reshape(tl.where(there, sortable(choice), TAKEN), (COPIES, PADDED))
    # padding has numbers too, the next group's: without a logit it is never taken for the chosen one
    logit_key = tl.reshape(tl.where(there, sortable(logits), TAKEN), (COPIES, PADDED))
    number = tl.reshape(expert, (COPIES, PADDED))
    k = tl.arange(0, WIDTH)[None, :]
    ids = tl.zeros((COPIES, WIDTH), tl.int32)
    chosen = tl.zeros((COPIES, WIDTH), tl.int32)
    for j in tl.static_range(TOP_K):
        largest, best = first_largest(key, number, PADDED)
        mine = number == best
        if SCORING == "sigmoid":
            largest = tl.max(tl.where(mine, logit_key, TAKEN), 1, keep_dims=True)
        ids = tl.where(k == j, best, ids)
        chosen = tl.where(k == j, largest, chosen)
        key = tl.where(mine, TAKEN, key)
    real = k < TOP_K
    logit = unsortable(chosen)
    if SCORING == "sigmoid":
        weight = tl.where(real, tl.sigmoid(logit), 0.0)
    else:
        if SCORING == "softmax_top_k":
            top = tl.max(tl.where(real, logit, float("-inf")), 1, keep_dims=True)
        weight = tl.where(real, tl.exp(logit - top), 0.0)
        if SCORING == "softmax_top_k":
            total = tl.sum(weight, 1, keep_dims=True)
        weight /= total
    if RENORMALISE and SCORING != "softmax_top_k":
        weight /= tl.sum(weight, 1, keep_dims=True) + 1e-20
    return ids, weight * SCALE


@triton.jit
def store_choices(
    ids, weight, shared_weight, token, expert_ids, routing_weights,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`ids`, `weight` [copies, WIDTH]; `token` [copies]; `shared_weight` [copies, 1] or a number."""
    k = tl.arange(0, WIDTH)[None, :]
    if SHARED > 0:
        ids = tl.where(k < TOP_K, ids, EXPERTS + k - TOP_K)
        weight = tl.where(k < TOP_K, weight, shared_weight)
    at = token[:, None].to(tl.int64) * (TOP_K + SHARED) + k
    tl.store(expert_ids + at, ids, mask=k < TOP_K + SHARED)
    tl.store(routing_weights + at, weight, mask=k < TOP_K + SHARED)


@triton.jit
def _numbers(EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Experts by group: their numbers [1, GROUPS_PADDED, SIZE], and which there are. The padding behind a
    group goes on counting, through the next group's numbers."""
    group = tl.arange(0, GROUPS_PADDED)[None, :, None]
    member = tl.arange(0, SIZE)[None, None, :]
    return group * (EXPERTS // GROUPS) + member, (group < GROUPS) & (member < EXPERTS // GROUPS)


@triton.jit
def route(
    logits, correction_bias, gate, expert_ids, routing_weights,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
    SCORING: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) + tl.arange(0, 1)
    expert, there = _numbers(EXPERTS, GROUPS, GROUPS_PADDED, SIZE)
    bias = None
    if correction_bias is not None:  # a weight: it was there long before
        bias = tl.load(correction_bias + expert, mask=there, other=0.0)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    at = token[:, None, None].to(tl.int64) * EXPERTS + expert
    logit = tl.load(logits + at, mask=there, other=0.0)
    shared_weight = 1.0
    if gate is not None:
        shared_weight = tl.sigmoid(tl.load(gate + token))[:, None]
    ids, weight = choose(logit, bias, expert, there, TOP_K, WIDTH, SCORING, RENORMALISE, SCALE, GROUPS, KEPT)
    store_choices(
        ids, weight, shared_weight, token, expert_ids, routing_weights, EXPERTS, TOP_K, SHARED, WIDTH
    )


# ---- 3. the launch


def constants(problem: Problem) -> dict[str, object]:
    """What `route` takes."""
    p = problem
    return {
        "EXPERTS": p.experts,
        "TOP_K": p.top_k,
        "SHARED": p.shared,
        "WIDTH": triton.next_power_of_2(p.choices),
        "SCORING": p.scoring,
        "RENORMALISE": p.renormalise,
        "SCALE": p.routed_scale,
        "GROUPS": p.expert_groups,
        "GROUPS_PADDED": triton.next_power_of_2(p.expert_groups),
        "SIZE": triton.next_power_of_2(p.experts // p.expert_groups),
        "KEPT": p.kept_groups,
    }


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens."""
    pdl = "pdl" in gpu.facts and not interpreted
    present = {
        "logits": "*fp32",
        "correction_bias": "*fp32" if problem.scoring == "sigmoid" else "",
        "gate": "*fp32" if problem.shared_gate else "",
        "expert_ids": "*i32",
        "routing_weights": "*fp32",
    }
    signature = {name: type for name, type in present.items() if type}
    absent = dict.fromkeys(name for name, type in present.items() if not type)
    return CompileRequest(
        route,
        signature,
        absent | constants(problem) | {"PDL": pdl},
        gpu,
        tuple(signature),
        num_warps=1,
        options={"launch_pdl": True} if pdl else {},
    )


def run(
    launcher: Launcher,
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> None:
    """Writes `expert_ids` and `routing_weights` for all rows of `logits`."""
    given = {"correction_bias": correction_bias, "gate": gate}
    optional = {name: tensor for name, tensor in given.items() if name in launcher.request.signature}
    if logits.shape[0]:
        grid = (logits.shape[0], 1, 1)
        launcher(grid, logits=logits, expert_ids=expert_ids, routing_weights=routing_weights, **optional)


# ---- 4. the reference


def reference(
    problem: Problem,
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ids (int64) and routing_weights. As layers/moe.py, with stable sorts for torch.topk."""
    p = problem
    if p.scoring == "softmax_top_k":
        values, ids = _largest(logits, p.top_k)
        return _with_shared(p, ids, values.softmax(-1) * p.routed_scale, gate)
    scores = logits.sigmoid() if p.scoring == "sigmoid" else logits.softmax(-1)
    biased = scores if correction_bias is None else scores + correction_bias
    choice = biased if p.scoring == "sigmoid" else logits
    if p.expert_groups > 1:
        groups = biased.unflatten(-1, (p.expert_groups, -1))  # [tokens, groups, experts per group]
        best = _largest(_largest(groups, 2)[0].sum(-1), p.kept_groups)[1]
        keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = choice.unflatten(-1, (p.expert_groups, -1))
        choice = choice.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(1)
    ids = _largest(choice, p.top_k)[1]
    weights = scores.gather(-1, ids)
    if p.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return _with_shared(p, ids, weights * p.routed_scale, gate)


def _largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like topk, but among equals the first."""
    values, order = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count]


def _with_shared(
    p: Problem, ids: torch.Tensor, weights: torch.Tensor, gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = ids.shape[0]
    shared = torch.arange(p.experts, p.experts + p.shared, device=ids.device).expand(tokens, -1)
    weight = weights.new_ones(tokens, 1) if gate is None else gate.sigmoid().unsqueeze(-1)
    return torch.cat((ids, shared), -1), torch.cat((weights, weight.expand(-1, p.shared)), -1)
