"""The loop, with tiny servers and a measurement that says what it is told."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from pathlib import Path

import pytest

from firebox.bench.base import Finding
from firebox.errors import ConfigError
from firebox.matrix import run as module
from firebox.matrix.base import Load, Measured, Row, Verdict
from firebox.matrix.processes import belonging
from firebox.matrix.run import run
from firebox.matrix.spec import parse
from firebox.matrix.store import Store

TINY = str(Path(__file__).resolve().parents[2] / "support" / "tiny_server.py")
TEXT = f"""
command = "{{python}} {TINY} {{port}} {{does}}"
[axes.does]
BEHAVIOURS
[load]
concurrency = [1, 2]
[limits]
start_s = 1.5
cell_s = 2
silence_s = 1
stop_s = 0.5
"""


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(module, "SETTLE_S", 0.3)


def rows(load: Load, **changed: object) -> tuple[Row, ...]:
    fields = {"requests": 4, "failed": 0, "verdict": "ok", "output_tok_s_wall": 10.0, **changed}
    return tuple(Row(concurrency=n, **fields) for n in load.concurrency)


def good(url: str, load: Load, **_: object) -> Measured:
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200
    return Measured(rows=rows(load))


def spec_text(*behaviours: str, more: str = "") -> str:
    lines = [f"{name or 'none'} = {{ flags = {[name] if name else []} }}" for name in behaviours]
    return TEXT.replace("BEHAVIOURS", "\n".join(lines).replace("'", '"')) + more


def run_all(tmp_path, measure, *behaviours: str, more: str = "") -> dict[str, object]:
    text = spec_text(*behaviours, more=more)
    store = Store(tmp_path)
    assert run(parse(text), text, store, measure)
    return {attempt.cell.split("~")[0].removeprefix("does-"): attempt.result for attempt in store.attempts()}


def test_each_failure_stays_in_its_cell(tmp_path):
    found = run_all(tmp_path, good, "", "exits", "sick", "deaf", "detached")
    assert {name: result.verdict for name, result in found.items()} == {
        "none": Verdict.STABLE,
        "exits": Verdict.UNKNOWN,
        "sick": Verdict.STARTUP_TIMEOUT,
        "deaf": Verdict.STABLE,
        "detached": Verdict.STABLE,
    }
    assert found["exits"].cause == "the server ended with status 3 before it was healthy"
    assert found["exits"].evidence.exit_code == 3
    assert found["exits"].evidence.last_lines == ("I cannot go on",)
    assert len(found["none"].rows) == 2
    for attempt in Store(tmp_path).attempts():
        assert belonging(attempt.marker, attempt.root) == []


def test_a_command_that_is_not_there(tmp_path):
    text = 'command = "/no/such/server {port} {a}"\n[axes]\na = [1]'
    store = Store(tmp_path)
    assert run(parse(text), text, store, good)
    (attempt,) = store.attempts()
    assert attempt.result.verdict is Verdict.UNKNOWN
    assert "/no/such/server cannot be started: No such file" in attempt.result.cause


def test_a_crash_while_measuring_is_named_by_the_log(tmp_path):
    def asks(url: str, load: Load, *, alive, **_: object) -> Measured:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/work").read()
        while alive():
            time.sleep(0.01)
        return Measured(rows=rows(load, failed=4, verdict="failed"), ended="dead")

    found = run_all(tmp_path, asks, "dies-when-asked")["dies-when-asked"]
    assert (found.verdict, found.evidence.exit_code) == (Verdict.ILLEGAL_INSTRUCTION, 5)
    assert found.evidence.matched == "an illegal instruction was encountered"


def test_what_a_server_says_while_it_is_ended_is_not_its_failure(tmp_path):
    def silent(url: str, load: Load, **_: object) -> Measured:
        return Measured(ended="silent")

    found = run_all(tmp_path, silent, "says-on-term")["says-on-term"]
    assert found.verdict is Verdict.HANG
    assert "illegal instruction" in found.evidence.last_lines[-1], "it did say it"


def test_a_measurement_that_does_not_return_is_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LATE_S", 0.2)

    def stuck(url: str, load: Load, *, alive, **_: object) -> Measured:
        while alive():
            time.sleep(0.05)
        raise AssertionError("nobody waits for this any more")

    found = run_all(tmp_path, stuck, "", more="\n").popitem()[1]
    assert found.verdict is Verdict.HANG


def test_a_measurement_that_fails_is_reported_and_the_next_cell_runs(tmp_path):
    def breaks(url: str, load: Load, **_: object) -> Measured:
        raise ZeroDivisionError("no tokens")

    found = run_all(tmp_path, breaks, "", "deaf")
    assert {result.verdict for result in found.values()} == {Verdict.UNKNOWN}
    assert {result.cause for result in found.values()} == {
        "the measurement failed: ZeroDivisionError: no tokens"
    }


def test_limits_reach_the_measurement(tmp_path):
    got = {}

    def notes(url: str, load: Load, *, deadline_s: float, silence_s: float, alive) -> Measured:
        got.update(deadline_s=deadline_s, silence_s=silence_s, alive=alive(), load=load)
        return Measured(rows=rows(load))

    run_all(tmp_path, notes, "")
    assert (got["deadline_s"], got["silence_s"], got["alive"]) == (2.0, 1.0, True)
    assert got["load"].concurrency == (1, 2)


def test_finished_turns_are_not_run_again_and_new_ones_are(tmp_path):
    ran = []

    def counts(url: str, load: Load, **_: object) -> Measured:
        ran.append(url)
        return Measured(rows=rows(load))

    run_all(tmp_path, counts, "")
    run_all(tmp_path, counts, "")
    assert len(ran) == 1
    run_all(tmp_path, counts, "", "deaf")
    assert len(ran) == 2
    run_all(tmp_path, counts, "", "deaf", more="[repeat]\nrounds = 2")
    assert len(ran) == 4


def test_an_interrupted_turn_is_swept_and_run_again(tmp_path):
    def interrupts(url: str, load: Load, **_: object) -> Measured:
        raise KeyboardInterrupt

    text = spec_text("detached")
    store = Store(tmp_path)
    left = []

    class Runner(module._Runner):
        def _attempt(self, cell, attempt, marker):  # a kill -9: nothing is stopped, nothing is written
            server = module.Server(
                cell.argv, cell.env, port=module.free_port(), log=tmp_path / "x", marker=marker
            )
            assert server.wait_until_healthy("/health", 5)
            left.append((server, marker))
            raise KeyboardInterrupt

    original, module._Runner = module._Runner, Runner
    try:
        with pytest.raises(KeyboardInterrupt):
            run(parse(text), text, store, good)
    finally:
        module._Runner = original
    ((server, marker),) = left
    assert len(belonging(marker)) == 2
    assert run(parse(text), text, store, good)
    assert belonging(marker) == []
    server.wait_for_exit(5)
    assert [attempt.state for attempt in store.attempts()] == ["unfinished", "finished"]
    assert store.attempts()[-1].result.verdict is Verdict.STABLE


def interrupted_twice(store: Store, text: str) -> None:
    spec = parse(text)
    planned = module.cells(spec)
    store.plan(text, planned)
    for _ in range(2):
        store.give_up(store.begin((planned[0].id, 0), "nobody"))


def test_a_cell_that_ends_the_machine_is_retried_unless_the_limit_says_otherwise(tmp_path):
    text = spec_text("")
    interrupted_twice(Store(tmp_path / "a"), text)
    store = Store(tmp_path / "a")
    run(parse(text), text, store, good)
    assert store.attempts()[-1].result.verdict is Verdict.STABLE

    limited = spec_text("").replace("stop_s = 0.5", "stop_s = 0.5\nattempts = 2")
    interrupted_twice(Store(tmp_path / "b"), limited)
    store = Store(tmp_path / "b")
    run(parse(limited), limited, store, good)
    result = store.attempts()[-1].result
    assert result.verdict is Verdict.UNKNOWN
    assert "ended during 2 attempts" in result.cause


def test_a_grid_that_runs_elsewhere_is_left_alone(tmp_path):
    text, store = spec_text(""), Store(tmp_path)
    with store.alone(), pytest.raises(ConfigError, match="another process"):
        run(parse(text), text, Store(tmp_path), good)


def test_guards_decide(tmp_path):
    def garbage(url: str, load: Load, **_: object) -> Measured:
        found = Finding(guard="g", verdict="garbage", why="only '!!!!'")
        return Measured(rows=rows(load, verdict="garbage", output_tok_s_wall=None), findings=(found,))

    result = run_all(tmp_path, garbage, "").popitem()[1]
    assert (result.verdict, result.cause) == (Verdict.GARBAGE, "g: only '!!!!'")
    assert result.evidence.findings[0]["why"] == "only '!!!!'"
