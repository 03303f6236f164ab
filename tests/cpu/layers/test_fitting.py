"""Tiles under a limit to shared memory: which one stands in for a tile that is too large, and that the
choice of paths asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels import _linear, _tuned
from firebox.kernels._experts import Problem
from firebox.kernels.compile import compile_all
from firebox.kernels.moe_gate_up import Config
from firebox.layers import _fitting, dense_gpu, expert_paths
from firebox.layers._fitting import distance, nearest_first, nearest_that_fits, with_fewer_stages
from tests.support.tuned import TunedFolder, tuned_folder

__all__ = ["tuned_folder"]

LIMIT = 101_376
H200 = find_gpu("h200")
SMALL = replace(H200, smem_per_block_bytes=LIMIT)
GLM = Problem(5120, 384, 160, 8, "fp8_channel")
LARGE = Config(256, 128, 128, 8, 4, tma=True)


def step_bytes(config: Any) -> float:
    return float((config.rows + config.tokens) * config.depth * config.stages)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A compiler that says what steps hold, and 32 bytes more; the configurations it was asked for."""
    asked: list[Any] = []

    def compiled(requests: Sequence[Any]) -> list[Any]:
        asked.extend(requests)
        found = []
        for config in requests:
            size = int(step_bytes(config)) + 32
            found.append(
                SimpleNamespace(fits=size <= LIMIT, error=None, shared_bytes=size, limit_bytes=LIMIT)
            )
        return found

    monkeypatch.setattr(_fitting, "compile_all", compiled)
    return asked


def test_a_shorter_step_is_nearer_than_a_shorter_pipeline_and_that_than_half_a_tile() -> None:
    same = replace(LARGE)
    depth, stages = replace(LARGE, depth=64), replace(LARGE, stages=2)
    rows, tokens = replace(LARGE, rows=128), replace(LARGE, tokens=64)
    assert distance(LARGE, same) == 0
    assert distance(LARGE, depth) < distance(LARGE, replace(LARGE, stages=3))
    assert distance(LARGE, rows) < distance(LARGE, tokens) < distance(LARGE, stages)
    assert nearest_first(LARGE, [stages, tokens, rows, depth, same], ()) == [depth, rows, tokens, stages]


def test_a_measured_tile_is_preferred_to_one_as_near() -> None:
    one, other = replace(LARGE, depth=64), replace(LARGE, warps=4)
    assert nearest_first(LARGE, [one, other], ()) == [one, other]
    assert nearest_first(LARGE, [one, other], [other]) == [other, one]


def test_pipelines_become_no_shorter_than_two_steps() -> None:
    made = list(with_fewer_stages([replace(LARGE, depth=64, stages=3)], LARGE))
    assert [(c.depth, c.stages) for c in made] == [(128, 4), (128, 3), (128, 2), (64, 3), (64, 2)]
    whole = replace(LARGE, depth=0, stages=1)
    assert list(with_fewer_stages([], whole)) == [whole]


def test_what_fits_stays(compiler: list[Any]) -> None:
    small = replace(LARGE, depth=64)
    assert nearest_that_fits(small, [LARGE], (), lambda c: c, step_bytes) == (small, "")
    assert compiler == [small]


def test_the_nearest_that_fits_stands_in_and_the_ledger_hears_why(compiler: list[Any]) -> None:
    space = [replace(LARGE, rows=64), replace(LARGE, depth=64), LARGE]
    found, why = nearest_that_fits(LARGE, space, (), lambda c: c, step_bytes)
    assert found == replace(LARGE, depth=64)
    assert why == "196,640 of 101,376 shared bytes"
    assert all(step_bytes(c) <= 1.1 * LIMIT for c in compiler[1:]), "what cannot fit is not compiled"


def test_where_nothing_fits_the_launch_plan_has_the_last_word(compiler: list[Any]) -> None:
    huge = replace(LARGE, rows=4096)
    assert nearest_that_fits(huge, [], (), lambda c: c, step_bytes) == (huge, "")


# ---- the choice of paths


def test_without_a_limit_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(requests: Sequence[Any]) -> list[Any]:
        raise AssertionError("the choice compiles")

    monkeypatch.setattr(_fitting, "compile_all", compiled)
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
    for gpu in (H200, find_gpu("gb10")):
        assert not _fitting.is_limited(gpu)
        assert expert_paths.path_of(GLM, 4096, gpu).why in ("measured", "default")
    with pytest.raises(AssertionError, match="compiles"):
        expert_paths.path_of(Problem(256, 128, 8, 2, "bf16"), 3, SMALL)


def test_an_expert_layer_stays_below_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4.7's share as it was tuned on an H200, whose tiles are too large in both halves."""
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
    free, small = (expert_paths.path_of(GLM, 4096, gpu) for gpu in (H200, SMALL))
    sizes = {
        name: compile_all(list(expert_paths.requests(GLM, 4096, path, SMALL).values()))
        for name, path in (("free", free), ("small", small))
    }
    assert not all(c.fits for c in sizes["free"]), "this test needs a tile that is too large"
    assert all(c.fits for c in sizes["small"]), [c.shared_bytes for c in sizes["small"]]
    assert small.gate_up != free.gate_up and small.gate_up.tokens == free.gate_up.tokens
    assert small.why.startswith("measured; another gate_up, ") and "of 101,376 shared bytes" in small.why
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", str(LIMIT))
    assert expert_paths.path_of(GLM, 4096, H200) == small


def test_a_linear_layer_stays_below_a_limit(
    tuned_folder: TunedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
    problem = _linear.Problem(1024, 2048, "fp8_channel")
    config = {"rows": 128, "tokens": 256, "depth": 128, "warps": 8, "stages": 3, "band": 8, "tma": False}
    entries = {"512": {"path": "many", "config": config}, "1": {"path": "cublas"}}
    tuned_folder.write(H200, "linear.json", {dense_gpu.key(problem): entries})
    assert dense_gpu.path_of(problem, 512, H200).config.tokens == 256
    small = dense_gpu.path_of(problem, 512, SMALL)
    assert small.config != dense_gpu.path_of(problem, 512, H200).config and "another tile" in small.why
    assert all(c.fits for c in compile_all(list(dense_gpu.requests(problem, 512, SMALL, small).values())))
    assert dense_gpu.path_of(problem, 1, SMALL).config is None, "cuBLAS chooses for itself"


def test_what_was_chosen_is_forgotten_with_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_tuned.use` forgets every choice that depends on what is written there."""
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
    expert_paths.path_of(GLM, 64, SMALL)
    assert expert_paths._fitted.cache_info().currsize > 0  # type: ignore[attr-defined]
    _tuned.use()
    assert expert_paths._fitted.cache_info().currsize == 0  # type: ignore[attr-defined]
