"""Tiles for less shared memory than the hardware has: FIREBOX_SMEM_LIMIT, or a Gpu whose
`smem_per_block_bytes` is lower than its file says. What was measured without a limit may then be too large;
the compiler says so, and the nearest tile that fits takes its place. Without a limit nothing is compiled
here: what was measured on a GPU fits it, and the launch plan checks it all the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from firebox.env import smem_limit_bytes
from firebox.hardware.base import Gpu, known_gpus
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.kernels.launch import INTERPRETED

# What a factor of two costs (of a flag: another one), in no unit. Half the tokens read weights twice, half
# the rows activations; of a pipeline the steps that are under way count, of which a shorter step leaves as
# many. Registers are a limit or none.
COSTS = {
    "tokens": 2.0, "stages": 2.0, "rows": 1.5, "depth": 0.5, "warps": 0.5,
    "slices": 0.5, "head": 0.5, "tma": 0.5, "flip": 0.25, "tiles": 0.25, "held": 0.25, "band": 0.25,
    "apart": 0.25, "registers": 0.25,
}  # fmt: skip
MEASURED_BONUS = 0.5  # of a tile that was measured for this problem at another number of tokens
FEWEST_STAGES = 2  # one is no pipeline
AT_A_TIME = 4  # compiles before the first that fits is looked for
SLACK = 1.1  # between the compiler's bytes and those that pipelines are in proportion to

Config = Any


def is_limited(gpu: Gpu) -> bool:
    """May a block ask for less than the hardware gives?"""
    if INTERPRETED:  # there is no shared memory
        return False
    return smem_limit_bytes() is not None or gpu.smem_per_block_bytes < _own_bytes(gpu.name)


def nearest_that_fits(
    config: Config,
    space: Iterable[Config],
    measured: Collection[Config],
    request_of: Callable[[Config], CompileRequest],
    pipeline_bytes: Callable[[Config], float],
) -> tuple[Config, str]:
    """`config` and "" if the compiler keeps it within the limit; otherwise the nearest of `space` that it
    does, and what became of `config`, for the ledger. `config` if there is none: the launch plan then refuses
    it with its numbers. `measured`: tiles that were, elsewhere; `pipeline_bytes`: what its steps hold."""
    [own] = compile_all([request_of(config)])
    if own.fits:
        return config, ""
    room = own.limit_bytes / max(own.shared_bytes, 1) * pipeline_bytes(config) * SLACK
    likely = [c for c in with_fewer_stages(space, config) if own.error or pipeline_bytes(c) <= room]
    ranked = nearest_first(config, likely, measured)
    for first in range(0, len(ranked), AT_A_TIME):
        few = ranked[first : first + AT_A_TIME]
        for candidate, compiled in zip(few, compile_all([request_of(c) for c in few]), strict=True):
            if compiled.fits:
                return candidate, own.error or f"{own.shared_bytes:,} of {own.limit_bytes:,} shared bytes"
    return config, ""


def nearest_first(config: Config, others: Iterable[Config], measured: Collection[Config]) -> list[Config]:
    """Other tiles, those most like `config` first; in the order given where two are."""

    def cost(other: Config) -> float:
        return distance(config, other) - MEASURED_BONUS * (other in measured)

    return sorted((other for other in dict.fromkeys(others) if other != config), key=cost)


def distance(one: Config, other: Config) -> float:
    """How little two tiles of a kernel are alike; 0 for the same."""
    theirs = asdict(other)
    return sum(COSTS[name] * _apart(name, value, theirs[name]) for name, value in asdict(one).items())


def with_fewer_stages(space: Iterable[Config], config: Config) -> Iterator[Config]:
    """`config` and those of `space`, and each with every shorter pipeline."""
    for tile in (config, *space):
        yield from (
            replace(tile, stages=n) for n in range(tile.stages, min(FEWEST_STAGES, tile.stages) - 1, -1)
        )


def _apart(name: str, one: int, other: int) -> float:
    if isinstance(one, bool) or name == "registers":
        return float(one != other)
    if name == "stages":  # one is being worked on
        one, other = one - 1, other - 1
    return abs(math.log2(max(one, 1) / max(other, 1)))


@functools.cache
def _own_bytes(name: str) -> int:
    """Of the hardware; 0 for a GPU without a file, which only the variable limits."""
    gpu = known_gpus().get(name)
    return gpu.smem_per_block_bytes if gpu else 0
