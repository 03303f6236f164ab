"""`firebox tune`: what it refuses before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebox.cli.tune import seconds, tune
from firebox.errors import ConfigError
from firebox.tuning.entries import interleave_keys
from firebox.tuning.run import SIZES, sizes_of
from firebox.tuning.search import KEYS


@pytest.mark.parametrize(("text", "wanted"), [("180s", 180.0), ("5m", 300.0), ("1.5h", 5400.0), ("90", 90.0)])
def test_budgets(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "0s", "-5s", "5 minutes", "s"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        seconds(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"op": "everything"}, "--op everything"),
        ({"predict": False}, "no gb10 here to measure on"),
        ({"gpu": None, "predict": True}, "no GPU here"),
        ({"prove": True}, "--prove"),
        ({"gpu": "gb11"}, "no GPU is called 'gb11'"),
        ({"tp": 3}, "--tp 3: "),
        ({}, "nothing to tune for --op moe on gb10"),
    ],
)
def test_refusals(given: dict[str, object], said: str, tmp_path: Path) -> None:
    """The bundled model computes in float32, for which there are no kernels on a GPU."""
    call = {"model": "firebox-tiny", "gpu": "gb10", "predict": True, "out": tmp_path} | given
    with pytest.raises(ConfigError, match=said):
        tune(**call)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_sizes_that_occur() -> None:
    assert sizes_of(0, 512, 4096) == SIZES
    drafted = sizes_of(3, 700, 2048)
    assert {4, 8, 16, 32, 700} <= set(drafted) and max(drafted) <= 2048
    full, between = interleave_keys(KEYS, drafted)
    assert set(full) <= set(KEYS) and set(full) | set(between) >= set(drafted)
