"""Which path a number of tokens takes, what it compiles, and how much memory lies between the launches."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned, linear, linear_few
from firebox.kernels._linear import Problem
from firebox.layers import dense_gpu
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, Path, Workspace, like, path_of, requests, scratch

GPU = find_gpu("gb10")
FP8 = Problem(3584, 5120, "fp8_channel")
BF16 = Problem(640, 512, "bf16")


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": {})
    dense_gpu._path_of.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, problem: Problem, entries: dict[int, Any]) -> None:
    files = {"linear": {dense_gpu.key(problem): entries}}
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": files.get(name, {}))


def test_without_a_measurement_few_up_to_64_tokens() -> None:
    assert [path_of(FP8, tokens, GPU).name for tokens in (1, 64, 65, 4096)] == [FEW, FEW, MANY, MANY]
    assert path_of(BF16, 64, GPU).name == FEW
    path = path_of(BF16, 65, GPU)
    assert (path.name, path.why) == (CUBLAS, "default: unquantised, a library's")


def test_the_nearest_measurement_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = linear_few.Config(32, 0, 256, 5, 2, 4), linear.Config(64, 64, 128, 4, 4)
    entries = {
        4: {"path": FEW, "config": asdict(few), "us": 1.0},
        48: {"path": MANY, "config": asdict(many), "us": 1.0},
    }
    measured(monkeypatch, FP8, entries)
    only = "measured, weight-only: multiplied as f16"
    assert path_of(FP8, 9, GPU) == dense_gpu.Path(FEW, few, only)
    assert path_of(FP8, 20, GPU) == dense_gpu.Path(MANY, many, "measured")
    assert path_of(FP8, 5000, GPU).config == many
    assert path_of(Problem(3585, 5120, "fp8_channel"), 9, GPU).why.startswith("default, weight-only")


def test_few_is_never_taken_beyond_64_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"path": FEW, "config": asdict(linear_few.Config()), "us": 1.0}
    measured(monkeypatch, BF16, {64: few, 4096: {"path": CUBLAS, "config": None, "us": 1.0}})
    assert path_of(BF16, 100, GPU) == dense_gpu.Path(CUBLAS, None, "measured")
    measured(monkeypatch, BF16, {64: few})
    assert path_of(BF16, 100, GPU).name == CUBLAS


def test_groups_tell_problems_apart() -> None:
    assert dense_gpu.key(FP8) == "fp8_channel rows=3584 columns=5120"
    assert dense_gpu.key(Problem(8, 128, "int4_group", 128)) == "int4_group group=128 rows=8 columns=128"


def test_what_a_number_of_tokens_compiles() -> None:
    assert list(requests(FP8, 3, GPU)) == ["linear"]
    assert list(requests(FP8, 300, GPU)) == ["quantise_fp8", "linear"]
    assert list(requests(Problem(640, 512, "nvfp4", 16), 300, GPU)) == ["linear"]
    assert requests(BF16, 300, GPU) == {}


@pytest.mark.parametrize("problem", [FP8, BF16])
def test_numbers_of_tokens_that_are_alike_share_their_compiles(problem: Problem) -> None:
    """So that the plan for `like` tokens is the plan for all of them."""
    for tokens in range(1, 80):
        path = path_of(problem, tokens, GPU)
        shared = requests(problem, like(tokens, path), GPU, path)
        assert requests(problem, tokens, GPU) == shared
        if path.name == FEW:
            assert shared["linear"].constexprs["TOKENS"] >= tokens


def test_the_workspace_holds_what_every_number_of_tokens_needs() -> None:
    wide = Problem(5120, 12_288, "fp8_block")
    space = Workspace([FP8, BF16, wide], 300, GPU, "meta")
    for problem in (FP8, BF16, wide):
        for tokens in range(1, 65):
            sums, tiles = linear_few.scratch(problem, tokens, path_of(problem, tokens, GPU).config)
            assert sums <= space.partial.numel() and tiles <= space.counters.numel()
    assert linear_few.scratch(FP8, 64, path_of(FP8, 64, GPU).config)[0] > 0
    assert (space.x.numel(), space.x.dtype) == (300 * 12_288, torch.float8_e4m3fn)
    assert space.x_scale.numel() == 300 * 96
    assert Workspace([BF16], 300, GPU, "meta").x.numel() == 1


def random_entries(random: Random) -> dict[int, Any]:
    """Measured at some numbers of tokens, in no order; tiles of many tokens with slices and without."""
    entries: dict[int, Any] = {}
    for tokens in random.sample((1, 2, 9, 16, 36, 64, 96, 144, 256, 289, 400, 512, 625, 1024), 6):
        tile = linear.Config(64, random.choice((64, 128)), 128, 4, 4, slices=random.choice((1, 2, 3, 8)))
        few = {"path": FEW, "config": asdict(linear_few.Config(32, 0, 256, random.choice((1, 7)), 2, 4))}
        many, library = {"path": MANY, "config": asdict(tile)}, {"path": CUBLAS, "config": None}
        entries[tokens] = random.choice((few, many, many, library)) | {"us": 1.0}
    return entries


@pytest.mark.parametrize("seed", range(12))
def test_the_workspace_is_as_large_as_the_largest_need(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all numbers of tokens, each of which is asked here; with a problem that leaves a library out."""
    random = Random(seed)
    measured(monkeypatch, FP8, random_entries(random))
    for problem in (FP8, replace(FP8, out_dtype="f32")):
        most = random.choice((50, 300, 700, 1100))
        needs = [scratch(problem, tokens, path_of(problem, tokens, GPU)) for tokens in range(1, most + 1)]
        space = Workspace([problem], most, GPU, "meta")
        assert space.partial.numel() == max(1, *(sums for sums, _ in needs))
        assert space.counters.numel() == max(1, *(tiles for _, tiles in needs))


def test_a_workspace_asks_for_few_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds the 4,095th, the last that is nearer to 1,024 than to 16,384."""
    sliced, whole = linear.Config(64, 64, 128, 4, 4, slices=4), linear.Config(64, 64, 128, 4, 4)
    entries = {n: {"path": MANY, "config": asdict(c)} for n, c in ((16_384, whole), (1024, sliced))}
    measured(monkeypatch, FP8, entries)
    asked = []

    def counted(problem: Problem, tokens: int, gpu: Any) -> Path:
        asked.append(tokens)
        return path_of(problem, tokens, gpu)

    monkeypatch.setattr(dense_gpu, "_path_of", counted)
    assert Workspace([FP8], 8192, GPU, "meta").partial.numel() == 4 * 4095 * 3584
    assert len(asked) < 100
    assert Workspace([FP8], 512, GPU, "meta").partial.numel() == 4 * 512 * 3584


def test_the_last_numbers_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every number's entry, whichever paths are left out."""
    random = Random(1)
    for _ in range(50):
        entries = random_entries(random)
        measured(monkeypatch, FP8, entries)
        last = {first - 1 for first in _tuned.turns(GPU.name, "linear", dense_gpu.key(FP8))}
        for but in ((), (FEW,), (CUBLAS, FEW)):
            found = [
                id(_tuned.measured(GPU.name, "linear", dense_gpu.key(FP8), n, but)) for n in range(1, 1201)
            ]
            assert {n for n, (one, other) in enumerate(pairwise(found), 1) if one != other} <= last


def test_an_old_entry_has_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    config = asdict(linear.Config(64, 64, 128, 4, 4))
    assert config.pop("slices") == 1
    measured(monkeypatch, FP8, {256: {"path": MANY, "config": config, "us": 1.0}})
    assert path_of(FP8, 256, GPU).config == linear.Config(64, 64, 128, 4, 4)
    assert scratch(FP8, 256, path_of(FP8, 256, GPU)) == (0, 0)


def test_a_workspace_is_held_and_grows() -> None:
    space, other = Workspace([], 8, GPU, "cpu"), Workspace([FP8], 8, GPU, "cpu")
    space.hold(5, 3)
    assert (space.partial.numel(), space.counters.tolist()) == (5, [0, 0, 0])
    counters = space.counters
    space.hold(4, 3)
    assert space.partial.numel() == 5 and space.counters is counters
    space.grow(other)
    assert space.partial is other.partial and space.counters is other.counters
