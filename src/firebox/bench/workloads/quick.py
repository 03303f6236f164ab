"""A minute's look at a server: few at once, short prompts and answers."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from firebox.bench.base import Phase
from firebox.bench.prompts import Prompts
from firebox.bench.workloads import concurrency
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 2, 4, 8),
    "prompt_tokens": (128,),
    "output_tokens": (128,),
    "requests": 4,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """Those of the concurrency sweep."""
    return [replace(phase, workload="quick") for phase in concurrency.phases(prompts, options)]
