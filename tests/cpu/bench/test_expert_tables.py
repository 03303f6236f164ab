"""benchmarks/experts.py --grid and --smem-limit, without a GPU: numbers of tokens, dips and losses on
recorded times, what is timed and in which order, and the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels._experts import Problem
from firebox.layers.expert_paths import SORTED, Path, default_path

ROOT = FilePath(__file__).resolve().parents[3]
H200 = find_gpu("h200")
PROBLEM = Problem(512, 256, 8, 2, "fp8_channel")
WIDE, NARROW = (default_path(PROBLEM, SORTED, block, H200) for block in (64, 16))
LIMIT = 60_000  # too little for both tiles of WIDE, enough for shorter pipelines

# `benchmarks/experts.py --shapes A` on an H200, 2026-11-21 (docs/log/2026-11-21-gpu-kernels.md): no dip
RECORDED = {1: 19.0, 2: 31.2, 4: 51.4, 8: 86.0, 16: 139.1, 32: 187.4, 64: 211.9, 256: 240.3, 4096: 551.2}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _expert_tables

    return _expert_tables


def rows(times: dict[int, float | None]) -> list[dict[str, Any]]:
    return [
        {"tokens": n, "us": us, "path": "few" if n < 32 else "sorted", "tiles": f"tile{n}", "why": "broken"}
        for n, us in times.items()
    ]


def test_forty_numbers_from_1_to_4096_evenly_by_ratio(tables: ModuleType) -> None:
    grid = tables.grid()
    assert len(set(grid)) == len(grid) == 40 and list(grid) == sorted(grid)
    assert (grid[0], grid[-1]) == (1, 4096) and grid[:8] == (1, 2, 3, 4, 5, 6, 7, 8)
    ratios = [b / a for a, b in pairwise(grid) if b - a > 1]
    assert min(ratios) > 1.15 and max(ratios) < 1.26, ratios
    assert tables.grid(4, 4) == (1, 2, 3, 4) and tables.grid(3, 100) == (1, 10, 100)


def test_recorded_times_have_no_dip_until_one_is_made(tables: ModuleType) -> None:
    assert tables.dips(rows(RECORDED)) == [] and tables.smooth(rows(RECORDED))
    broken = rows(RECORDED | {16: 1.031 * 187.4})
    [(few, more)] = tables.dips(broken)
    assert (few["tokens"], more["tokens"]) == (16, 32) and not tables.smooth(broken)
    assert tables.dips(rows(RECORDED | {16: 1.029 * 187.4})) == [], "three in a hundred are noise"
    assert tables.dips(rows(dict(reversed(RECORDED.items())))) == [], "whatever their order"


def test_a_dip_is_printed_with_both_times_and_paths(tables: ModuleType) -> None:
    lines = tables.dip_lines("A", rows(RECORDED | {16: 200.0}))
    assert lines == [
        "A dip at 16: 200.0 us, few tile16; 32 take 187.4 us, sorted tile32",
        "A dips: 1 of 8",
    ]


def test_what_is_wrong_is_not_timed_and_not_smooth(tables: ModuleType) -> None:
    found = rows(RECORDED | {16: None})
    assert tables.dip_lines("A", found) == ["A 16: not timed, broken", "A dips: 0 of 8"]
    assert not tables.smooth(found)


# ---- what is timed


class FakeBench:
    """Paths of so many microseconds, and the calls for them."""

    name, problem = "A", PROBLEM

    def __init__(self, us: dict[str, float], errors: dict[str, float] | None = None) -> None:
        self.us, self.errors, self.timed, self.checked = us, errors or {}, [], []

    def inputs(self, tokens: int) -> list[Any]:
        return [tokens]

    def error(self, tokens: int, path: Path) -> float:
        assert not self.timed, "every path is checked before the first is timed"
        self.checked.append((tokens, path.why))
        return self.errors.get(path.why, 0.0)

    def limit(self, path: Path) -> float:
        return 0.01

    def time_us(self, calls: list[Any], path: Path, samples: int = 7) -> float:
        why = path.why.partition(", weight-only")[0]
        self.timed.append((calls[0], why, samples))
        return self.us[why] * (1 + 0.5 * (len(self.timed) == 1))  # the first is cold


def row(tables: ModuleType, bench: FakeBench, small: Path, misfits: dict[Any, str] | None = None) -> Any:
    gpus = H200, tables.limited(H200, LIMIT)
    checked = tables.Checked(bench, misfits or {})
    return tables.limit_row(bench, 64, (replace(WIDE, why="free"), gpus[0]), (small, gpus[1]), checked)


def test_both_sides_are_timed_in_turns(tables: ModuleType) -> None:
    bench = FakeBench({"free": 100.0, "small": 104.0})
    found = row(tables, bench, replace(NARROW, why="small"))
    assert (found["us"], found["limited_us"], found["same"]) == (100.0, 104.0, False)
    assert found["ratio"] == pytest.approx(1.04), "medians"
    order = [why for _, why, _ in bench.timed]
    assert order == ["free", "small", "small", "free", "free", "small", "small", "free", "free", "small"]
    assert {samples for _, _, samples in bench.timed} == {1}


def test_the_same_path_is_not_timed(tables: ModuleType) -> None:
    bench = FakeBench({})
    found = row(tables, bench, replace(WIDE, why="small"))
    assert found["same"] and found["ratio"] == 1.0 and bench.timed == []
    assert "the same path" in tables.limit_lines("A", [found])[0]


def test_a_wrong_path_and_one_that_does_not_fit_have_no_time(tables: ModuleType) -> None:
    bench = FakeBench({}, {"small": 0.5})
    wrong = row(tables, bench, replace(NARROW, why="small"))
    assert wrong["ratio"] is None and "relative error is 0.5, the limit 0.01" in wrong["why"]
    small = replace(WIDE, why="small")
    misfits = {(PROBLEM, small, tables.limited(H200, LIMIT)): "gate_up_sorted: 90000 bytes"}
    large = row(tables, FakeBench({}), small, misfits)
    assert large["ratio"] is None and large["why"] == "gate_up_sorted: 90000 bytes"
    for found in (wrong, large):
        assert tables.loss([found]) is None and not tables.acceptable([found])
        assert "not timed" in tables.limit_lines("A", [found])[0]


def test_a_shape_s_loss_is_the_geometric_mean(tables: ModuleType) -> None:
    ratios = [{"ratio": ratio, "same": ratio == 1.0, "tokens": 1, "tiles": "t"} for ratio in (1.0, 1.21)]
    ratios[1] |= {"us": 100.0, "limited_us": 121.0, "limited_tiles": "l", "why": "measured"}
    assert tables.loss(ratios) == pytest.approx(1.1) and not tables.acceptable(ratios)
    lines = tables.limit_lines("A", ratios)
    assert lines[1] == "A 1: 100.0 us t; limited 121.0 us l; 1.210 (measured)"
    assert lines[2] == "A loses 10.0 % (1 of 2 numbers of tokens differ)"
    for mean, good in ((1.08, True), (1.0801, False)):
        assert tables.acceptable([{"ratio": mean**2}, {"ratio": 1.0}]) is good


def test_a_grid_checks_every_compile_once_and_first(tables: ModuleType) -> None:
    """Without an entry in tuned/ there are two paths: few up to 16 tokens, of which 1, 2 … 3, 4 … 8 and 9 …
    16 are compiled apart, and sorted, in blocks of 32 and 64."""
    bench = FakeBench({"default": 5.0})
    found = tables.grid_rows(bench, H200, (1, 2, 8, 9, 16, 17, 40, 100, 900), {})
    assert [tokens for tokens, _ in bench.checked] == [1, 2, 8, 9, 17, 900]
    assert [tokens for tokens, _, _ in bench.timed] == [1, 2, 8, 9, 16, 17, 40, 100, 900]
    assert {samples for _, _, samples in bench.timed} == {tables.GRID_SAMPLES}
    assert found[0]["us"] == 7.5 and found[5]["path"] == "sorted" and found[5]["tiles"].startswith("256x")


# ---- all of it, compiled


def test_paths_are_chosen_compiled_and_compared(
    tables: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: FilePath,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "binaries"))
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)

    class Bench(FakeBench):
        def time_us(self, calls: list[Any], path: Path, samples: int = 7) -> float:
            return 110.0 if path.why != "default" else 100.0

        def error(self, tokens: int, path: Path) -> float:
            return 0.0

    [found] = tables.run_limit(["A"], {"A": PROBLEM}, lambda name: Bench({}), H200, [900], LIMIT)
    assert found[0]["ratio"] == pytest.approx(1.1) and "another gate_up" in found[0]["why"]
    said = capsys.readouterr().out
    assert "0 paths do not fit" in said and "A loses 10.0 %" in said
    [[grid]] = tables.run_grid(["A"], {"A": PROBLEM}, lambda name: Bench({}), H200, [900])
    assert grid["us"] == 100.0 and "900:100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shapes", "A,Z"), "no shape is called 'Z'; there are: A, B, "),
        (("--grid", "--smem-limit", "101376"), "not allowed with argument --grid"),
        (("--grid", "--shapes", "A"), "this benchmark needs an NVIDIA GPU"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_do(arguments: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/experts.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
