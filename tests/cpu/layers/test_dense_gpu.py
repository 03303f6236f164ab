"""Which path a number of tokens takes, what it compiles, and how much memory lies between the launches."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned, linear, linear_few
from firebox.kernels._linear import Problem
from firebox.layers import dense_gpu
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, Workspace, like, path_of, requests

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
    assert (path.name, path.why) == (CUBLAS, "kernels/linear.py leaves unquantised products to cuBLAS")


def test_the_nearest_measurement_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = linear_few.Config(32, 0, 256, 5, 2, 4), linear.Config(64, 64, 128, 4, 4)
    entries = {
        4: {"path": FEW, "config": asdict(few), "us": 1.0},
        48: {"path": MANY, "config": asdict(many), "us": 1.0},
    }
    measured(monkeypatch, FP8, entries)
    assert path_of(FP8, 9, GPU) == dense_gpu.Path(FEW, few, "measured")
    assert path_of(FP8, 20, GPU) == dense_gpu.Path(MANY, many, "measured")
    assert path_of(FP8, 5000, GPU).config == many
    assert path_of(Problem(3585, 5120, "fp8_channel"), 9, GPU).why == "default"


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
