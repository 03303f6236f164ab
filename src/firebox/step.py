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
class Pages:
    """Where the layers of one cache kind find their keys and values. `token_slots` [tokens] int64: where each
    token's go (page id × page_tokens + row). `table` [requests, max_pages] int64: page ids by position, 0 for
    none (padding, or a page that the window has left behind). `attention`: the backend's plan; None where no
    layer of the kind needs one."""

    token_slots: torch.Tensor
    table: torch.Tensor
    attention: Any


@dataclass(frozen=True)
class Step:
    """The integers of one forward pass, as tensors on the compute device and, where the host plans with them,
    as numpy arrays.

    `positions` [tokens] int64: index of each token in its request. `token_rows` [tokens] int64: which request
    it belongs to. `query_start` [requests + 1] and `context_tokens` [requests] (tokens seen after this step)
    are host arrays. `caches`: one per layer. `full`: pages of paged and latent layers; `window`: of windowed
    ones, None if the model has none. `state_slots` [requests] int64: each request's recurrent state, and
    `starts` [requests + 1] int32: `query_start` on the device; None if the model has no recurrent layers.
    `outputs` [rows] int64: the tokens whose hidden states are wanted, in this order; None: all, in theirs.
    """

    positions: torch.Tensor
    token_rows: torch.Tensor
    query_start: np.ndarray
    context_tokens: np.ndarray
    caches: tuple[Any, ...]
    full: Pages
    window: Pages | None = None
    state_slots: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens this step computes."""
        return self.positions.shape[0]
