"""A sweep over concurrency: prompts of one length, answers of one length, more and more at once.

5 and 10 are in it because servers that capture graphs for powers of two only are slow there.
"""

from __future__ import annotations

from typing import Any

from firebox.bench.base import Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 2, 4, 5, 8, 10, 16, 32, 64, 128, 256, 512, 1024),
    "prompt_tokens": (512,),
    "output_tokens": (128,),
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each concurrency, prompt length and answer length."""
    return [
        Phase(
            workload="concurrency",
            concurrency=concurrency,
            sessions=tuple(
                Session(asks=(prompts.ask(length, output),)) for _ in range(concurrency * options.requests)
            ),
            axes={"prompt_tokens": length, "output_tokens": output},
        )
        for length in options.prompt_tokens
        for output in options.output_tokens
        if options.fits(length + output)
        for concurrency in options.concurrency
    ]
