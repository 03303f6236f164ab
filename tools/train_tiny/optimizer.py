"""Muon for the matrices, AdamW for everything else, under one learning rate.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest orthogonal
matrix, found with five Newton-Schulz steps; scaled as in https://arxiv.org/abs/2502.16982 its updates have
AdamW's size, so both share the learning rate and the weight decay. All matrices of one shape (each expert is
one) are done as one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """matrices [count, rows, columns] → nearly orthogonal matrices of the same shape, bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay over `parameters` (each [.., rows, columns])."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float):
        self.weight_decay = weight_decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
        self.momentum = {shape: [torch.zeros_like(p) for p in group] for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for shape, group in self.groups.items():
            gradients = [p.grad for p in group]
            torch._foreach_lerp_(self.momentum[shape], gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, self.momentum[shape], MOMENTUM)
            updates = orthogonalise(torch.cat([g.reshape(-1, *shape) for g in ahead]))
            counts = [p.numel() // (shape[0] * shape[1]) for p in group]
            pieces = [u.reshape(p.shape).float() for u, p in zip(updates.split(counts), group, strict=True)]
            torch._foreach_mul_(group, 1 - learning_rate * self.weight_decay)
            torch._foreach_add_(group, pieces, alpha=-learning_rate * 0.2 * max(shape) ** 0.5)


class Optimizer:
    """Both optimizers over one model; `step(learning_rate)` updates and clears the gradients."""

    def __init__(self, model: nn.Module, weight_decay: float):
        matrices, tables, vectors = [], [], []
        for name, parameter in model.named_parameters():
            is_table = name in ("embed_tokens.weight", "head.weight") or name.endswith("gate.weight")
            (vectors if parameter.ndim == 1 else tables if is_table else matrices).append(parameter)
        self.muon = Muon(matrices, weight_decay)
        groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = next(model.parameters()).is_cuda
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=fused)
        self.model = model

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.muon.step(learning_rate)
        self.model.zero_grad(set_to_none=True)
