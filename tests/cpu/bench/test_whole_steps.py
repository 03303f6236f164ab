"""benchmarks/whole_steps.py without a GPU: what of a model's step it may change, how that is written and read
again, and the search on invented times."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of
from tests.support.planning import opened

ROOT = FilePath(__file__).resolve().parents[3]
H200 = find_gpu("h200")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import whole_steps

    return whole_steps


def spots_of(steps: ModuleType, card: str, tokens: int) -> dict[str, Any]:
    layers = layers_of(opened(card).model, Setting(H200, page_tokens=64))
    found = sys.modules["_step_spots"].spots(layers, tokens, H200)
    assert len({(spot.file, spot.key) for spot in found}) == len(found)
    return {f"{spot.name} {spot.file} {spot.key.split()[0]}": spot for spot in found}


def test_every_choice_of_a_step_is_a_spot(steps: ModuleType) -> None:
    one, many = (spots_of(steps, "qwen3-30b-a3b", tokens) for tokens in (1, 64))
    shared = [
        "rope_attention attention rope_decode",
        "rope_attention attention decode",
        "experts experts bf16",
    ]
    shared += [f"{name} linear bf16" for name in ("qkv", "o", "router", "head")]
    assert set(many) == set(shared)
    assert set(one) == {*shared, "norm_qkv linear norm", "norm_route route bf16"}
    assert set(one["qkv linear bf16"].space) == {"one", "few", "cublas"}
    assert set(many["qkv linear bf16"].space) == {"few", "many", "cublas"}
    assert set(spots_of(steps, "glm-4.5-air-fp8", 64)["qkv linear fp8_channel"].space) == {
        "few",
        "many",
        "cublas",
    }
    assert set(one["experts experts bf16"].space) == {"one", "few", "sorted"}
    gpt_oss = spots_of(steps, "gpt-oss-120b", 1)
    assert len([name for name in gpt_oss if name.startswith("rope_attention attention")]) == 2
    windows = layers_of(opened("gpt-oss-120b").model, Setting(H200, page_tokens=64))
    assert len(sys.modules["_step_spots"].spots(windows, 1, H200)) == len(gpt_oss) + 2, (
        "windows have their own"
    )


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("card", ["qwen3-30b-a3b", "gpt-oss-120b", "glm-4.5-air-fp8"])
def test_what_is_near_is_something_else_that_exists(steps: ModuleType, card: str, tokens: int) -> None:
    for name, spot in spots_of(steps, card, tokens).items():
        near = list(spot.near(spot.now, 4))
        assert near and spot.now not in near, name
        for path, tile in near:
            if (path, tile) in spot.elsewhere:
                continue
            if spot.file == "experts":
                halves = zip(spot.space[path], tile, strict=True)
                assert any(half in space for space, half in halves), (name, path, tile)
            else:
                assert tile in spot.space[path], (name, path, tile)
        paths = {path for path, _ in near}
        assert len(spot.space) == 1 or spot.file == "experts" or paths - {spot.now[0]}, (
            "no other path is tried"
        )


@pytest.mark.parametrize("card", ["qwen3-30b-a3b", "gpt-oss-120b"])
def test_what_is_written_is_what_runs(steps: ModuleType, card: str, tmp_path: FilePath) -> None:
    found = list(spots_of(steps, card, 1).values())
    changed = {(spot.file, spot.key): next(iter(spot.near(spot.now, 2))) for spot in found}
    steps.write(tmp_path, H200, found, changed, 1)
    for file in (tmp_path / _tuned.folder(H200.name)).glob("*.json"):
        assert all(set(entries) == {"1"} for entries in json.loads(file.read_text()).values())
    try:
        steps.forget()
        _tuned.use(_tuned.roots()[0], tmp_path)
        again = {(spot.file, spot.key): spot.now for spot in spots_of(steps, card, 1).values()}
        assert again == changed
    finally:
        _tuned.use()
        steps.forget()
    assert {(s.file, s.key): s.now for s in spots_of(steps, card, 1).values()} == {
        (spot.file, spot.key): spot.now for spot in found
    }


def test_the_settings_are_those_of_one_row_of_decode(steps: ModuleType) -> None:
    """And the model is the one that is cut and requantised."""
    settings = steps.settings_of("gpt-oss-20b", 4, 2, "fp8")
    assert (settings.batches, settings.contexts, settings.prefills) == ([4], [128], [])
    config = settings.config
    assert (config.model.layers, config.model.requantize, config.model.load_format) == (2, "fp8", "dummy")
    found = {spot.name: spot for spot in steps.model_spots(settings, 4, H200)}
    assert found["qkv"].key.startswith("fp8_channel") and found["experts"].key.startswith("mxfp4")


def descended(steps: ModuleType, found: list[Any], cost: Any, seconds: int = 10**6) -> tuple[Any, float, int]:
    """The search with `cost` of the choices; a measurement takes a second."""
    asked = []

    def measure(choices: Any) -> float:
        asked.append(choices)
        return float(cost({**{(s.file, s.key): s.now for s in found}, **choices}))

    best, least = steps.descend(found, measure, 8, lambda: len(asked) < seconds, lambda line: None)
    return best, least, len(asked)


def test_the_search_finds_what_is_better_together(steps: ModuleType) -> None:
    """Rows and stages have one best value each."""
    found = [s for name, s in spots_of(steps, "qwen3-30b-a3b", 8).items() if name.startswith(("qkv", "o "))]

    def cost(choices: Any) -> float:
        tiles = [tile for _, tile in choices.values()]
        off = sum(3.0 if tile is None else abs(math.log2(tile.rows / 128)) for tile in tiles)
        return 10 + off + 0.2 * sum(getattr(tile, "stages", 9) != 4 for tile in tiles)

    best, least, _ = descended(steps, found, cost)
    assert least == 10.0 and len(best) <= 2
    assert descended(steps, found, lambda choices: 5.0)[0] == {}, "alike is not better"
    begins = iter((10.0, 9.99))
    assert descended(steps, found, lambda choices: next(begins, 9.98))[0] == {}, "less than the margin"
    _, _, asked = descended(steps, found, cost, seconds=3)
    assert asked <= 5
    _, least, _ = descended(
        steps,
        found,
        lambda c: 4.0 if all(c[k] == s.now for s in found for k in [(s.file, s.key)]) else math.inf,
    )
    assert least == 4.0, "what does not run is no candidate"


def test_without_a_step_there_is_no_search(steps: ModuleType) -> None:
    found = list(spots_of(steps, "qwen3-30b-a3b", 8).values())[:1]
    with pytest.raises(RuntimeError, match="does not run"):
        descended(steps, found, lambda choices: math.inf)


def test_what_seems_faster_is_measured_again(steps: ModuleType) -> None:
    found = list(spots_of(steps, "qwen3-30b-a3b", 8).values())[:1]
    seen: dict[str, int] = {}

    def once(choices: Any) -> float:
        seen[str(choices)] = seen.get(str(choices), 0) + 1
        return 9.0 if seen[str(choices)] == 1 and len(seen) > 1 else 10.0

    assert descended(steps, found, once)[0] == {}, "a single lucky run"
