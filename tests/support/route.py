"""Routers of the models that are served, in small and in their own size, with inputs that have ties. Needs
torch and Triton, nothing of the engine."""

from __future__ import annotations

import torch

from firebox.kernels.moe_route import Problem

# model → its routing
ROUTINGS = {
    "glm-4.7": Problem(160, 8, "sigmoid", routed_scale=2.5, shared=1),
    "kimi-k2": Problem(384, 8, "sigmoid", routed_scale=2.827, shared=1),
    "deepseek-v3": Problem(256, 8, "sigmoid", routed_scale=2.5, expert_groups=8, kept_groups=4, shared=1),
    "qwen3.5": Problem(512, 10, "softmax", shared=1, shared_gate=True),
    "qwen3-30b": Problem(128, 8, "softmax"),
    "gpt-oss": Problem(128, 4, "softmax_top_k"),
    "minimax-m2": Problem(256, 8, "sigmoid"),
    "odd": Problem(37, 16, "softmax", renormalise=False, routed_scale=0.5),
    "odd groups": Problem(60, 5, "sigmoid", expert_groups=3, kept_groups=2, shared=2),
    "softmax groups": Problem(32, 3, "softmax", False, expert_groups=4, kept_groups=1),
    "all": Problem(8, 8, "softmax_top_k"),
}
CLOSE = 1e-6  # choices nearer than that may change places: a sigmoid's rounding differs between devices


def random_logits(
    problem: Problem, tokens: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Logits [tokens, experts] float32 in steps of 1/32, so that many are equal, zeros of both signs among
    them, every other token's all negative; and correction_bias and gate where the problem has them."""
    steps = torch.randint(-96, 97, (tokens, problem.experts), generator=generator, device=device)
    logits = steps.float() / 32
    logits[:, ::3] *= -1.0  # zeros of both signs
    logits[1::2] -= 4.0  # below the padding's zeros
    bias = gate = None
    if problem.scoring == "sigmoid":
        bias = torch.randint(-8, 9, (problem.experts,), generator=generator, device=device).float() / 16
    if problem.shared_gate:
        gate = torch.randn(tokens, generator=generator, device=device)
    return logits, bias, gate


def decided(problem: Problem, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[tokens] bool: no two different choices or groups lie so close that rounding could swap them. What is
    exactly equal is decided: the lower number wins."""
    if problem.scoring != "sigmoid" and problem.expert_groups == 1:
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    choice = logits.sigmoid() + bias if problem.scoring == "sigmoid" else logits.softmax(-1)
    sure = ~_close(choice, logits if bias is None else logits + 1000 * bias)
    if problem.expert_groups > 1:
        groups = choice.unflatten(-1, (problem.expert_groups, -1)).topk(2, -1).values.sum(-1)
        sure &= ~_close(groups, groups)
    return sure


def _close(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    order = values.sort(dim=-1).indices
    value, source = values.gather(-1, order), of.gather(-1, order)
    return ((value.diff(dim=-1) < CLOSE) & (source.diff(dim=-1) != 0)).any(-1)
