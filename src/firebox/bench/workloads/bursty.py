"""Requests that arrive in groups: a page that asks eight questions, a batch job. Groups come as a Poisson
process, so that the mean rate is the one named; all requests of a group come together.
"""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from firebox.bench.base import Phase
from firebox.bench.prompts import Prompts
from firebox.bench.workloads import poisson
from firebox.bench.workloads.base import Options

BURST = 8
DEFAULTS: dict[str, Any] = poisson.DEFAULTS


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each rate; groups of BURST."""
    return [_in_groups(phase, prompts, options) for phase in poisson.phases(prompts, options)]


def _in_groups(phase: Phase, prompts: Prompts, options: Options) -> Phase:
    groups = math.ceil(options.requests / BURST)
    starts = poisson.arrivals(float(phase.axes["rate_per_s"]) / BURST, groups, prompts.draw)
    sessions = tuple(
        replace(session, starts_s=starts[number // BURST]) for number, session in enumerate(phase.sessions)
    )
    return replace(phase, workload="bursty", sessions=sessions, axes={**phase.axes, "burst": BURST})
