"""examples/matrix/firebox-cpu-faults.toml: 36 servers, most of which fail; the runner is killed ten times.

What each cell must come to is written down here, from the example's description, not read from its code.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.conftest import serving
from tests.support.server_process import wait_for

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "examples" / "matrix" / "firebox-cpu-faults.toml"
KILLS, SEED = 10, 20261121
START_S = 300

# (moe, graph, attention, ep) → verdict; what is not here is left out by the constraints
EXPECTED = {
    ("triton", "off", "paged", 1): "STABLE",
    ("triton", "off", "paged", 2): "STABLE",
    ("triton", "off", "flash", 1): "STARTUP_TIMEOUT",
    ("triton", "off", "flash", 2): "NCCL",
    ("triton", "decode", "paged", 1): "STABLE",
    ("triton", "decode", "paged", 2): "COMPILE_ERROR",
    ("triton", "full", "paged", 1): "STABLE",
    ("triton", "full", "paged", 2): "STABLE",
    ("triton", "full", "flash", 1): "OUT_OF_SHARED_MEMORY",
    ("cutlass", "off", "paged", 1): "STABLE",
    ("cutlass", "off", "paged", 2): "GARBAGE",
    ("cutlass", "off", "flash", 1): "HANG",
    ("cutlass", "off", "flash", 2): "GARBAGE",
    ("cutlass", "decode", "paged", 1): "STABLE",
    ("cutlass", "decode", "paged", 2): "GARBAGE",
    ("marlin", "off", "paged", 1): "STABLE",
    ("marlin", "off", "paged", 2): "OUT_OF_MEMORY",
    ("marlin", "off", "flash", 1): "ILLEGAL_INSTRUCTION",
    ("marlin", "off", "flash", 2): "NCCL",
    ("marlin", "decode", "paged", 1): "UNKNOWN",
    ("marlin", "decode", "paged", 2): "OUT_OF_MEMORY",
    ("marlin", "full", "paged", 1): "REPETITION",
    ("marlin", "full", "paged", 2): "REPETITION",
    ("marlin", "full", "flash", 1): "REPETITION",
    **{
        (moe, "piecewise", attention, ep): "OUT_OF_SHARED_MEMORY"
        for moe in ("triton", "cutlass", "marlin")
        for attention in ("paged", "flash")
        for ep in (1, 2)
    },
}
EXPLAINED = [
    "all 12 cells with graph=piecewise: OUT_OF_SHARED_MEMORY",
    "all 3 cells with moe=marlin and graph=full: REPETITION",
    "all 3 other cells with moe=cutlass and ep=2: GARBAGE",
    "both other cells with moe=marlin and ep=2: OUT_OF_MEMORY",
    "both other cells with attention=flash and ep=2: NCCL",
]


@pytest.mark.timeout(600)
def test_ten_kills_and_every_cell_is_judged_once_and_rightly(tmp_path: Path) -> None:
    with serving():
        pass  # kernels are compiled once a machine, and no cell shall wait for that
    out = tmp_path / "grid"
    killed = kill_ten_times(out)
    document = json.loads(run(out).splitlines()[-1])

    found = {tuple(cell["axes"].values()): cell["verdict"] for cell in document["cells"]}
    assert found == EXPECTED
    assert len(document["cells"]) == len(EXPECTED) == 36
    assert_every_turn_once(out, killed)
    assert left_over(out) == []

    assert sorted(rule["sentence"] for rule in document["explanations"]) == sorted(EXPLAINED)
    assert_rows(document)
    assert_again_is_the_same(out, document)


def kill_ten_times(out: Path) -> int:
    """Starts the runner and kills it after a while, again and again; returns how often it was running."""
    random_ = random.Random(SEED)
    killed = sum(kill(out, random_.uniform(0.4, 2.5), aimed=turn % 2 == 1) for turn in range(KILLS))
    assert killed == KILLS, "the grid was through before it had been killed ten times"
    return killed


def kill(out: Path, seconds: float, *, aimed: bool) -> bool:
    """Starts the runner and kills it so long after its start; `aimed`: after it has begun another attempt.
    Was it running?"""
    before, runner = attempts(out), start(out)
    if aimed:
        wait_for(lambda: attempts(out) > before or runner.poll() is not None, START_S)
    time.sleep(seconds)
    running = runner.poll() is None
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    return running


def attempts(out: Path) -> int:
    """How many have begun."""
    if not (out / "matrix.sqlite").exists():
        return 0
    with sqlite3.connect(out / "matrix.sqlite") as db:
        there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone()
        return db.execute("SELECT count(*) FROM attempts").fetchone()[0] if there else 0


def start(out: Path) -> subprocess.Popen[bytes]:
    with (out.parent / "runner.log").open("ab") as log:
        return subprocess.Popen(
            command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, env=environment()
        )


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "firebox", "matrix", "run", str(SPEC), "--out", str(out), "--json"]


def run(out: Path) -> str:
    done = subprocess.run(
        command(out),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def assert_every_turn_once(out: Path, killed: int) -> None:
    with sqlite3.connect(out / "matrix.sqlite") as db:
        states = list(db.execute("SELECT cell, state FROM attempts"))
    finished = Counter(cell for cell, state in states if state == "finished")
    assert len(finished) == 36
    assert set(finished.values()) == {1}, "a cell has two results"
    interrupted = sum(state == "unfinished" for _, state in states)
    assert 0 < interrupted <= killed
    assert not any(state == "running" for _, state in states)


def left_over(out: Path) -> list[str]:
    """Processes of any attempt that still live: found by the markers in the store."""
    with sqlite3.connect(out / "matrix.sqlite") as db:
        markers = [marker.encode() for (marker,) in db.execute("SELECT marker FROM attempts")]
    assert markers
    alive = []
    for folder in Path("/proc").iterdir():
        try:
            environ = (folder / "environ").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        if any(marker in environ for marker in markers):
            alive.append((folder / "cmdline").read_text(errors="replace").replace("\0", " "))
    return alive


def assert_rows(document: dict) -> None:
    for cell in document["cells"]:
        if cell["verdict"] == "STABLE":
            assert [row["concurrency"] for row in cell["rows"]] == [1, 2]
            for row in cell["rows"]:
                assert row["failed"] == 0 and row["verdict"] == "ok" and row["tokens_counted_by"] == "usage"
                assert row["output_tok_s_wall"] > 0 and {"p50", "p90", "p99"} <= set(row["ttft_ms"])
        else:
            assert all(row["output_tok_s_wall"] is None for row in cell["rows"] if row["verdict"] != "ok")
    best = document["best"]
    stable = {cell["cell"] for cell in document["cells"] if cell["verdict"] == "STABLE"}
    assert set(best) == {"1", "2"} and {best["1"]["cell"], best["2"]["cell"]} <= stable


def assert_again_is_the_same(out: Path, document: dict) -> None:
    """The whole grid once more runs nothing, and `matrix report` says the same from the file alone."""
    began = time.monotonic()
    assert json.loads(run(out).splitlines()[-1]) == document
    assert time.monotonic() - began < 20
    command = [sys.executable, "-m", "firebox", "matrix", "report", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(done.stdout) == document
