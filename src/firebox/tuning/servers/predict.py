"""Tuning files for a model's routed experts, without the GPU: compiled for it, ranked by a model of time.

    predict_files(source, gpu, tp, folder, budget_s) → Report

1. What the servers will look for (names.py), and the products that they then run (products.py).
2. The search space, ordered by estimate; of that at most MOST_COMPILES are compiled for the GPU, within the
   budget (tiles.py). What does not fit, spills or emulates its instruction is dropped, and reported.
3. For every key the fastest of the rest by what the compiler said (choose.py, times.py), written (files.py).

The files depend on the model, the GPU and the version of Triton alone, as long as the budget suffices for all
compiles; the log says if it did not.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from firebox.errors import ConfigError
from firebox.hardware.base import Gpu
from firebox.kernels import _triton
from firebox.planning._foreign_name import VLLM
from firebox.planning._parts import Source
from firebox.tuning.servers.choose import Goal, Pair, best, compile_order
from firebox.tuning.servers.files import Origin, candidates_from, write
from firebox.tuning.servers.names import Lookup, expert_layers, lookups
from firebox.tuning.servers.products import Product, products
from firebox.tuning.servers.tiles import Dropped, Tried, Wanted, compile_tiles, search_space, within_scales

KEYS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)  # as their tuners
MOST_COMPILES = 150
WRITING_S = 5.0  # of the budget, for what follows the compiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What came of it. `paths`: the JSON files; `predicted`: path → number of tokens → the pair of choices;
    `compiled`: how many compiles there were; `dropped`: those that must not be written; `left`: compiles that
    the budget did not suffice for."""

    paths: tuple[Path, ...]
    predicted: Mapping[Path, Mapping[int, Pair]]
    compiled: int
    dropped: tuple[Dropped, ...]
    left: int
    seconds: float

    @property
    def reasons(self) -> Mapping[str, int]:
        """Why compiles were dropped → how many."""
        return Counter(one.reason for one in self.dropped)


def predict_files(
    source: Source,
    gpu: Gpu,
    tp: int,
    folder: Path,
    budget_s: float,
    *,
    keys: Sequence[int] = KEYS,
    most_compiles: int = MOST_COMPILES,
    seeds: Sequence[Path] = (),
    commit: str = "",
) -> Report:
    """Writes SGLang's files and vLLM's below `folder` (names.py says where). `seeds`: files whose tiles are
    compiled first and compete. Raises UnsupportedModel, UnsupportedFormat, and ConfigError where the model
    cannot be cut so or nothing that compiled in time may be written."""
    began = time.monotonic()
    if gpu.triton_target is None:
        raise ConfigError(f"tuning files are about GPUs, not {gpu.name}", hint="gb10, rtx-pro-6000, h200, …")
    layers = expert_layers(source, tp)
    asked = {
        lookup: _goals(lookup, products(layers, lookup), keys)
        for lookup in lookups(layers, gpu, _triton.VERSION)
    }
    goals = [goal for found in asked.values() for goal in found]
    wanted = _wanted(goals, gpu, seeds)[:most_compiles]
    tried = compile_tiles(wanted, goals[0].first.operands, gpu, began + budget_s - WRITING_S)
    _say(tried, len(wanted), budget_s)
    chosen = {lookup: _chosen(found, tried, gpu, budget_s) for lookup, found in asked.items()}
    origin = Origin("predicted", source.name, tp, gpu.name, _triton.VERSION, datetime.date.today(), commit)
    predicted = {
        path: pairs for lookup, pairs in chosen.items() for path in write(folder, lookup, pairs, origin)
    }
    return Report(
        tuple(predicted),
        predicted,
        len(tried.runs) + len(tried.dropped),
        tried.dropped,
        tried.left,
        time.monotonic() - began,
    )


def _goals(lookup: Lookup, found: tuple[Product, Product], keys: Sequence[int]) -> list[Goal]:
    return [Goal(*found, tokens, alike=lookup.server == VLLM) for tokens in sorted(keys)]


def _wanted(goals: Sequence[Goal], gpu: Gpu, seeds: Sequence[Path]) -> list[Wanted]:
    """Seeds first, but for tiles that would run across a block of scales."""
    operands = goals[0].first.operands
    found = (tile for path in seeds for tile in candidates_from(path))
    given = [tile for tile in found if within_scales(tile.block_k, operands)]
    space = dict.fromkeys([*given, *search_space(operands)])
    first = [Wanted(tile, down) for tile in given for down in (False, True)]
    return list(dict.fromkeys([*first, *compile_order(goals, list(space), gpu)]))


def _chosen(goals: Sequence[Goal], tried: Tried, gpu: Gpu, budget_s: float) -> dict[int, Pair]:
    found = {goal.tokens: best(goal, tried.runs, gpu) for goal in goals}
    if missing := [tokens for tokens, pair in found.items() if pair is None]:
        raise ConfigError(
            f"no tile is left for {missing[0]} tokens on {gpu.name}: {len(tried.runs)} compiles may be "
            f"written; dropped: {_reasons(tried) or 'none'}",
            hint=f"a budget of more than {budget_s:g} s" if tried.left else "a GPU with this instruction",
        )
    return {tokens: pair for tokens, pair in found.items() if pair is not None}


def _say(tried: Tried, planned: int, budget_s: float) -> None:
    done = planned - tried.left
    _log.info(
        "%d tiles compiled, %d may be written; dropped: %s", done, len(tried.runs), _reasons(tried) or "none"
    )
    for one in tried.dropped:
        _log.debug(
            "dropped %s of the %s product: it %s: %s",
            one.tile,
            "second" if one.down else "first",
            one.reason,
            one.detail,
        )
    if tried.left:
        _log.warning(
            "the budget of %g s did not suffice for %d of %d compiles: the files may differ from those of a "
            "longer run",
            budget_s,
            tried.left,
            planned,
        )


def _reasons(tried: Tried) -> str:
    counted = Counter(one.reason for one in tried.dropped)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counted.items()))
