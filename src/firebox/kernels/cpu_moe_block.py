"""One mixture-of-experts layer on a CPU, residual to residual, in one call: for every token t of the step

    h = rms_norm(x_t) · norm_weight;  s = sigmoid(router · h)   or softmax(router · h) over the experts
    top = the top_k experts by s + correction_bias;  w = s[top], made to sum to 1 if asked, times routed_scale
    out_t = x_t + Σ_j w_j · down_j(silu(gate_j h) · up_j h) + Σ shared experts, each with weight 1

x, out [tokens, hidden] float32; gate_up [experts + shared, 2 · inter, hidden] (gate rows, then up rows) and
down [experts + shared, hidden, inter], float32 or bf16 bits. Ties in the choice go to the lower expert index.
Each expert runs once over the tokens that chose it, gathered; the results are added per token in the order of
its choices, shared experts last, so the sum does not depend on the batch. Measured: EPYC, one thread,
2026-11-21, see docs/log/2026-11-21-first-light.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numba import prange

from firebox.hardware.base import Gpu
from firebox.kernels import _blocks
from firebox.kernels._cpu import F0, exp, jit, matmul, pack, rms_norm, silu_mul

# ---- 1. the problem

OP = _blocks.MOE_BLOCK
Problem = _blocks.MoeProblem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """CPU, float32, plain experts."""
    if gpu.kind != "cpu":
        return "is made for a CPU"
    if problem.dtype != torch.float32:
        return f"computes in float32, not {problem.dtype}"
    if problem.expert_groups != 1:
        return f"does not route by groups ({problem.expert_groups} of them)"
    if problem.scoring == "softmax_top_k" or problem.biases or problem.activation != "silu_mul":
        return "knows no biases, no clamped SwiGLU and no softmax over the chosen experts only"
    if problem.shared_gate:
        return "does not weight the shared expert"
    return None


# ---- 2. the device code


def _route(
    scores: np.ndarray,  # [experts]: logits in, scores out
    bias: np.ndarray,  # [experts], or empty
    softmax: bool,
    renormalise: bool,
    routed_scale: float,
    ids: np.ndarray,  # [top_k]
    weights: np.ndarray,  # [top_k]
) -> None:
    experts, top_k = scores.shape[0], ids.shape[0]
    if softmax:
        top = scores.max()
        total = F0
        for e in range(experts):
            scores[e] = exp(scores[e] - top)
            total += scores[e]
        for e in range(experts):
            scores[e] /= total
    else:
        for e in range(experts):
            scores[e] = np.float32(1.0) / (np.float32(1.0) + exp(-scores[e]))
    taken = np.zeros(experts, np.bool_)
    total = F0
    for j in range(top_k):
        best, best_score = 0, np.float32(-np.inf)
        for e in range(experts):
            choice = scores[e] + bias[e] if bias.shape[0] > 0 else scores[e]
            if not taken[e] and choice > best_score:
                best, best_score = e, choice
        taken[best] = True
        ids[j], weights[j] = best, scores[best]
        total += scores[best]
    factor = np.float32(routed_scale)
    if renormalise:
        factor /= total + np.float32(1e-20)
    for j in range(top_k):
        weights[j] *= factor


route = jit(_route)


def _moe_block(
    x: np.ndarray,
    norm_weight: np.ndarray,
    router: np.ndarray,
    bias: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    top_k: int,
    softmax: bool,
    renormalise: bool,
    routed_scale: float,
    eps: float,
    out: np.ndarray,
) -> None:
    tokens, hidden = x.shape
    experts, all_experts, inter = router.shape[0], gate_up.shape[0], down.shape[2]
    slots = top_k + all_experts - experts  # results per token
    h = np.empty((tokens, hidden), np.float32)
    rms_norm(x, norm_weight, eps, h)
    scores = np.empty((tokens, experts), np.float32)
    matmul(h, router, 0, experts, scores)
    ids = np.empty((tokens, slots), np.int64)
    weights = np.ones((tokens, slots), np.float32)
    for t in range(tokens):
        route(scores[t], bias, softmax, renormalise, routed_scale, ids[t, :top_k], weights[t, :top_k])
        for j in range(top_k, slots):
            ids[t, j] = experts + j - top_k

    # pairs (token, slot) grouped by expert: expert e has order[start[e] : start[e + 1]]
    start = np.zeros(all_experts + 1, np.int64)
    for t in range(tokens):
        for j in range(slots):
            start[ids[t, j] + 1] += 1
    for e in range(all_experts):
        start[e + 1] += start[e]
    order = np.empty(tokens * slots, np.int64)
    filled = start[:-1].copy()
    for t in range(tokens):
        for j in range(slots):
            order[filled[ids[t, j]]] = t * slots + j
            filled[ids[t, j]] += 1

    results = np.empty((tokens * slots, hidden), np.float32)
    for e in prange(all_experts):
        pairs = order[start[e] : start[e + 1]]
        count = pairs.shape[0]
        if count > 0:
            gathered = np.empty((count, hidden), np.float32)
            for i in range(count):
                gathered[i] = h[pairs[i] // slots]
            both = np.empty((count, 2 * inter), np.float32)
            matmul(gathered, gate_up[e], 0, 2 * inter, both)
            activated = np.empty((count, inter), np.float32)
            silu_mul(both, activated)
            matmul(activated, down[e], 0, hidden, gathered)
            for i in range(count):
                results[pairs[i]] = gathered[i]
    for t in range(tokens):
        for i in range(hidden):
            out[t, i] = x[t, i]
        for j in range(slots):
            for i in range(hidden):
                out[t, i] += weights[t, j] * results[t * slots + j, i]


_serial = jit(_moe_block)
_parallel = jit(_moe_block, parallel=True)

# ---- 3. bind


def bind(
    problem: Problem, weights: Mapping[str, torch.Tensor], threads: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A launcher `run(x) -> out`. `weights`: norm [hidden], router [experts, hidden], correction_bias
    [experts] or empty, gate_up and down as in the docstring."""
    packed = {name: pack(weights[name]) for name in ("gate_up", "down")}
    plain = {
        name: weights[name].float().contiguous().numpy().copy()
        for name in ("norm", "router", "correction_bias")
    }
    kernel = _parallel if threads > 1 else _serial
    softmax, scale, eps = (
        problem.scoring == "softmax",
        np.float32(problem.routed_scale),
        np.float32(problem.eps),
    )

    def run(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel(
            x.numpy(),
            plain["norm"],
            plain["router"],
            plain["correction_bias"],
            packed["gate_up"],
            packed["down"],
            problem.top_k,
            softmax,
            problem.renormalise,
            scale,
            eps,
            out.numpy(),
        )
        return out

    return run


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula token by token and expert by expert in float64."""
    w = {name: tensor.double() for name, tensor in inputs["weights"].items()}
    out = inputs["x"].double().clone()
    for t, x in enumerate(inputs["x"].double()):
        h = w["norm"] * x / (x.pow(2).mean() + problem.eps).sqrt()
        logits = w["router"] @ h
        scores = logits.sigmoid() if problem.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores + w["correction_bias"] if w["correction_bias"].numel() else scores
        chosen = choice.topk(problem.top_k).indices
        factor = (
            scores[chosen] * problem.routed_scale / (scores[chosen].sum() if problem.renormalise else 1.0)
        )
        pairs = list(zip(chosen.tolist(), factor.tolist(), strict=True))
        pairs += [(problem.experts + i, 1.0) for i in range(problem.shared_experts)]
        for expert, weight in pairs:
            gate, up = (w["gate_up"][expert] @ h).chunk(2)
            out[t] += weight * (w["down"][expert] @ (torch.nn.functional.silu(gate) * up))
    return out.float()


# ---- 5. inputs, cases, tolerance

# (problem, tokens)
CASES = tuple(
    (problem, tokens)
    for problem in (
        Problem(256, 128, 16, 4, 1, "sigmoid", True, 2.5, 1e-5),
        Problem(64, 48, 8, 2, 0, "softmax", True, 1.0, 1e-6),
        Problem(40, 24, 5, 5, 2, "softmax", False, 1.0, 1e-6),
    )
    for tokens in (1, 2, 5, 16, 67)
)
# float32 sums of a few hundred terms against float64, relative to the reference's RMS
TOLERANCE = 2e-6


def inputs(case: tuple[Problem, int], seed: int = 0) -> dict[str, Any]:
    """Random hidden states and weights; a correction bias large enough to change who is chosen."""
    problem, tokens = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    all_experts = problem.experts + problem.shared_experts
    weights = {
        "norm": 1 + normal(problem.hidden, scale=0.1),
        "router": normal(problem.experts, problem.hidden, scale=problem.hidden**-0.5),
        "correction_bias": normal(problem.experts if problem.scoring == "sigmoid" else 0, scale=0.3),
        "gate_up": normal(all_experts, 2 * problem.inter, problem.hidden, scale=problem.hidden**-0.5),
        "down": normal(all_experts, problem.hidden, problem.inter, scale=problem.inter**-0.5),
    }
    return {"x": normal(tokens, problem.hidden), "weights": weights}
