"""Attention as the formula says, request by request, in float32: slow, right, and on any device.

out_t = Σ_j a_j · V_j,  a = softmax of scale · q_t · K_j over j in max(0, p_t − window + 1) … p_t and, if
there is one, the sink;  p_t = the position of token t in its request
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from firebox.attention.base import KvSpec
from firebox.cache.pool import LayerCache
from firebox.hardware.base import Gpu


@dataclass(frozen=True)
class Plan:
    """Per request: its first and last + 1 row among the step's tokens, its context length and its pages [n]
    int64."""

    requests: tuple[tuple[int, int, int, torch.Tensor], ...]


def accepts(heads: int, spec: KvSpec, gpu: Gpu) -> str | None:
    """Everything."""
    return None


def plan(query_start: np.ndarray, context_tokens: np.ndarray, page_table: torch.Tensor) -> Plan:
    """Splits the step by request."""
    starts, contexts = query_start.tolist(), context_tokens.tolist()
    return Plan(tuple(zip(starts[:-1], starts[1:], contexts, page_table.unbind(0), strict=True)))


def run(
    q: torch.Tensor,
    layer_cache: LayerCache,
    plan: Plan,
    scale: float,
    *,
    window_tokens: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See attention.base.Backend.run."""
    value_dim = layer_cache.v.shape[-1]
    out = q.new_empty(*q.shape[:2], value_dim)
    group = q.shape[1] // layer_cache.k.shape[2]
    page_tokens = layer_cache.k.shape[1]
    for first, last, context, pages in plan.requests:
        # the window kind has let go of the pages before the first one that the first query's window reaches
        reached = 0 if window_tokens is None else max(0, context - (last - first) - window_tokens + 1)
        start = reached // page_tokens * page_tokens
        held = pages[start // page_tokens : -(-context // page_tokens)]
        # [kv_heads, context − start, dim], each repeated for the query heads of its group
        k, v = (
            rows[: context - start].transpose(0, 1).repeat_interleave(group, 0)
            for rows in layer_cache.read(held)
        )
        scores = q[first:last].float().transpose(0, 1) @ k.transpose(1, 2) * scale  # [heads, queries, keys]
        behind = torch.arange(context - (last - first), context, device=q.device).unsqueeze(
            -1
        ) - torch.arange(start, context, device=q.device)  # how far each key lies behind each query
        hidden = behind < 0 if window_tokens is None else (behind < 0) | (behind >= window_tokens)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(-1, 1, 1).expand(-1, last - first, 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[first:last] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out
