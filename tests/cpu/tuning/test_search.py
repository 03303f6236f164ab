"""The search over made-up operations whose true times are known, with a meter that reads them."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from firebox.hardware.base import Gpu, find_gpu
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort
from firebox.tuning.entries import MEASURED, PREDICTED, Entry, interleave_keys, stored
from firebox.tuning.journal import Journal
from firebox.tuning.search import KEYS, LARGE, TOLERATED, Search

SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 256, 512, 1024, 2048, 3072, 4096)


@dataclass(frozen=True)
class Config:
    rows: int
    depth: int
    warps: int
    stages: int


CONFIGS = [Config(*c) for c in itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (2, 3, 4))]
STOCK = Config(64, 128, 4, 3)


def true_us(tokens: int, path: str, part: str, c: Config) -> float:
    """Few is faster up to about 50 tokens. Larger tiles suit more tokens."""
    size = math.log2(c.rows * c.depth) - 8 - math.log2(tokens) / 3
    base = {"few": 5 + 1.5 * tokens, "sorted": 55 + 0.5 * tokens}[path]
    warps = (math.log2(c.warps) - (1 if part == "up" else 2)) ** 2
    return base * (1 + 0.03 * size**2 + 0.05 * warps + 0.04 * (c.stages - 3) ** 2)


class Made:
    """Candidates without compiles; an estimate that is off by a tenth, more for small tiles."""

    OP, FILE = "made", "made.json"

    def candidates(self, task: Task, gpu: Gpu) -> Iterator[Candidate]:
        for path, part, config in itertools.product(("few", "sorted"), ("up", "down"), CONFIGS):
            if path == "sorted" or task.tokens <= 64:
                yield Candidate(path, part, config, None)

    def stock(self, task: Task, gpu: Gpu) -> Option:
        path = "few" if task.tokens <= 64 else "sorted"
        return Option(path, {part: Candidate(path, part, STOCK, None) for part in ("up", "down")}, 0.0)

    def estimate_us(self, task: Task, candidate: Candidate, compiled: Any, gpu: Gpu) -> float:
        c = candidate.config
        off = random.Random(str(c)).gauss(0.0, 0.1) + 0.05 * math.log2(128 / c.rows)
        return true_us(task.tokens, candidate.path, candidate.part, c) * math.exp(off)

    def further_requests(self, task: Task, gpu: Gpu) -> Iterator[Any]:
        return iter(())

    def further_us(self, task: Task, path: str, parts: Mapping[str, Candidate], gpu: Gpu) -> float:
        return 0.0 if path == "few" else 4.0

    def roof_us(self, task: Task, path: str, gpu: Gpu) -> float:
        return best(task.tokens) / 2

    def options(self, task: Task, ranked: Mapping[tuple[str, str], Sequence[Candidate]]) -> Iterator[Option]:
        for path in dict.fromkeys(path for path, _ in ranked):
            for pair in itertools.product(*(ranked.get((path, part), ())[:2] for part in ("up", "down"))):
                yield Option(path, dict(zip(("up", "down"), pair, strict=True)), 0.0)

    def entry(self, option: Option) -> dict[str, Any]:
        return {"path": option.path} | {part: asdict(c.config) for part, c in option.parts.items()}


class Reading:
    """A meter that knows the true times; some candidates fail. Counts what it was asked."""

    def __init__(self, bad: Sequence[str] = (), noise: float = 0.003) -> None:
        self.asked, self._bad, self._noise, self._random = 0, bad, noise, random.Random(5)

    def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> list[list[float] | str]:
        self.asked += len(candidates)
        return [self._one(task, c, effort) for c in candidates]

    def _one(self, task: Task, c: Candidate, effort: Effort) -> list[float] | str:
        if c.name in self._bad:
            return "wrong: relative error 0.9"
        us = true_us(task.tokens, c.path, c.part, c.config)
        return [us * (1 + self._random.gauss(0, self._noise)) for _ in range(effort.samples)]

    def further(self, task: Task, option: Option, effort: Effort) -> list[float] | str:
        return [4.0 if option.path == "sorted" else 0.0]


def task(tokens: int) -> Task:
    return Task("made", "problem", "problem", tokens)


def searched(
    meter: Reading | None, journal: Journal | None = None, sizes: Sequence[int] = SIZES
) -> tuple[dict[int, Entry], Search]:
    full, between = interleave_keys(KEYS, sizes)
    journal = journal or Journal(None, "h200", "3.9.0")
    search = Search(Made(), task, find_gpu("h200"), journal, meter, keys=full, between=between)
    return {entry.task.tokens: entry for entry in search.entries()}, search


def total(tokens: int, option: Option) -> float:
    parts = (true_us(tokens, option.path, part, c.config) for part, c in option.parts.items())
    return sum(parts) + (4.0 if option.path == "sorted" else 0.0)


def best(tokens: int) -> float:
    paths = ("few", "sorted") if tokens <= 64 else ("sorted",)
    return min(
        sum(min(true_us(tokens, path, part, c) for c in CONFIGS) for part in ("up", "down"))
        + (4.0 if path == "sorted" else 0.0)
        for path in paths
    )


def test_it_finds_nearly_the_best_with_few_measurements() -> None:
    meter = Reading()
    entries, search = searched(meter)
    lost = {}
    for tokens in SIZES:
        nearest = min(entries, key=lambda t: abs(math.log(t / tokens)))
        lost[tokens] = total(tokens, entries[nearest].option) / best(tokens)
    assert max(lost.values()) <= 1.05 and statistics.geometric_mean(lost.values()) <= 1.01, lost
    assert all(entry.how == MEASURED for entry in entries.values())
    everything = sum(len(list(Made().candidates(task(t), find_gpu("h200")))) for t in SIZES)
    assert search.report.candidates == everything and meter.asked < everything / 25


def test_entries_say_how_near_the_roof_they_are() -> None:
    entries, _ = searched(Reading(noise=0.0))
    for tokens, entry in entries.items():
        document = stored(entry, Made())
        share = best(tokens) / 2 / total(tokens, entry.option)
        assert document["of_roof"] == pytest.approx(share, abs=1e-3) and 0.4 < share <= 0.5


def test_prediction_takes_the_estimates_best() -> None:
    entries, _ = searched(None)
    made, gpu = Made(), find_gpu("h200")
    for entry in entries.values():
        for part, chosen in entry.option.parts.items():
            others = [
                c for c in made.candidates(entry.task, gpu) if (c.path, c.part) == (entry.option.path, part)
            ]
            assert chosen == min(others, key=lambda c: made.estimate_us(entry.task, c, None, gpu))
        assert entry.how == PREDICTED


def test_what_fails_is_named_and_never_chosen() -> None:
    first, _ = searched(Reading())
    winner = first[64].option.parts["up"]
    entries, search = searched(Reading(bad=[winner.name]))
    assert all(entry.option.parts["up"] != winner for entry in entries.values())
    assert any(winner.name in name and "wrong" in why for name, why in search.report.failed.items())


def test_the_stock_tile_stays_at_many_tokens_unless_it_is_beaten_clearly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nearly(tokens: int, path: str, part: str, c: Config) -> float:
        return 100.0 * tokens * (1.0 if c == STOCK else 0.995 if c == CONFIGS[7] else 1.2)

    monkeypatch.setitem(globals(), "true_us", nearly)
    entries, _ = searched(Reading(noise=0.0))
    for tokens, entry in entries.items():
        if tokens >= LARGE:
            assert {c.config for c in entry.option.parts.values()} == {STOCK}
            assert entry.stock_us is not None and entry.stock_us <= TOLERATED * entry.option.us


def test_between_keys_an_entry_is_added_only_where_the_nearest_one_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smooth, _ = searched(Reading(noise=0.0))
    assert 3072 not in smooth and 24 not in smooth

    def bumpy(tokens: int, path: str, part: str, c: Config) -> float:
        odd = tokens == 3072 and c.warps == 8
        return honest(tokens, path, part, c) * (0.3 if odd else 1.0)

    honest = true_us
    monkeypatch.setitem(globals(), "true_us", bumpy)
    entries, _ = searched(Reading(noise=0.0))
    assert entries[3072].option.parts["up"].config.warps == 8


def test_what_is_faster_for_more_tokens_is_tried_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that keeps the better path out at 64 tokens, where the other takes longer than 256 do."""
    honest, estimate = true_us, Made.estimate_us

    def slow_few(tokens: int, path: str, part: str, c: Config) -> float:
        return honest(tokens, path, part, c) * (2.2 if (tokens, path) == (64, "few") else 1.0)

    def blind(self: Made, task: Task, candidate: Candidate, compiled: Any, gpu: Gpu) -> float:
        factor = 10.0 if (task.tokens, candidate.path) == (64, "sorted") else 1.0
        return factor * estimate(self, task, candidate, compiled, gpu)

    monkeypatch.setitem(globals(), "true_us", slow_few)
    monkeypatch.setattr(Made, "estimate_us", blind)
    entries, _ = searched(Reading(noise=0.0))
    assert entries[64].option.path == "sorted" and entries[64].option.us == total(64, entries[64].option)
    times = [entries[tokens].option.us for tokens in sorted(entries)]
    assert times == sorted(times)
    monkeypatch.setattr(Search, "_without_dips", lambda self, found: iter(()))
    entries, _ = searched(Reading(noise=0.0))
    assert entries[64].option.path == "few" and entries[64].option.us > entries[256].option.us


def test_a_run_that_goes_on_from_a_journal_measures_nothing_twice_and_chooses_the_same(
    tmp_path: Path,
) -> None:
    whole, _ = searched(Reading(), Journal(tmp_path / "whole.sqlite", "h200", "3.9.0"))

    class Killed(Exception):
        pass

    rng, journal_path = random.Random(1), tmp_path / "cut.sqlite"
    meter = Reading()
    cuts = 0
    while True:
        left = rng.randrange(3, 30)

        class Dying(Reading):
            def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return meter.samples(task, candidates, effort)

        try:
            found, _ = searched(Dying(), Journal(journal_path, "h200", "3.9.0"))
            break
        except Killed:
            cuts += 1
    assert cuts >= 5
    assert {t: e.option.parts for t, e in found.items()} == {t: e.option.parts for t, e in whole.items()}
    again = Reading()
    searched(again, Journal(journal_path, "h200", "3.9.0"))
    assert again.asked == 0


def test_another_compiler_is_another_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    searched(Reading(), Journal(path, "h200", "3.9.0"))
    other = Reading()
    searched(other, Journal(path, "h200", "3.6.0"))
    assert other.asked > 0
