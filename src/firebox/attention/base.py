"""The contract of an attention backend over paged keys and values. A backend is a file in this room; its name
is the key.

accepts(heads, spec, gpu)     None, or one sentence why it cannot serve such a layer on that device
plan(...)                     once per step: whatever `run` needs, from the step's integers
run(q, layer_cache, plan)     once per layer: the keys and values of the step are already in the cache
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from firebox.cache.pool import LayerCache
from firebox.cache.specs import CacheSpec, LatentSpec, PagedSpec, RecurrentSpec, WindowSpec
from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.hardware.base import Gpu

__all__ = [
    "Backend",
    "CacheSpec",
    "KvSpec",
    "LatentSpec",
    "PagedSpec",
    "RecurrentSpec",
    "WindowSpec",
    "select",
]  # layers see specs here

KvSpec = PagedSpec | LatentSpec | WindowSpec
REFERENCE = "torch_reference"  # serves every layer, slowly: asked last


class Backend(Protocol):
    """One backend's module (see above)."""

    def accepts(self, heads: int, spec: KvSpec, gpu: Gpu) -> str | None:
        """None, or one sentence why not."""
        ...

    def plan(self, query_start: np.ndarray, context_tokens: np.ndarray, page_table: torch.Tensor) -> Any:
        """What `run` needs of a step. `query_start` [requests + 1], `context_tokens` [requests], `page_table`
        [requests, max_pages]."""
        ...

    def run(
        self,
        q: torch.Tensor,
        layer_cache: LayerCache,
        plan: Any,
        scale: float,
        *,
        window_tokens: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of `q` [tokens, heads, head_dim] over each request's own keys → [tokens, heads,
        value_dim] in q's dtype. `window_tokens`: a token sees only so many last ones, itself included.
        `sinks` [heads]: a logit per head that takes part in the softmax and has no value."""
        ...


def select(heads: int, spec: KvSpec, gpu: Gpu, wanted: str = "auto") -> ModuleType:
    """The backend for such layers. `wanted` names one; ConfigError if it does not exist or does not
    accept."""
    if wanted != "auto" and wanted not in names("attention"):
        raise ConfigError(
            f"no attention backend {wanted!r}", hint=f"there are: {', '.join(names('attention'))}"
        )
    reasons = {}
    in_order = sorted(names("attention"), key=lambda name: name == REFERENCE)
    for name in in_order if wanted == "auto" else (wanted,):
        backend = load("attention", name)
        reason = backend.accepts(heads, spec, gpu)
        if reason is None:
            return backend
        reasons[name] = reason
    raise ConfigError(
        "no attention backend for this model: " + "; ".join(f"{n} {r}" for n, r in reasons.items())
    )
