"""benchmarks/engine.py: dips and losses on invented times, what is run for them and with which status it
ends, and the start and streams of real servers on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SMOOTH = {1: 2.0, 2: 3.0, 4: 4.2, 8: 5.6, 16: 9.0, 17: 9.1, 32: 13.0}  # batch → ms


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import engine

    return engine


@pytest.fixture
def tables(engine: ModuleType) -> ModuleType:
    return sys.modules["_step_tables"]


def report(ms: dict[int, float], *, void: Sequence[int] = (), context: int = 128) -> dict[str, Any]:
    rows = [
        {"context": context, "batch": n, "ms_per_token": value, "void": "alike" if n in void else None}
        for n, value in ms.items()
    ]
    return {"decode": rows, "not_measured": []}


# ---- dips


def test_batches_of_dips_are_those_asked_for(tables: ModuleType) -> None:
    assert tables.BATCHES[:16] == tuple(range(1, 17)) and tables.BATCHES[-1] == 256
    assert list(tables.BATCHES) == sorted(set(tables.BATCHES))
    for edge in (16, 32, 64, 128):
        assert {edge, edge + 1} <= {*tables.BATCHES}


def test_a_dip_takes_more_than_3_percent_longer_than_the_next_larger(tables: ModuleType) -> None:
    assert tables.dips(SMOOTH) == []
    assert tables.dips(SMOOTH | {16: 1.031 * 9.1}) == [(16, 17)]
    assert tables.dips(SMOOTH | {16: 1.029 * 9.1}) == [], "noise"
    assert tables.dips(SMOOTH | {16: 20.0, 17: 14.0}) == [(16, 17), (17, 32)]
    assert tables.dips(dict(reversed((SMOOTH | {1: 3.5}).items()))) == [(1, 2)], "whatever their order"


class Runs:
    """Reports in turn; what was asked for."""

    def __init__(self, *reports: dict[str, Any]) -> None:
        self.reports, self.asked = list(reports), list[Any]()

    def __call__(self, asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        return self.reports.pop(0)


def test_without_a_suspect_nothing_is_measured_again(tables: ModuleType, engine: ModuleType) -> None:
    runs = Runs(report(SMOOTH))
    found = tables.measured_dips(tuple(SMOOTH), runs)
    assert runs.asked == [tuple(SMOOTH)] and found["dips"] == found["suspects"] == found["missing"] == []
    assert dict(zip(found["sizes"], found["ms"], strict=True)) == SMOOTH
    assert tables.dip_lines(found) == ["dips of more than 3%: 0 of 6"] and not engine._failed(found)


def test_what_looks_like_a_dip_is_one_if_it_looks_so_again(tables: ModuleType, engine: ModuleType) -> None:
    """Batch 1 was slow once, 16 is slow."""
    runs = Runs(report(SMOOTH | {1: 5.0, 16: 12.0}), report({1: 2.0, 2: 3.0, 16: 11.0, 17: 9.1, 32: 13.0}))
    found = tables.measured_dips(tuple(SMOOTH), runs)
    assert runs.asked[1] == [1, 2, 16, 17, 32], "both of each pair, and the largest"
    assert found["dips"] == [(16, 17)] and found["missing"] == []
    assert tables.dip_lines(found) == [
        "no dip the second time at batch 1: 5.000 ms, 3.000 at 2; again 2.000, 3.000 at 2",
        "dip at batch 16: 12.000 ms, 9.100 at 17; again 11.000, 9.100 at 17",
        "dips of more than 3%: 1 of 6",
    ]
    assert engine._failed(found)


@pytest.mark.parametrize(("again", "missing"), [({1: 5.0, 32: 13.0}, [2, 8]), ({}, [1, 2, 8, 32])])
def test_a_figure_that_is_missing_is_no_good_answer(
    tables: ModuleType, engine: ModuleType, again: dict[int, float], missing: list[int]
) -> None:
    first = report(SMOOTH | {1: 5.0}, void=[8])
    found = tables.measured_dips(tuple(SMOOTH), Runs(first, report(again)))
    assert found["dips"] == [] and found["missing"] == missing
    assert found["ms"][3] is None, "a void row has no figure"
    assert f"no figure at batch {', '.join(map(str, missing))}" in tables.dip_lines(found)
    assert engine._failed(found)


# ---- the limit


def test_a_loss_is_the_geometric_mean_of_means(tables: ModuleType, engine: ModuleType) -> None:
    """The GPU gets 10 % slower from each process to the next, and back."""
    first, last = (report({1: a, 8: b}) for a, b in ((1.8, 4.5), (2.2, 5.5)))
    limited = report({1: 2.1, 8: 5.25})
    runs = Runs(first, limited, limited, last)
    found = tables.measured_limit(runs)
    assert runs.asked == [False, True, True, False]
    assert [(row["ms"], row["limited_ms"]) for row in found["rows"]] == [
        pytest.approx((2.0, 2.1)),
        pytest.approx((5.0, 5.25)),
    ]
    assert found["ratio"] == pytest.approx(1.05)
    lines = tables.limit_lines(found)
    assert lines[1].split() == ["128", "1", "2.000", "2.100", "5.0%"] and "loses 5.0%" in lines[3]


@pytest.mark.parametrize(("slower", "good"), [(1.0, True), (1.049, True), (1.051, False), (1.3, False)])
def test_a_loss_over_5_percent_fails(
    tables: ModuleType, engine: ModuleType, slower: float, good: bool
) -> None:
    """Of two rows one loses."""
    free, limited = report({1: 2.0, 8: 5.0}), report({1: 2.0 * slower**2, 8: 5.0})
    found = tables.measured_limit(Runs(free, limited, limited, free))
    assert found["ratio"] == pytest.approx(slower) and found["missing"] == []
    assert tables.acceptable(found) is good and engine._failed(found) is not good
    assert ("at most 5%" in tables.limit_lines(found)[-1]) is good


def test_a_row_of_one_side_is_no_loss_of_nothing(tables: ModuleType, engine: ModuleType) -> None:
    free, limited = report({1: 2.0, 8: 5.0}), report({1: 2.0, 8: 5.0}, void=[8])
    found = tables.measured_limit(Runs(free, free, limited, free))
    assert found["ratio"] is None and found["missing"] == [(128, 8)] and engine._failed(found)
    assert tables.limit_lines(found)[-2:] == [
        "no figure at context 128 batch 8",
        "loses nobody knows what: a figure is missing",
    ]
    nothing = tables.measured_limit(Runs(*[{"failed": "status 1"}] * 4))
    assert nothing["ratio"] is None and engine._failed(nothing)


# ---- the command line, with a model's process put in its place

PROCESS = """#!{python}
import json, os, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
batches = [int(n) for n in flags["--batches"].split(",")]
slower = {{"": 1.0, "101376": 1.04}}[os.environ.get("FIREBOX_SMEM_LIMIT", "")]
ms = {{n: (2.0 + n) * slower for n in batches}}
ms |= {{n: 100.0 for n in batches if n == {slow}}}
at = {{"context": int(flags["--contexts"]), "void": None}}
rows = [at | {{"batch": n, "ms_per_token": ms[n]}} for n in batches]
print("a table")
print(json.dumps({{"decode": rows, "not_measured": [], "argv": sys.argv[1:]}}))
"""


def ended(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path,
    *arguments: str, slow: int = 0,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Exit status and JSON; a step takes 2 + batch ms, but of a `slow` batch, and 4 % more with the limit."""
    process = folder / "python"
    process.write_text(PROCESS.format(python=sys.executable, slow=slow))
    process.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(engine.sys, "executable", str(process))
        patch.setattr(engine.sys, "argv", ["engine.py", "--json", *arguments])
        status = engine.main()
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_dips_of_a_model(
    engine: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    status, found = ended(engine, monkeypatch, capsys, tmp_path, "--dips", "x:layers=2", "--", "--strict")
    assert status == 0 and found["dips"] == [] and found["sizes"] == [*range(1, 17), *found["sizes"][16:]]
    (only,) = (" ".join(report["argv"]) for report in found["models"])
    assert "bench offline x --layers 2 --load-format dummy" in only and "--contexts 128 --tokens 32" in only
    assert "--prefill  --no-profile" in only and "--strict --batches 1,2,3," in only
    status, found = ended(
        engine, monkeypatch, capsys, tmp_path, "--dips", "x", "--batches", "4,8,20", "--tokens", "9", slow=8
    )
    assert status == 1 and found["dips"] == [[8, 20]] and found["ms"] == [6.0, 100.0, 22.0]
    assert found["suspects"] == [{"sizes": [8, 20], "ms": [100.0, 22.0], "ms_again": [100.0, 22.0]}]
    assert " ".join(found["models"][1]["argv"]).count("--tokens 9 --batches 8,20") == 1


def test_limit_of_a_model(
    engine: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "90000")  # must not reach the side without a limit
    rows = ["--batches", "1,8", "--contexts", "128", "--budget-s", "400"]
    status, found = ended(engine, monkeypatch, capsys, tmp_path, "--smem-limit", "x", *rows)
    assert status == 0 and found["ratio"] == pytest.approx(1.04) and found["smem_bytes"] == 101_376
    assert [row["ms"] for row in found["rows"]] == [3.0, 10.0]
    assert len(found["models"]) == 4
    assert all("--within 100 --json" in " ".join(report["argv"]) for report in found["models"])


def test_a_void_row_fails_the_benchmark(engine: ModuleType) -> None:
    good = {"models": [report({1: 2.0})], "not_measured": []}
    assert not engine._failed(good)
    assert engine._failed({"models": [report({1: 2.0}), report({8: 2.0}, void=[8])], "not_measured": []})


def test_streams_are_not_compared_with_a_void_row(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "offline", lambda model, flags, within_s: report({4: 2.0}, void=[4]))
    found = engine.over_http("firebox-tiny", [], 4, 16, 8)
    assert found["failed"] == "no offline rate: alike" and engine._failed(found)


# ---- real servers


def run(*arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """The JSON that it prints, with the bundled model on a CPU."""
    command = [sys.executable, "benchmarks/engine.py", *arguments, "--json", "--", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


def test_the_port_is_open_within_seconds_and_servers_end() -> None:
    found, done = run("--port-open", "firebox-tiny")
    assert 0.3 < found["warm_s"] < 60 and 0.3 < found["cold_s"] < 60
    assert f"/health after {found['cold_s']} s cold, {found['warm_s']} s warm" in done.stdout
    assert done.stderr.count("serves firebox-tiny at http://127.0.0.1:") == 2


def test_streams_over_http_beside_the_same_batch_offline() -> None:
    sizes = ["--streams", "3", "--prompt-tokens", "16", "--output-tokens", "12"]
    found, _ = run("--http", "firebox-tiny", *sizes)
    (row,), served = found["offline"]["decode"], found["served"]
    assert (row["batch"], row["context"], row["steps"]) == (3, 16, 12)
    assert found["offline"]["context_tokens"] == 4096, "graphs are those of the longest context"
    assert (served["streams"], served["failed"]) == (3, [])
    for name in ("tokens_per_s", "decode_tokens_per_s"):
        share = served[name] / row["tokens_per_s"]
        assert found["share_of_offline"][name] == pytest.approx(share, abs=0.001) and share > 0
    assert 11 <= served["eager_decode_steps"] <= 3 * 12, "a stream's first token is its prompt's"
    assert set(served["steps"]) == {"eager/no graphs on a CPU"}
