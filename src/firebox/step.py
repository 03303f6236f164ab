"""What one forward pass sees. Built once per step by the runner, frozen, and passed down as an argument.

A step computes `tokens` tokens of `requests` requests, request after request:

    tokens      | request 0: chunk of 5 | request 1: 1 | request 2: 1 | …
    query_start 0                       5              6              7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Step:
    """The integers of one forward pass, each as a tensor on the compute device and, where the host plans with
    it, as numpy.

    `positions` [tokens] int64: index of each token in its request. `token_slots` [tokens] int64: where its K
    and V go (page id × page_tokens + row). `token_rows` [tokens] int64: which request it belongs to.
    `page_table` [requests, max_pages] int64, padded with page 0. `query_start` [requests + 1] and
    `context_tokens` [requests] (tokens in the cache after this step) are host arrays. `attention`: the
    backend's plan for this step. `caches`: one per layer.
    """

    positions: torch.Tensor
    token_slots: torch.Tensor
    token_rows: torch.Tensor
    page_table: torch.Tensor
    query_start: np.ndarray
    context_tokens: np.ndarray
    caches: tuple[Any, ...]
    attention: Any

    @property
    def tokens(self) -> int:
        """How many tokens this step computes."""
        return self.positions.shape[0]
