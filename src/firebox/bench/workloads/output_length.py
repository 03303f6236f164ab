"""A sweep over the length of answers: what a server loses as the context grows while it decodes."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from firebox.bench.base import Phase
from firebox.bench.prompts import Prompts
from firebox.bench.workloads import concurrency
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 8),
    "prompt_tokens": (128,),
    "output_tokens": (32, 128, 512, 2048, 8192),
    "requests": 2,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """Those of the concurrency sweep, at these lengths."""
    return [replace(phase, workload="output_length") for phase in concurrency.phases(prompts, options)]
