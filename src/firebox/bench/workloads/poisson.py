"""Requests that arrive by themselves, as users do: independent of each other and of the server, at a mean
rate.

A server that is too slow for a rate is not asked less often, as a sweep over concurrency would: its queue
grows, and that shows in the time to the first token. `concurrency` is the most that may be open at once; the
time a request waits for that is its queue time.
"""

from __future__ import annotations

import random
from typing import Any

from firebox.bench.base import Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1024,),
    "rates_per_s": (0.5, 1.0, 2.0, 4.0, 8.0),
    "prompt_tokens": (512,),
    "output_tokens": (128,),
    "requests": 64,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each rate, of `requests` arrivals."""
    return [
        Phase(
            workload="poisson",
            concurrency=options.concurrency[-1],
            sessions=tuple(
                Session(asks=(prompts.ask(length, output),), starts_s=starts_s)
                for starts_s in arrivals(rate, options.requests, prompts.draw)
            ),
            axes={"rate_per_s": rate, "prompt_tokens": length, "output_tokens": output},
        )
        for length in options.prompt_tokens
        for output in options.output_tokens
        if options.fits(length + output)
        for rate in options.rates_per_s
    ]


def arrivals(rate_per_s: float, count: int, draw: random.Random) -> list[float]:
    """`count` times of a Poisson process, in seconds; the first is 0."""
    at_s, times = 0.0, []
    for _ in range(count):
        times.append(at_s)
        at_s += draw.expovariate(rate_per_s)
    return times
