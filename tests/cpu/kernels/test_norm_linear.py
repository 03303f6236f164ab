"""A norm and the linear layer behind it in one launch (layers/norm_linear_gpu.py), without a GPU: which steps
take it, and what becomes of them in a layer under Triton's interpreter. The kernel itself:
test_linear_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels import _linear, _tuned, _veto, linear_one, rms_norm
from firebox.kernels.linear_one import Config
from firebox.layers import dense_gpu, norm_gpu, norm_linear_gpu
from firebox.layers._in_one import ONE
from firebox.layers.norm_linear_gpu import Problem
from tests.support.interpreter import interpreted

H200 = find_gpu("h200")


def problem(rows: int, hidden: int, format: str = "bf16", eps: float = 1e-6) -> Problem:
    """Of a model's queries, keys and values."""
    linear = _linear.Problem(rows, hidden, format, normed=format != "bf16")
    return Problem(norm_gpu.Problem(rms_norm.Problem(hidden, eps), (linear,)), linear)


QWEN3 = problem(5120, 2048)
MODELS = {"qwen3-30b-a3b": QWEN3}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted("interpreted_norm_linear")


def test_a_layer_takes_one_launch_where_it_was_measured(found: dict[str, Any]) -> None:
    assert found["two"] == found["two tokens"] == ["normalise_rows", "linear_rows"]
    assert found["one"] == ["linear_whole_rows"]
    assert found["error"] < 1e-3


def test_a_trial_finds_what_is_wrong_and_two_launches_stand_in(found: dict[str, Any]) -> None:
    assert [passed for _, _, passed in found["trial"]] == [True] and found["of two"] == []
    assert [passed for _, _, passed in found["wrong"]] == [False]
    assert found["wrong"][0][1] == pytest.approx(0.1, abs=1e-3)
    assert found["vetoed"] == found["two"]


def test_only_one_token_and_only_where_it_was_measured() -> None:
    config = norm_linear_gpu.config_of(QWEN3, H200, 1)
    made = norm_linear_gpu.made(QWEN3, 1, H200)
    assert config is not None and [compile.config for compile in made.compiles] == [config]
    unknown = problem(5120, 2880)
    for p, gpu_name, tokens in ((QWEN3, "h200", 2), (QWEN3, "gb10", 1), (unknown, "h200", 1)):
        gpu = find_gpu(gpu_name)
        assert norm_linear_gpu.config_of(p, gpu, tokens) is None
        made = norm_linear_gpu.made(p, tokens, gpu)
        assert made.compiles == () and made.why == "not measured to be faster"


def test_every_entry_is_of_a_layer_that_was_measured() -> None:
    """And a tile that is tried there."""
    layers = {norm_linear_gpu.key(p): p for p in MODELS.values()}
    entries = {k: v for k, v in _tuned._file(H200.name, dense_gpu.TUNED).items() if k.startswith("norm ")}
    assert set(entries) == set(layers)
    for key, found in entries.items():
        assert set(found) == {1} and found[1]["path"] == ONE, key
        assert Config(**found[1]["config"]) in set(linear_one.search_space(layers[key].linear, H200)), key


@pytest.mark.parametrize(
    "other",
    [
        replace(QWEN3, linear=_linear.Problem(5120, 2048, "int4_group", 32)),
        replace(QWEN3, linear=_linear.Problem(5120, 4096, "bf16")),
        replace(QWEN3, norm=norm_gpu.Problem(rms_norm.Problem(2048, 1e-6, delta=True))),
        replace(QWEN3, norm=norm_gpu.Problem(rms_norm.Problem(2048, 1e-6, dtype="f16"))),
    ],
)
def test_what_it_cannot_do_it_says(other: Problem) -> None:
    assert norm_linear_gpu.accepts(QWEN3, H200) is None
    assert norm_linear_gpu.accepts(other, H200)


def test_not_where_the_reader_takes_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = problem(14_336, 4096, "fp8_channel")
    entry = {"path": "one", "config": {"rows": 4, "warps": 4}}
    files = {norm_linear_gpu.key(fp8): {1: entry}}
    try:
        monkeypatch.setattr(_tuned, "_file", lambda *names: files)
        assert norm_linear_gpu.config_of(fp8, H200, 1) == Config(4, 4)
        norm_linear_gpu.config_of.cache_clear()  # type: ignore[attr-defined]
        monkeypatch.setattr(dense_gpu, "rounds_at", lambda problem, tokens, gpu: True)
        norm_gpu._outputs.cache_clear()  # type: ignore[attr-defined]
        assert norm_linear_gpu.config_of(fp8, H200, 1) is None
    finally:
        monkeypatch.undo()
        _tuned.use()


def test_a_tile_with_wrong_results_leaves_the_step_to_two_launches() -> None:
    config = norm_linear_gpu.config_of(QWEN3, H200, 1)
    assert config is not None
    try:
        _veto.veto(norm_linear_gpu.choice_of(QWEN3, config), "a tile that was off")
        assert norm_linear_gpu.config_of(QWEN3, H200, 1) is None
        made = norm_linear_gpu.made(QWEN3, 1, H200)
        assert made.compiles == () and "a tile that was off" in made.why
    finally:
        _veto.lift()
    assert norm_linear_gpu.config_of(QWEN3, H200, 1) == config
