"""From a problem to tuned entries: for each number of tokens the best path, and the best tile of each part.

    compile     what a first guess puts ahead, in parallel, until the budget's share is spent
    drop        what does not compile, does not fit, spills badly, or is emulated
    estimate    all that is left
    measure     where there is a GPU: the most promising by the estimate, corrected by all that was measured
                before (tuning/surrogate.py), one after the other until nothing better is hoped for; those
                that are close once more, in turn
    weigh       combinations of parts with what the path launches besides

The numbers of tokens in KEYS are searched in an order that goes from coarse to fine, so that each has
neighbours to learn from. Between two of them only their winners and the favourite are tried: an entry is
added where the nearest one would lose more than TOLERATED.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from firebox.bench.timer import now
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from firebox.tuning.base import Candidate, Option, Task, Tunable
from firebox.tuning.clock import Effort
from firebox.tuning.entries import MEASURED, PREDICTED, Entry
from firebox.tuning.journal import Journal
from firebox.tuning.surrogate import Surrogate, features

KEYS = (64, 1, 1024, 8, 4096, 256, 16, 4, 2048)
COMPILED_SHARE, COMPILED_LEAST = 1 / 4, 20  # of a part's candidates, by the first guess
AT_FIRST, THEN, TRIED_BETWEEN = 9, 5, 2  # candidates of a part that are measured
ONE_MORE_OF = 20  # candidates: one more is measured for each so many
NEARBY = 16  # times as many tokens, or as few: so far a measurement tells about another
FINAL, CLOSE = 4, 1.01  # the best are measured once more, in turn, if so little lies between them
OPTIMISM = 1.0  # standard deviations that an unknown candidate is given credit for
WORTH = 1.1  # a path is looked at if its estimate is within this of the best path's
LARGE, TOLERATED = 512, 1.02  # from so many tokens on the stock tile stays unless beaten by this
DIP = 1.01  # so much longer than more tokens is no noise
BATCH = 8  # compiles for each core at a time
SPILL_BYTES = 512  # of a thread; some of the fastest tiles spill half of that
ROUGH, FINE = Effort(samples=1, sample_ms=0.5), Effort(samples=2, sample_ms=0.5)


class Meter(Protocol):
    """Measures candidates on a GPU, each in at most some seconds, whatever becomes of it."""

    def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> list[list[float] | str]:
        """Microseconds of each, after its result was found right; or why there are none."""
        ...

    def further(self, task: Task, option: Option, effort: Effort) -> list[float] | str:
        """Of what the option's path launches besides its parts."""
        ...


@dataclass
class Report:
    """What became of the candidates: how many there were, were compiled and measured; reason → how many were
    dropped for it; candidates that failed on the GPU, by name."""

    candidates: int = 0
    compiled: int = 0
    measured: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]


def compile_here(requests: Sequence[CompileRequest], keep: bool) -> list[Compiled]:
    """On this machine's cores; `keep`: the binaries too."""
    return compile_all(requests, keep_binaries=keep)


class Search:
    """One problem of one operation. `meter` None: predict. `compile`: see spread.Places. `between`:
    further numbers of tokens that occur, where interpolation is tested. `deadline`: on the clock of
    bench.timer; compiling stops at `compile_until`."""

    def __init__(
        self,
        tunable: Tunable,
        make_task: Callable[[int], Task],
        gpu: Gpu,
        journal: Journal,
        meter: Meter | None = None,
        compile: Callable[[Sequence[CompileRequest], bool], list[Compiled]] = compile_here,
        keys: Sequence[int] = KEYS,
        between: Sequence[int] = (),
        compile_until: float = math.inf,
        deadline: float = math.inf,
        progress: Progress = lambda what, done, of: None,
    ) -> None:
        self._tunable, self._gpu, self._journal, self._meter = tunable, gpu, journal, meter
        self._compile_all = compile
        self._keys = {tokens: make_task(tokens) for tokens in keys}
        self._between = {tokens: make_task(tokens) for tokens in between if tokens not in keys}
        self._compile_until, self._deadline, self._progress = compile_until, deadline, progress
        self._errors: dict[tuple[str, str], Surrogate] = {}
        self._seen: dict[tuple[str, str], set[int]] = {}
        self._candidates: dict[Task, dict[tuple[str, str], list[Candidate]]] = {}
        self._estimates: dict[tuple[Task, Candidate], float] = {}
        self._compiled: dict[str, Compiled] = {}
        self.report = Report()

    def entries(self) -> Iterator[Entry]:
        """Entries as they are found; those that are missing when the deadline comes are not yielded. One that
        a later look improves comes again."""
        self._compile()
        found: dict[int, Entry] = {}
        tasks = {**self._keys, **dict(sorted(self._between.items()))}
        for n, (tokens, task) in enumerate(tasks.items()):
            if now() > self._deadline and found:
                return
            self._progress("measuring" if self._meter else "ranking", n, len(tasks))
            entry = self._entry(task, found if tokens in self._between else None)
            if entry is not None:
                found[tokens] = entry
                yield entry
        yield from self._without_dips(found)

    # ---- compiling

    def _compile(self) -> None:
        wanted: list[tuple[float, Task, Candidate]] = []
        for task in (*self._keys.values(), *self._between.values()):
            wanted += self._worth_compiling(task)
        wanted.sort(key=lambda one: one[0])
        self._compile_in_turn({c.code: c.request for _, _, c in wanted if c.request is not None})
        if self._meter is not None:
            tasks = (*self._keys.values(), *self._between.values())
            others = [r for task in tasks for r in self._tunable.further_requests(task, self._gpu)]
            self._compile_all(others, True)
        for _, task, candidate in wanted:
            self._judge(task, candidate)

    def _worth_compiling(self, task: Task) -> list[tuple[float, Task, Candidate]]:
        """With each one's place in its part's ranking: whoever stops early has the best of every part."""
        parts: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in self._tunable.candidates(task, self._gpu):
            if candidate.unproven and self._meter is None:
                self.report.candidates += 1
                self.report.dropped["is not chosen before it has run"] += 1
            else:
                parts.setdefault((candidate.path, candidate.part), []).append(candidate)
        stock, found = self._tunable.stock(task, self._gpu), []
        for candidates in parts.values():
            self.report.candidates += len(candidates)
            guess = {c: self._tunable.estimate_us(task, c, None, self._gpu) for c in candidates}
            most = max(COMPILED_LEAST, round(COMPILED_SHARE * len(candidates)))
            best = sorted(candidates, key=lambda c: guess[c])[:most]
            best += [c for c in candidates if c in stock.parts.values() and c not in best]
            found += [(place / len(best), task, c) for place, c in enumerate(best)]
        return found

    def _compile_in_turn(self, requests: Mapping[str, CompileRequest]) -> None:
        """In batches, so that the budget can end it."""
        left, size = list(requests.items()), BATCH * probe_cpu().cpu_cores
        for first in range(0, len(left), size):
            if now() > self._compile_until and first:
                self.report.dropped["not compiled within the budget"] += len(left) - first
                break
            self._progress("compiling", first, len(left))
            batch = left[first : first + size]
            found = self._compile_all([request for _, request in batch], self._meter is not None)
            self._compiled |= {code: one for (code, _), one in zip(batch, found, strict=True)}
        self.report.compiled = len(self._compiled)

    def _judge(self, task: Task, candidate: Candidate) -> None:
        compiled = self._compiled.get(candidate.code)
        if candidate.request is not None:
            if compiled is None:
                return
            why = fault(compiled, candidate)
            if why is not None:
                self.report.dropped[why] += 1
                return
        parts = self._candidates.setdefault(task, {})
        parts.setdefault((candidate.path, candidate.part), []).append(candidate)
        us = self._tunable.estimate_us(task, candidate, compiled, self._gpu)
        self._estimates[task, candidate] = us

    # ---- choosing

    def _entry(self, task: Task, around: Mapping[int, Entry] | None) -> Entry | None:
        """`around`: the keys' entries, where `task` lies between them."""
        if task not in self._candidates:
            return None
        times = self._times(task, around)
        option = self._best(task, times)
        if option is None:
            return None
        stock_us = self._stock_us(task, times)
        if stock_us is not None and task.tokens >= LARGE and stock_us < option.us * TOLERATED:
            option = replace(self._tunable.stock(task, self._gpu), us=stock_us)
        if around and not self._gains(task, option, around, times):
            return None
        return self._entry_of(task, option, stock_us)

    def _entry_of(self, task: Task, option: Option, stock_us: float | None) -> Entry:
        roof_us = self._tunable.roof_us(task, option.path, self._gpu)
        compiled = {part: self._compiled.get(c.code) for part, c in option.parts.items()}
        shared_bytes = {part: found.shared_bytes for part, found in compiled.items() if found is not None}
        how = MEASURED if self._meter else PREDICTED
        return Entry(task, option, how, stock_us, roof_us, shared_bytes)

    def _without_dips(self, found: Mapping[int, Entry]) -> Iterator[Entry]:
        """Fewer tokens need not take longer than more do: where they did, the search was too short, and what
        the more chose is tried. Entries that this improves."""
        if self._meter is None:  # no estimate was left out
            return
        least: Entry | None = None
        for tokens in sorted(found, reverse=True):
            entry = found[tokens]
            if least is not None and entry.option.us > DIP * least.option.us:
                better = self._tried(entry, least.option)
                if better is not None:
                    entry = better
                    yield better
            if least is None or entry.option.us < least.option.us:
                least = entry

    def _tried(self, entry: Entry, option: Option) -> Entry | None:
        """`entry` with another number of tokens' `option`, if that is faster."""
        task, times = entry.task, dict[Candidate, float]()
        parts: dict[str, Candidate] = {}
        for part, chosen in option.parts.items():
            there = self._candidates[task].get((option.path, part), [])
            alike = next((c for c in there if c.config == chosen.config), None)
            if alike is None:
                return None
            parts[part] = alike
        for part, candidate in parts.items():
            self._measure(task, (option.path, part), [candidate], times)
        tried = replace(option, parts=parts)
        us = sum(times.values()) + self._further_us(task, tried, measure=True)
        needed = TOLERATED if task.tokens >= LARGE else 1.0  # as for what stands in for the stock tile
        if us * needed >= entry.option.us:
            return None
        return self._entry_of(task, replace(tried, us=us), entry.stock_us)

    def _times(self, task: Task, around: Mapping[int, Entry] | None) -> dict[Candidate, float]:
        if self._meter is None:
            return {c: self._estimates[task, c] for found in self._candidates[task].values() for c in found}
        times: dict[Candidate, float] = {}
        for key in self._paths_worth(task):
            times |= self._measured(task, key, around)
        return times

    def _paths_worth(self, task: Task) -> list[tuple[str, str]]:
        """The parts of paths that may win."""
        parts = self._candidates[task]
        best: dict[str, float] = {}
        for key in parts:
            best[key[0]] = best.get(key[0], 0.0) + float(min(us for us, _ in self._expected(task, key)))
        for path in best:
            some = {part: found[0] for (of, part), found in parts.items() if of == path}
            best[path] += self._tunable.further_us(task, path, some, self._gpu)
        known = {path for (path, _), found in parts.items() if not any(c.unproven for c in found)}
        least = min(us for path, us in best.items() if path in (known or best))
        return [key for key in parts if best[key[0]] <= WORTH * least]

    def _expected(self, task: Task, key: tuple[str, str]) -> list[tuple[float, float]]:
        """For each candidate the expected time, and the one hoped for."""
        candidates = self._candidates[task][key]
        points = [features(task.tokens, c.numbers) for c in candidates]
        means, deviations = self._errors.setdefault(key, Surrogate()).predict(points)
        estimates = [self._estimates[task, c] for c in candidates]
        return [
            (us * math.exp(mean), us * math.exp(mean - OPTIMISM * deviation))
            for us, mean, deviation in zip(estimates, means, deviations, strict=True)
        ]

    def _measured(
        self, task: Task, key: tuple[str, str], around: Mapping[int, Entry] | None
    ) -> dict[Candidate, float]:
        times: dict[Candidate, float] = {}
        more = len(self._candidates[task][key]) // ONE_MORE_OF
        budget = (THEN if self._known_nearby(task, key) else AT_FIRST) + more
        if around:
            winners = list(self._winners(task, key, around))
            self._measure(task, key, winners, times)
            budget = max(1, TRIED_BETWEEN - len(winners))
        elif task.tokens >= LARGE:
            stock = self._tunable.stock(task, self._gpu).parts.values()
            self._measure(task, key, [c for c in self._candidates[task][key] if c in stock], times)
        for _ in range(budget):
            promising = self._promising(task, key, times)
            if promising is None:
                break
            self._measure(task, key, [promising], times)
        self._measure_again(task, self._finalists(times), times)
        return times

    def _known_nearby(self, task: Task, key: tuple[str, str]) -> bool:
        """Was this part measured at a number of tokens that is not far away?"""
        seen = self._seen.setdefault(key, set())
        near = any(max(tokens, task.tokens) <= NEARBY * min(tokens, task.tokens) for tokens in seen)
        seen.add(task.tokens)
        return near

    def _promising(
        self, task: Task, key: tuple[str, str], times: Mapping[Candidate, float]
    ) -> Candidate | None:
        """By the expected time; None where nothing is hoped to be faster than the best."""
        expected = zip(self._candidates[task][key], self._expected(task, key), strict=True)
        left = [(c, us, hoped) for c, (us, hoped) in expected if c not in times]
        best = min(times.values(), default=math.inf)
        if not any(hoped < best for _, _, hoped in left):
            return None
        return min(left, key=lambda one: one[1])[0]

    def _winners(self, task: Task, key: tuple[str, str], around: Mapping[int, Entry]) -> Iterator[Candidate]:
        """What the keys on either side chose, as far as it is a candidate here."""
        below = max((t for t in around if t < task.tokens), default=None)
        above = min((t for t in around if t > task.tokens), default=None)
        sides = [around[t].option for t in (below, above) if t is not None]
        chosen = [option.parts[key[1]] for option in sides if option.path == key[0]]
        return (c for c in self._candidates[task][key] if c in chosen)

    def _measure(
        self, task: Task, key: tuple[str, str], candidates: Sequence[Candidate], times: dict[Candidate, float]
    ) -> None:
        for candidate, samples in zip(candidates, self._samples(task, candidates, ROUGH), strict=True):
            if isinstance(samples, str):
                self.report.failed[f"{task}: {candidate.name}"] = samples
                times[candidate] = math.inf
                continue
            times[candidate] = statistics.median(samples)
            error = math.log(times[candidate] / self._estimates[task, candidate])
            self._errors[key].learn(features(task.tokens, candidate.numbers), error)

    def _finalists(self, times: Mapping[Candidate, float]) -> list[Candidate]:
        """Between whom the first measurements did not decide."""
        best = sorted(times, key=lambda c: times[c])[:FINAL]
        close = [c for c in best if times[c] <= times[best[0]] * CLOSE]
        return close if len(close) > 1 else []

    def _measure_again(self, task: Task, best: Sequence[Candidate], times: dict[Candidate, float]) -> None:
        right = [c for c in best if times[c] < math.inf]
        for candidate, samples in zip(right, self._samples(task, right, FINE), strict=True):
            if not isinstance(samples, str):
                times[candidate] = statistics.median(samples)

    def _samples(
        self, task: Task, candidates: Sequence[Candidate], effort: Effort
    ) -> list[list[float] | str]:
        """From the journal, or measured and written there."""
        assert self._meter is not None
        what = f"samples {effort.samples}"
        known = {c: self._journal.read(task, c, what) for c in candidates}
        missing = [c for c in candidates if known[c] is None]
        if missing:
            for candidate, samples in zip(missing, self._meter.samples(task, missing, effort), strict=True):
                self._journal.write(task, candidate, what, samples)
                known[candidate] = samples
        self.report.measured += len(candidates)
        return [known[c] for c in candidates]

    def _best(self, task: Task, times: Mapping[Candidate, float]) -> Option | None:
        ranked: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in sorted((c for c in times if times[c] < math.inf), key=lambda c: times[c]):
            ranked.setdefault((candidate.path, candidate.part), []).append(candidate)
        further: dict[tuple[Any, ...], float] = {}
        options = list(self._tunable.options(task, ranked))
        decides = len({_beside(option) for option in options}) > 1
        found = []
        for option in options:
            us = sum(times[c] for c in option.parts.values())
            key = _beside(option)
            if key not in further:
                further[key] = self._further_us(task, option, measure=decides)
            found.append(replace(option, us=us + further[key]))
        return min(found, key=lambda option: option.us, default=None)

    def _further_us(self, task: Task, option: Option, *, measure: bool) -> float:
        """Measured where it decides."""
        if self._meter is None or not measure:
            return self._tunable.further_us(task, option.path, option.parts, self._gpu)
        what = " ".join(("further", *map(str, _beside(option))))
        samples = self._journal.read(task, None, what)
        if samples is None:
            samples = self._meter.further(task, option, ROUGH)
            self._journal.write(task, None, what, samples)
        return math.inf if isinstance(samples, str) else statistics.median(samples or [0.0])

    def _stock_us(self, task: Task, times: Mapping[Candidate, float]) -> float | None:
        stock = self._tunable.stock(task, self._gpu)
        if any(c not in times for c in stock.parts.values()):
            return None
        us = sum(times[c] for c in stock.parts.values())
        return us + self._further_us(task, stock, measure=False)

    def _gains(
        self, task: Task, option: Option, around: Mapping[int, Entry], times: Mapping[Candidate, float]
    ) -> bool:
        """Does the nearest key's choice lose more than is tolerated here?"""
        nearest = around[min(around, key=lambda t: abs(math.log(t / task.tokens)))].option
        us = [times.get(c, math.inf) for c in nearest.parts.values()]
        return option.path != nearest.path or sum(us) > TOLERATED * sum(
            times[c] for c in option.parts.values()
        )


def _beside(option: Option) -> tuple[Any, ...]:
    """What decides which launches an option has besides its parts: the path, its largest tile of tokens, and
    whether products are added up apart."""
    numbers = [c.numbers for c in option.parts.values()]
    return (option.path, max(n.get("tokens", 0) for n in numbers), any(n.get("apart") for n in numbers))


def fault(compiled: Compiled, candidate: Candidate) -> str | None:
    """Why a compile is not worth measuring, or None."""
    if compiled.error is not None:
        return "does not compile"
    if not compiled.fits:
        return "does not fit the shared memory"
    if compiled.spill_bytes > SPILL_BYTES:
        return "spills"
    declares = candidate.request.declares if candidate.request is not None else ()
    return "is emulated" if declares and not compiled.native else None
