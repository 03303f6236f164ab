"""Search space, order of the compiles, what drops a tile, and the choice, held against brute force."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels.compile import Compiled
from firebox.planning._foreign_kernel import Operands, Tile
from firebox.tuning.servers.choose import Goal, best, compile_order, ranked
from firebox.tuning.servers.files import save
from firebox.tuning.servers.predict import _wanted
from firebox.tuning.servers.products import Product, Routing
from firebox.tuning.servers.tiles import (
    GROUP_M,
    Wanted,
    compile_tiles,
    estimated,
    fault,
    search_space,
    sums,
    too_large,
)
from firebox.tuning.servers.times import predicted_us

GB10 = find_gpu("gb10")
FP8 = Operands("fp8e4nv", "fp8e4nv", "fp8", "channel")
BLOCKS = Operands("fp8e4nv", "fp8e4nv", "fp8", "block", (128, 128))
ROUTING = Routing(160, 8, 1)
UP = Product(ROUTING, 768, 5120, FP8, down=False)
DOWN = Product(ROUTING, 5120, 384, FP8, down=True)
SPACE = search_space(FP8)
APART = [Goal(UP, DOWN, tokens, alike=False) for tokens in (1, 64, 2048)]
ALIKE = [Goal(UP, DOWN, tokens, alike=True) for tokens in (1, 64, 2048)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)


def test_search_space() -> None:
    assert len(set(SPACE)) == len(SPACE) > 150
    assert {tile.block_k for tile in SPACE} == {64, 128, 256}
    assert {tile.block_k for tile in search_space(BLOCKS)} == {64, 128}  # one scale for a tile's depth
    assert all(4 <= sums(tile.block_m, tile.block_n, tile.num_warps) <= 128 for tile in SPACE)
    assert Tile(16, 32, 256, 4, 5) in SPACE and Tile(128, 256, 64, 4, 3) not in SPACE


def test_a_seed_never_runs_across_a_block_of_scales(tmp_path: Path) -> None:
    seed = tmp_path / "E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8.json"
    sizes = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "GROUP_SIZE_M": 1, "num_warps": 2, "num_stages": 2}
    save(seed, {"1": sizes | {"BLOCK_SIZE_K": 256}, "2": sizes | {"BLOCK_SIZE_K": 64}})
    deep, flat = Tile(16, 64, 256, 2, 2), Tile(16, 64, 64, 2, 2)
    up, down = (replace(product, operands=BLOCKS) for product in (UP, DOWN))
    cut = _wanted([Goal(up, down, 1, alike=False)], GB10, [seed])
    assert [one.tile for one in cut[:2]] == [flat, flat] and deep not in {one.tile for one in cut}
    assert [one.tile for one in _wanted(APART, GB10, [seed])[:4]] == [deep, deep, flat, flat]


def test_the_order_of_compiles() -> None:
    order = compile_order([*APART, *ALIKE], SPACE, GB10)
    assert len(set(order)) == len(order)
    fitting = {Wanted(t, d) for t in SPACE for d in (False, True) if not too_large(t, FP8, GB10)}
    assert set(order) == fitting and len(fitting) < 2 * len(SPACE)
    spills = [estimated(one.tile, FP8).spills for one in order]
    assert spills == sorted(spills) and any(spills)
    usages = {one: estimated(one.tile, FP8) for one in order if not estimated(one.tile, FP8).spills}
    firsts = [best(goal, usages, GB10) for goal in (*APART, *ALIKE)]
    wanted = [one for p in firsts if p for one in (Wanted(p.first.tile, False), Wanted(p.second.tile, True))]
    assert order[: len(set(wanted))] == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("goal", [*APART, *ALIKE], ids=lambda goal: f"{goal.tokens}-{goal.alike}")
def test_the_choice_is_the_least_of_all(goal: Goal) -> None:
    some = [tile for tile in SPACE[::9] if not too_large(tile, FP8, GB10)]
    usages = {Wanted(tile, down): estimated(tile, FP8) for tile in some for down in (False, True)}

    def us(product: Product, tile: Tile, group_m: int) -> float:
        return predicted_us(product, goal.tokens, tile, usages[Wanted(tile, product.down)], GB10, group_m)

    if goal.alike:
        least = min(us(UP, tile, g) + us(DOWN, tile, g) for tile in some for g in GROUP_M)
    else:
        ups, downs = (
            {tile: min(us(product, tile, g) for g in GROUP_M) for tile in some} for product in (UP, DOWN)
        )
        pairs = itertools.product(some, some)
        least = min(ups[a] + downs[b] for a, b in pairs if a.block_m == b.block_m)
    found = best(goal, usages, GB10)
    assert found is not None and found.us == pytest.approx(least, rel=1e-12)
    assert found.first.tile.block_m == found.second.tile.block_m
    if goal.alike:
        assert (found.first.tile, found.first.group_m) == (found.second.tile, found.second.group_m)


def test_rows_a_block_are_those_of_both() -> None:
    """A tile that ran for one product alone makes no pair of its rows."""
    a, b = Tile(16, 64, 128, 4, 3), Tile(32, 64, 128, 4, 3)
    usages = {
        Wanted(a, False): estimated(a, FP8),
        Wanted(b, True): estimated(b, FP8),
    }
    for goal in (APART[0], ALIKE[0]):
        assert ranked(goal, usages, GB10) == {} and best(goal, usages, GB10) is None
    usages[Wanted(b, False)] = estimated(b, FP8)
    for goal in (APART[0], ALIKE[0]):
        assert list(ranked(goal, usages, GB10)) == [32]


def compiled(**fields: object) -> Compiled:
    usual = {
        "kernel": "k",
        "target": 121,
        "limit_bytes": 101_376,
        "native": True,
        "cached": False,
        "error": None,
        "seconds": 0.1,
        "triton": "3.9.0",
        "ptxas": "",
        "shared_bytes": 101_376,
    }
    return Compiled(**(usual | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"error": "no such instruction"}, "does not compile"),
        ({"shared_bytes": 101_377}, "does not fit"),
        ({"spill_bytes": 4}, "spills"),
        ({"native": False, "instruction": "mma.f16"}, "is emulated"),
    ],
)
def test_what_drops_a_tile(fields: dict[str, object], reason: str | None) -> None:
    found = fault(compiled(**fields))
    assert (found and found[0]) == reason


def test_compiling_drops_what_does_not_fit() -> None:
    """147,456 shared bytes; and a tile of which FIREBOX_SMEM_LIMIT says nothing here."""
    large, small = Wanted(Tile(128, 256, 128, 8, 4), True), Wanted(Tile(16, 32, 64, 4, 2), False)
    tried = compile_tiles([large, small], FP8, GB10, time.monotonic() + 300)
    assert list(tried.runs) == [small] and tried.left == 0
    (dropped,) = tried.dropped
    assert (dropped.tile, dropped.down, dropped.reason) == (*large, "does not fit")
    assert dropped.detail == "147,456 of 101,376 shared bytes"


def test_nothing_is_begun_after_the_deadline() -> None:
    tried = compile_tiles([Wanted(Tile(16, 32, 64, 4, 2), False)] * 3, FP8, GB10, time.monotonic() - 1)
    assert tried.left == 3 and not tried.runs and not tried.dropped
