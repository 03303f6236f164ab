"""Before the port opens, every launch of the plan is made once on this GPU, at the lowest and the highest
number of tokens of each of its ranges, and compared with its reference (engine/trials.py).

A choice whose result is wrong, or whose launch raises (engine/_attempt.py), is not made again in this process
(kernels/_veto.py): the next candidate, another tile or another path, takes its place, is compiled, and is
tested in its turn; the ledger's row says so. Under --strict, where there is no other candidate, and where the
GPU cannot be used any more, the start is refused.

    FIREBOX_CACHE_DIR/self_test/<hash>.json      a plan that passed; tested again only if GPU, driver,
                                                 versions, Firebox's own code or the plan are others

A plan that passed only with replacements is not kept: the next start tests again. Kernels of ours that no
trial makes are named at every start, and refused under --strict.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from firebox.engine._attempt import LaunchFailed, Result, Setup
from firebox.engine.trials import trial_of
from firebox.env import read
from firebox.errors import LaunchRefused
from firebox.hardware.probe import driver_version
from firebox.kernels import _veto, launch
from firebox.kernels._result_cache import ResultCache
from firebox.kernels.compile import CompileRequest, request_key
from firebox.kernels.plan import Operation, Planned

log = logging.getLogger(__name__)
OTHER_VERSIONS = "another version of Triton or of the driver; --self-test off starts all the same"
AUTO, ON, OFF = "auto", "on", "off"
ROOMS = ("kernels", "formats", "layers", "attention", "engine")  # whose code decides what a test finds


@dataclass(frozen=True)
class Findings:
    """What a test of a whole plan found. `untested`: kernels of launches that no trial made."""

    results: tuple[Result, ...]
    untested: tuple[str, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Result, ...]:
        """In the order in which they were found."""
        return tuple(result for result in self.results if not result.passed)

    def sentence(self) -> str:
        """For --explain."""
        said = f"self-test: {len(self.results)} results in {self.seconds:.1f} s, all within their limits"
        return f"{said}{_not_tested(self.untested)}"


def self_test(
    plan: Callable[[], Sequence[Planned]], setup: Setup, *, mode: str, strict: bool
) -> Iterator[str]:
    """Tests what `plan` says, again after each replacement, until all is right; lines of text for --explain.
    Raises LaunchRefused."""
    if mode == OFF:
        yield "self-test: off"
        return
    cache, replaced = ResultCache(read().cache_dir / "self_test"), False
    while True:
        rows = plan()
        key = _key(rows, setup)
        passed = cache.read(key) if mode == AUTO and not replaced else None
        if passed is not None:
            _refuse_untested(passed["untested"], strict)
            yield f"self-test: this plan has passed on this GPU before{_not_tested(passed['untested'])}"
            return
        found = test(rows, setup)
        if not found.failures:
            if not replaced:
                cache.write(key, {"results": len(found.results), "untested": found.untested})
            _refuse_untested(found.untested, strict)
            log.info("%s", found.sentence())
            yield found.sentence()
            return
        yield from _replace(found.failures, strict)
        replaced = True


def test(rows: Iterable[Planned], setup: Setup) -> Findings:
    """Every operation's launches at the ends of their ranges. What a trial raises besides LaunchFailed is a
    mistake of our own and is not caught. Raises LaunchRefused where no further launch can be made."""
    began, rows = time.perf_counter(), list(rows)
    made: list[CompileRequest] = []
    launch.OBSERVERS.append(made.append)
    results: list[Result] = []
    try:
        for operation, tokens in _wanted(rows).items():
            results += _tried(operation, setup, sorted(tokens))
    finally:
        launch.OBSERVERS.remove(made.append)
    setup.release()
    keys = {_identity(request) for request in made}
    missing = [r.request for r in rows if r.request is not None and _identity(r.request) not in keys]
    untested = dict.fromkeys(request.kernel.__name__ for request in missing)
    return Findings(tuple(results), tuple(untested), time.perf_counter() - began)


@torch.inference_mode()
def _tried(operation: Operation, setup: Setup, tokens: Sequence[int]) -> list[Result]:
    trial, results = trial_of(operation, setup), list[Result]()
    if trial is None:
        return results
    for count in tokens:
        try:
            results += trial(count)
        except LaunchFailed as failed:
            results.append(failed.result)
            if setup.is_lost():
                said = f"{_said(failed.result)}; the GPU cannot be used any more, so nothing else was tried"
                raise LaunchRefused(said, hint="another version of Triton or of the driver") from failed
    return results


def _wanted(rows: Iterable[Planned]) -> dict[Operation, set[int]]:
    """Operation → numbers of tokens."""
    found: dict[Operation, set[int]] = {}
    for row in rows:
        found.setdefault(row.operation, set()).update((row.first, row.last))
    return found


def _replace(failures: Sequence[Result], strict: bool) -> Iterator[str]:
    """Vetoes the choices; a line for each. Raises LaunchRefused where that is not possible."""
    for result in failures:
        said = _said(result)
        if strict:
            raise LaunchRefused(f"--strict: {said}", hint="without --strict the next candidate is taken")
        if result.choice is None or _veto.why_not(result.choice) is not None:
            raise LaunchRefused(f"{said}; nothing else could run instead", hint=OTHER_VERSIONS)
    for result in {result.choice: result for result in reversed(failures)}.values():
        assert result.choice is not None
        why = f"{result.launch}, {result.failure} at {result.tokens} tokens"
        _veto.veto(result.choice, why)
        log.warning("self-test: not %s", why)
        yield f"self-test: not {why}"


def _refuse_untested(kernels: Sequence[str], strict: bool) -> None:
    """For --strict: LaunchRefused if the plan has kernels of ours that no trial makes."""
    if strict and kernels:
        said = f"--strict: {', '.join(kernels)} would run untested: engine/trials.py does not try them"
        raise LaunchRefused(said, hint="without --strict they run, and --explain names them")


def _not_tested(kernels: Sequence[str]) -> str:
    return f"; not tested: {', '.join(kernels)}" if kernels else ""


def _said(result: Result) -> str:
    limit = "" if result.raised else f", the limit is {result.limit:.3g}"
    return f"{result.launch} failed its test at {result.tokens} tokens: {result.failure}{limit}"


def _identity(request: CompileRequest) -> str:
    """Tells compiles apart, under Triton's interpreter too, where nothing is compiled."""
    if not launch.INTERPRETED:
        return request_key(request)
    constants = {name: str(value) for name, value in request.constexprs.items() if name != "PDL"}
    return repr((request.kernel.__name__, request.signature, constants, request.num_warps))


def _key(rows: Iterable[Planned], setup: Setup) -> str:
    """Of everything that decides whether a test passes."""
    requests = [_identity(row.request) for row in rows if row.request is not None]
    tokens = [(row.first, row.last) for row in rows]
    machine = (setup.gpu.name, setup.gpu.sms, driver_version(), torch.__version__, str(setup.device))
    return hashlib.sha256(repr((machine, sources(), requests, tokens)).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """A hash of the code in ROOMS."""
    root, found = Path(str(resources.files("firebox"))), hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()
