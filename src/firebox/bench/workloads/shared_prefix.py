"""Many requests with one long beginning, such as a system prompt with tools or a document: what a prefix
cache saves.

`depth_tokens` is the length of the shared beginning. Requests of a phase share it in groups of GROUP; every
group has its own, so the first request of a group computes it, and the cache must hold several.
"""

from __future__ import annotations

from typing import Any

from firebox.bench.base import Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options

GROUP = 8
DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 8, 32),
    "prompt_tokens": (128,),
    "output_tokens": (64,),
    "depth_tokens": (2048,),
    "requests": 8,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each concurrency and depth."""
    return [
        Phase(
            workload="shared_prefix",
            concurrency=concurrency,
            sessions=_sessions(prompts, concurrency * options.requests, depth, length, output),
            axes={"depth_tokens": depth, "prompt_tokens": length, "output_tokens": output, "group": GROUP},
        )
        for depth in options.depth_tokens
        for length in options.prompt_tokens
        for output in options.output_tokens
        if options.fits(depth + length + output)
        for concurrency in options.concurrency
    ]


def _sessions(prompts: Prompts, count: int, depth: int, length: int, output: int) -> tuple[Session, ...]:
    shared = [prompts.prefix(f"group {n}", depth) for n in range((count + GROUP - 1) // GROUP)]
    return tuple(Session(asks=(prompts.ask(length, output, shared[n // GROUP]),)) for n in range(count))
