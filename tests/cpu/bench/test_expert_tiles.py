"""benchmarks/expert_tiles.py without a GPU: what a file stands for, and comparisons on invented times."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import pytest

from firebox.layers.expert_paths import MODULES, ONE, SORTED, Path

ROOT = FilePath(__file__).resolve().parents[3]
UP, DOWN = (module.Config for module in MODULES[SORTED])
USUAL = Path(SORTED, UP(128, 64, 128), DOWN(128, 64, 128, stages=4), "measured")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import expert_tiles

    return expert_tiles


def test_a_half_runs_beside_the_other_in_use(bench: ModuleType) -> None:
    wanted = {"gate_up": [{"rows": 256, "warps": 8}], "down": [{"stages": 3}, {"tiles": 4}]}
    assert bench.candidates(wanted, USUAL) == [
        Path(SORTED, UP(256, 64, 128, 8), USUAL.down, "candidate"),
        Path(SORTED, USUAL.gate_up, DOWN(128, 64, 128, stages=3), "candidate"),
        Path(SORTED, USUAL.gate_up, DOWN(128, 64, 128, stages=4, tiles=4), "candidate"),
    ]
    assert len(bench.candidates({**wanted, "pairs": True}, USUAL)) == 2
    with pytest.raises(TypeError, match="colour"):
        bench.candidates({"gate_up": [{"colour": 1}]}, USUAL)


def test_another_paths_tiles_take_nothing_from_those_in_use(bench: ModuleType) -> None:
    first, second = (module.Config for module in MODULES[ONE])
    wanted = {"path": ONE, "gate_up": [{"rows": 2, "warps": 4}], "down": [{"rows": 4, "warps": 1}]}
    assert bench.candidates(wanted, USUAL) == [Path(ONE, first(2, 4), second(4, 1), "candidate")]


def test_what_drifts_is_taken_from_both_sides(bench: ModuleType) -> None:
    """The GPU slows down by 1 % from one measurement to the next: nothing is better for having come first."""
    paths = bench.candidates({"down": [{"stages": 3}, {"tiles": 4}, {"rows": 64}]}, USUAL)
    factors = dict(zip(paths, (1.0, 0.9, math.inf), strict=True))
    measured: list[Path] = []

    def time_us(path: Path) -> float:
        measured.append(path)
        return 100.0 * 1.01 ** len(measured) * factors.get(path, 1.0)

    found = bench.compare(paths, USUAL, time_us)
    assert [each.path for each in found] == paths[:2], "what did not run has no time"
    assert [each.ratio for each in found] == pytest.approx([1.0, 0.9], rel=1e-4)
    assert measured[::2] == [USUAL] * 4


@pytest.mark.parametrize(("up", "down"), [(0.9, 0.8), (0.9, 1.0), (1.0, 0.9)])
def test_the_best_of_both_halves_run_together(up: float, down: float, bench: ModuleType) -> None:
    paths = bench.candidates({"gate_up": [{"warps": 8}], "down": [{"tiles": 4}, {"stages": 3}]}, USUAL)
    found = [bench.Found(path, us, 1.0) for path, us in zip(paths, (up, down, 0.95), strict=True)]
    best = paths[1].down if down < 0.95 else paths[2].down
    both = Path(SORTED, paths[0].gate_up, best, "candidate")
    assert bench.together(found, USUAL) == (both if up < 1.0 else None)


def test_an_unknown_shape_is_refused(tmp_path: FilePath) -> None:
    file: Any = tmp_path / "candidates.json"
    file.write_text('[{"shape": "Z", "tokens": 1}]', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "benchmarks/expert_tiles.py", str(file)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "no shape is called 'Z'" in done.stderr, done.stderr
