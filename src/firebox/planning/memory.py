"""Where one GPU's memory goes: reserve, weights as they are stored, what a step works in, what running
requests keep, and the KV tokens that the rest buys.

    kv_tokens = (memory − reserve − weights − workspace − graphs − requests − snapshots) / bytes per token

Weights, requests and KV tokens are counted; so is the workspace of expert kernels. The other lines are
estimates until the engine measures them on a GPU, and `FORMULAS` says how they are made. Unified memory is
counted once: its reserve is also what operating system, page cache and server process live in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firebox.cache.specs import CacheSpec, LatentSpec, PagedSpec, RecurrentSpec, WindowSpec
from firebox.config import EngineConfig
from firebox.engine.memory import graph_nodes_bytes
from firebox.hardware.base import Gpu

GIB = 2**30

FORMULAS: Mapping[str, str] = {
    "reserve_bytes": "unified memory: max(10 GiB, memory / 16), for the operating system and all else that "
    "runs; otherwise max(1 GiB, memory / 32), for driver, context and fragmentation (estimate)",
    "workspace_bytes": "buffers of the expert kernels at max_batch_tokens (counted) + max_batch_tokens · 8 · "
    "hidden in the compute dtype + 2 · max_running_requests · (1 + drafts) · vocabulary in float32 "
    "(estimate)",
    "graphs_bytes": "max_running_requests graphs · layers · 12 launches · 4 KiB + the logits that all share: "
    "max_running_requests · (1 + drafts) · vocabulary in float32 (estimate)",
    "requests_bytes": "max_running_requests · (twice the pages of a window and a prefill chunk + one "
    "recurrent state, with drafts two)",
    "snapshots_bytes": "recurrent states for prefix hits: two a running request, in at most half of what "
    "one request of context_tokens leaves",
}


@dataclass(frozen=True)
class CacheBytes:
    """What one GPU's share of all layers keeps: of every token; of every token within the last
    `window_tokens` (0: there are no windows); and of a request."""

    per_token: int
    window_tokens: int
    per_window_token: int
    state: int


@dataclass(frozen=True)
class Memory:
    """The ledger of one GPU, in bytes. `weights`: by purpose; `window_request_bytes`: what
    a running request takes beside its KV tokens and its recurrent state; `copied_states`: copies of that on
    which drafts are tried; `context_tokens`: what one request must be able to hold."""

    gpu_bytes: int
    reserve_bytes: int
    weights: Mapping[str, int]
    workspace_bytes: int
    graphs_bytes: int
    cache: CacheBytes
    window_request_bytes: int
    running_requests: int
    context_tokens: int
    page_tokens: int
    copied_states: int = 0

    @property
    def weights_bytes(self) -> int:
        """All of them, MTP layers included."""
        return sum(self.weights.values())

    @property
    def requests_bytes(self) -> int:
        """Windows and states of the running requests."""
        states = (1 + self.copied_states) * self.cache.state
        return self.running_requests * (self.window_request_bytes + states)

    @property
    def left_bytes(self) -> int:
        """For KV tokens and snapshots; negative where not even the rest fits."""
        spent = self.reserve_bytes + self.weights_bytes + self.workspace_bytes + self.graphs_bytes
        return self.gpu_bytes - spent - self.requests_bytes

    @property
    def snapshots_bytes(self) -> int:
        """Recurrent states for prefix hits."""
        spare_bytes = max(0, self.left_bytes - self._context_bytes)
        return min(2 * self.running_requests * self.cache.state, spare_bytes // 2)

    @property
    def kv_tokens(self) -> int:
        """In whole pages."""
        page_bytes = max(1, self.cache.per_token * self.page_tokens)
        return max(0, self.left_bytes - self.snapshots_bytes) // page_bytes * self.page_tokens

    @property
    def missing_bytes(self) -> int:
        """What one request of `context_tokens` lacks; 0 if it fits."""
        return max(0, self._context_bytes - self.left_bytes)

    @property
    def _context_bytes(self) -> int:
        pages = -(-self.context_tokens // self.page_tokens)
        return pages * self.page_tokens * self.cache.per_token

    @property
    def fits(self) -> bool:
        """One request of `context_tokens` fits beside everything else."""
        return self.missing_bytes == 0

    def document(self) -> dict[str, Any]:
        """As `firebox fit --json` prints it; bytes of one GPU."""
        return {
            "gpu_bytes": self.gpu_bytes,
            "reserve_bytes": self.reserve_bytes,
            "weights_bytes": self.weights_bytes,
            "weights": dict(self.weights),
            "workspace_bytes": self.workspace_bytes,
            "graphs_bytes": self.graphs_bytes,
            "requests_bytes": self.requests_bytes,
            "running_requests": self.running_requests,
            "window_bytes_per_request": self.window_request_bytes,
            "state_bytes_per_request": self.cache.state,
            "snapshots_bytes": self.snapshots_bytes,
            "kv_bytes_per_token": self.cache.per_token,
            "kv_tokens": self.kv_tokens,
            "context_tokens": self.context_tokens,
            "missing_bytes": self.missing_bytes,
            "formulas": dict(FORMULAS),
        }


def cache_bytes(specs: Sequence[CacheSpec | None], itemsize: int, tp: int) -> CacheBytes:
    """One of `tp` GPUs' share; `itemsize` of stored keys and values. KV heads are divided, and repeated
    where there are fewer than GPUs; a latent row is whole on each; a recurrent state is divided (float32)."""
    per_token = window_tokens = per_window_token = state = 0
    for spec in specs:
        if isinstance(spec, RecurrentSpec):
            state += sum(4 * math.prod(shape) for shape in spec.state_shapes) // tp
            continue
        if spec is None:
            continue
        row = itemsize * sum(math.prod(shape) for shape in spec.row_shapes)
        if isinstance(spec, PagedSpec | WindowSpec):
            row = row // spec.kv_heads * max(1, spec.kv_heads // tp)
        if isinstance(spec, WindowSpec):
            window_tokens, per_window_token = spec.window_tokens, per_window_token + row
        else:
            assert isinstance(spec, PagedSpec | LatentSpec), spec
            per_token += row
    return CacheBytes(per_token, window_tokens, per_window_token, state)


def ledger(
    gpu: Gpu,
    weights: Mapping[str, int],
    cache: CacheBytes,
    experts_workspace_bytes: int,
    sizes: Sizes,
    engine: EngineConfig,
    context_tokens: int,
    drafts: int = 0,
) -> Memory:
    """The memory of one GPU under the engine's budgets. `drafts`: tokens of a request that a decode step
    checks beside its own."""
    engine, running = engine.on(gpu), engine.most_running
    tokens, rows = step_tokens(engine, drafts), running * (drafts + 1)
    logits = rows * sizes.vocab * 4
    activations = tokens * 8 * sizes.hidden * sizes.itemsize + 2 * logits
    return Memory(
        gpu_bytes=gpu.memory_bytes,
        reserve_bytes=reserve_bytes(gpu),
        weights=weights,
        workspace_bytes=experts_workspace_bytes + activations,
        graphs_bytes=graph_nodes_bytes(running, sizes.layers) + logits,
        cache=cache,
        window_request_bytes=_window_request_bytes(cache, engine),
        running_requests=running,
        context_tokens=context_tokens,
        page_tokens=engine.tokens_a_page,
        copied_states=int(drafts > 0),
    )


def step_tokens(engine: EngineConfig, drafts: int) -> int:
    """The most tokens of a step: those of a prefill, or of all running requests with their drafts."""
    running = engine.most_running
    return max(engine.max_batch_tokens, running * (drafts + 1))


@dataclass(frozen=True)
class Sizes:
    """Of a model. `itemsize`: of a number in the compute dtype, bytes."""

    hidden: int
    vocab: int
    layers: int
    itemsize: int


def reserve_bytes(gpu: Gpu) -> int:
    """What is not planned with."""
    if gpu.unified_memory:
        return max(10 * GIB, gpu.memory_bytes // 16)
    return max(GIB, gpu.memory_bytes // 32)


def _window_request_bytes(cache: CacheBytes, engine: EngineConfig) -> int:
    """A request's share of the pool of window pages, as engine/budget.py sizes it."""
    if not cache.window_tokens:
        return 0
    running = engine.most_running
    windows = running * (-(-cache.window_tokens // engine.tokens_a_page) + 2)
    pages = 2 * (windows + -(-engine.max_batch_tokens // engine.tokens_a_page))
    return -(-pages // running) * engine.tokens_a_page * cache.per_window_token
