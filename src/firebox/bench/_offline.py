"""The records of `firebox bench offline`: what is asked for, and the rows that come of it.

    ms_per_token   the median time between two steps in which every request of the batch gets one token,
                   greedy, host work and the tokens' way to the host included
    first_ms_per_token  the same of the first 64 steps, in which a GPU may not be at its power limit yet
    roof_ms        bytes that such a step reads (weights, of E experts the share 1 − (1 − k/E)^batch; keys
                   and values of the context; recurrent states twice) over the copy rate, which is measured
                   in the same process before the model is loaded. A model that caches hold can be faster
    replay_ms      the step's CUDA graph alone; host_ms: ms_per_token less that
    experts        distinct ones of a layer in a step, shared ones not counted, on average over the layers of
                   two steps; experts_expected: what uniform routing gives, E · (1 − (1 − k/E)^batch)
    void           why the row's time does not count: with made-up weights `experts` is further from
                   `experts_expected` than 5 % and chance explain (_routing.py), as with a fill that sends
                   all tokens one way. None: it counts
    kv             "granted": a request's pages were given to it and its context counts as computed, though
                   no prompt was run; the pages hold normally distributed values. "computed": its prompt was
                   run, and contexts are as much longer as it took steps to run the others'
    share_of_roof  roof_ms / ms_per_token

Prefill: one prompt alone, from its arrival to its first token (ttft_ms); its roof is the matrix units' rate
of the GPU's datasheet where that is known, else reading the weights once. Its profile is of one more such
prompt, all its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from firebox.bench._step import Profile
from firebox.config import Config

BATCHES = (1, 2, 4, 5, 8, 10, 16, 32, 64, 128, 256)
CONTEXTS = (128, 2048, 32768)
PREFILLS = (2048, 8192, 32768)
FIRST = 64  # steps


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`config.model.model` is a folder; its other fields and those of `config.engine` are as for a server,
    but that there are as many running requests as the largest batch, no prefix cache, and, unless given, a
    context as long as the longest measured. `tokens`: timed steps of a row. `granted`: see `kv` above.
    `within_s`: after so many seconds no row is begun."""

    config: Config
    name: str
    batches: Sequence[int] = BATCHES
    contexts: Sequence[int] = CONTEXTS
    prefills: Sequence[int] = PREFILLS
    tokens: int = 64
    granted: bool = True
    profile: bool = True
    within_s: float | None = None


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """One batch at one context. None: it could not be said here (no graph, no GPU, no expert layers).
    `modes`: timed steps by how they ran and why."""

    model: str
    format: str
    context: int
    batch: int
    kv: str
    ms_per_token: float
    first_ms_per_token: float
    tokens_per_s: float
    roof_ms: float
    share_of_roof: float
    weights_bytes: int
    cache_bytes: int
    replay_ms: float | None
    host_ms: float | None
    experts: float | None
    experts_expected: float | None
    void: str | None
    steps: int
    modes: dict[str, int]
    profile: Profile | None = None


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt alone. `runs_ms`: every run's time to the first token; `roof`: what roof_ms is."""

    model: str
    format: str
    tokens: int
    ttft_ms: float
    tokens_per_s: float
    roof_ms: float
    roof: str
    share_of_roof: float
    runs_ms: list[float]
    profile: Profile | None = None


class NotMeasured(msgspec.Struct, frozen=True):
    """What was asked for and is not there. `failed`: it was tried; otherwise it could not be, or had no
    time."""

    what: str
    why: str
    failed: bool = False


class Offline(msgspec.Struct, kw_only=True):
    """All of it. `settings`: the engine's, as it derived them; `copy_gb_s`: see roof_ms."""

    model: str
    format: str
    device: str
    layers: int
    firebox: str
    torch: str
    copy_gb_s: float
    load_s: float
    weights_bytes: int
    kv_tokens: int
    context_tokens: int
    settings: list[str]
    decode: list[Decode] = []
    prefill: list[Prefill] = []
    not_measured: list[NotMeasured] = []
    modes: dict[str, int] = {}


AnyRow = Decode | Prefill | NotMeasured
