"""llama-bench's grid for a server: prompts of several lengths (pp), answers of several lengths (tg), over
contexts of several depths.

A depth above 0 gives two phases for each cell. "context" sends the context itself as the prompt, cold.
"prompt" sends prompts that begin with it, after it has been sent once: with a prefix cache only the prompt is
computed, and the time to the first token says so; the server's own count of cached tokens is in the row.
Every request has a context of its own, as the users of a server do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from firebox.bench.base import Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1,),
    "prompt_tokens": (512, 2048),
    "output_tokens": (128,),
    "depth_tokens": (0, 4096, 16384, 32768),
    "requests": 1,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """Two for each cell with a depth, one for each without."""
    return [
        phase
        for depth in options.depth_tokens
        for length in options.prompt_tokens
        for output in options.output_tokens
        if options.fits(depth + length + output)
        for concurrency in options.concurrency
        for phase in _cell(prompts, options, concurrency, depth, length, output)
    ]


def _cell(
    prompts: Prompts, options: Options, concurrency: int, depth: int, length: int, output: int
) -> Iterator[Phase]:
    axes = {"depth_tokens": depth, "prompt_tokens": length, "output_tokens": output}
    count = concurrency * options.requests
    contexts = [prompts.prefix(f"context {n}", depth) if depth else None for n in range(count)]
    if depth:
        cold = tuple(Session(asks=(prompts.ask(0, output, context),)) for context in contexts)
        yield Phase(
            workload="prompt_depth", concurrency=concurrency, sessions=cold, axes={**axes, "kind": "context"}
        )
    yield Phase(
        workload="prompt_depth",
        concurrency=concurrency,
        sessions=tuple(Session(asks=(prompts.ask(length, output, context),)) for context in contexts),
        axes={**axes, "kind": "prompt"},
        warm=tuple(
            Session(asks=(prompts.ask(0, 1, context),)) for context in contexts if context is not None
        ),
    )
