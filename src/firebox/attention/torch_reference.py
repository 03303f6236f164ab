"""Attention as the formula says, request by request, in float32: slow, right, and on any device.

out_t = softmax(scale · q_t · K[0 … p_t]ᵀ) · V[0 … p_t],  p_t = the position of token t in its request
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from firebox.cache.pool import LayerCache
from firebox.cache.specs import PagedSpec
from firebox.hardware.base import Gpu


@dataclass(frozen=True)
class Plan:
    """Per request: its first and last + 1 row among the step's tokens, its context length and its pages [n]
    int64."""

    requests: tuple[tuple[int, int, int, torch.Tensor], ...]


def accepts(heads: int, spec: PagedSpec, gpu: Gpu) -> str | None:
    """Everything."""
    return None


def plan(query_start: np.ndarray, context_tokens: np.ndarray, page_table: torch.Tensor) -> Plan:
    """Splits the step by request."""
    starts, contexts = query_start.tolist(), context_tokens.tolist()
    return Plan(tuple(zip(starts[:-1], starts[1:], contexts, page_table.unbind(0), strict=True)))


def run(q: torch.Tensor, layer_cache: LayerCache, plan: Plan, scale: float) -> torch.Tensor:
    """Causal attention of `q` [tokens, heads, head_dim]; the same shape and dtype."""
    out = torch.empty_like(q)
    group = q.shape[1] // layer_cache.k.shape[2]
    page_tokens = layer_cache.k.shape[1]
    for first, last, context, pages in plan.requests:
        held = pages[: -(-context // page_tokens)]
        # [kv_heads, context, head_dim], each repeated for the query heads of its group
        k, v = (
            cache[held].flatten(0, 1)[:context].float().transpose(0, 1).repeat_interleave(group, 0)
            for cache in (layer_cache.k, layer_cache.v)
        )
        scores = (
            q[first:last].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        )  # [heads, queries, context]
        query_positions = torch.arange(context - (last - first), context, device=q.device)
        future = torch.arange(context, device=q.device) > query_positions.unsqueeze(-1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[first:last] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out
