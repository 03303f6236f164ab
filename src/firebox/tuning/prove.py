"""What new tuned files bring where users feel it: decode steps and prompts of the engine itself, with the
files and without them, in pairs that are measured one right after the other.

A gain counts if the 95 % interval of the paired differences lies above zero. A file that brings none, or that
slows a case down, is not installed.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firebox.bench.statistics import Mean, paired
from firebox.bench.timer import now
from firebox.config import Config
from firebox.engine.messages import SamplingParams
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.kernels import _tuned

BATCHES = (1, 4, 16, 64)
PROMPT_TOKENS = 2048
STEPS = 24  # decode steps of a measurement
PAIRS = 10
FIRST_ID = 5  # of made-up prompts: past the special tokens of most vocabularies


@dataclass(frozen=True)
class Gain:
    """One case. `before_ms`, `after_ms`: medians; `share`: mean of ln(before / after) over pairs, with its
    95 % interval."""

    case: str
    before_ms: float
    after_ms: float
    share: Mean

    @property
    def gains(self) -> bool:
        """Certainly faster."""
        return self.share.low > 0

    @property
    def loses(self) -> bool:
        """Certainly slower."""
        return self.share.high < 0


Measure = Callable[[], float]


def prove(config: Config, new: Path, batches: Sequence[int] = BATCHES, pairs: int = PAIRS) -> Iterator[Gain]:
    """Starts the engine of `config` on this machine's GPU and compares the folders that kernels read now with
    these and `new` on top of them."""
    from firebox.engine.start import start

    scheduler, runner, ready = start(config)
    usual = _tuned.roots()
    variants = [_Variant(runner, usual), _Variant(runner, (*usual, new))]
    try:
        for batch in batches:
            measures = [v.decode(scheduler, batch, ready.vocab_size) for v in variants]
            yield compare(f"decode, batch {batch}", measures, pairs)
        measures = [v.prefill(scheduler, ready.vocab_size) for v in variants]
        yield compare(f"prompt of {PROMPT_TOKENS} tokens", measures, pairs)
    finally:
        _tuned.use()


def compare(case: str, measures: Sequence[Measure], pairs: int) -> Gain:
    """`measures`: milliseconds before and after; each pair in the other order than the last. The first call
    of either captures and compiles, and does not count."""
    for measure in measures:
        measure()
    taken: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            taken[which].append(measures[which]())
    before, after = taken
    share = paired([math.log(ms) for ms in after], [math.log(ms) for ms in before])
    return Gain(case, statistics.median(before), statistics.median(after), share)


def worth_installing(gains: Sequence[Gain]) -> bool:
    """Something is faster, and nothing slower."""
    return any(gain.gains for gain in gains) and not any(gain.loses for gain in gains)


class _Variant:
    """The engine's model and cache with graphs of its own, captured while `folders` were read."""

    def __init__(self, runner: Any, folders: tuple[Path, ...]) -> None:
        self._runner, self._folders = copy.copy(runner), folders
        self._runner.forget_graphs()

    def decode(self, scheduler: Any, batch: int, vocab: int) -> Measure:
        """The median step of a batch."""

        def measure() -> float:
            return statistics.median(self._steps(scheduler, batch, 128, STEPS, vocab)[1])

        return measure

    def prefill(self, scheduler: Any, vocab: int) -> Measure:
        """Until the first token."""

        def measure() -> float:
            return self._steps(scheduler, 1, PROMPT_TOKENS, 2, vocab)[0]

        return measure

    def _steps(
        self, scheduler: Any, batch: int, prompt: int, tokens: int, vocab: int
    ) -> tuple[float, list[float]]:
        """Milliseconds until all have their first token, and of each step after that."""
        _tuned.use(*self._folders)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for i in range(batch):
            ids = [FIRST_ID + (i * 7919 + j * 104_729) % (vocab - FIRST_ID) for j in range(prompt)]
            scheduler.add(Request(i, ids, params))
        pipeline, steps = Pipeline(scheduler, self._runner), []
        began = before = now()
        first = 0.0
        while (done := pipeline.step()) is not None:
            ended, chunks = now(), done[0].chunks
            if all(chunk.count == 1 for chunk in chunks) and len(chunks) == batch:
                first = first or (before - began) * 1e3
                steps.append((ended - before) * 1e3)
            before = ended
        return first, steps
