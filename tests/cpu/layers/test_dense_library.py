"""FP8 products that torch gives to a library: when they are chosen, what the plan says of them, and their
numbers on the CPU, where torch has the same call. On a GPU: tests/gpu/test_linear.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu, known_gpus
from firebox.kernels import _tuned, _veto, linear, linear_few
from firebox.kernels._linear import Problem, reference
from firebox.kernels.plan import Operation, planned
from firebox.layers import _dense_library, dense_gpu
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, Path, Workspace, path_of, requests, rounds
from tests.support.experts import relative_error
from tests.support.interpreter import interpreted
from tests.support.linear import random_weights

H200 = find_gpu("h200")
P = Problem(3584, 5120, "fp8_channel", residual=True)
LIBRARY = {"path": CUBLAS, "config": None, "us": 1.0}
TILE = linear.Config(64, 64, 128, 4, 4)
ENTRIES = {
    4: {"path": FEW, "config": asdict(linear_few.Config(32, 0, 256, 5, 2, 4)), "us": 1.0},
    64: {"path": MANY, "config": asdict(TILE), "us": 1.0},
    256: LIBRARY,
}
# One rounding to bf16 is 0.0017 RMS; a residual is added behind the first and rounded again.
ONCE, TWICE, ONE_TOKEN = 2e-3, 2.5e-3, 4e-3  # of the 64 numbers of one token, with a rounded bias


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What linear.json holds for every GPU; every layer of P's key has all three paths."""
    found: dict[str, Any] = {dense_gpu.key(P): ENTRIES}
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": found if name == "linear" else {})
    _veto.lift()
    yield found
    monkeypatch.undo()
    _veto.lift()


# ---- the choice


def test_a_measurement_chooses_the_library() -> None:
    assert path_of(P, 128, H200).name == MANY
    for tokens in (129, 256, 8192):
        assert path_of(P, tokens, H200) == Path(CUBLAS, None, "measured")


def test_without_a_measurement_nothing_in_fp8_goes_there(files: dict[str, Any]) -> None:
    files.clear()
    for gpu in known_gpus().values():
        if linear.accepts(P, gpu) is None:
            assert {path_of(P, tokens, gpu).name for tokens in (1, 64, 65, 256, 8192)} == {FEW, MANY}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_dtype": "f32"}, "makes bf16 of bf16 in fp8_channel, not f32 of bf16"),
        ({"dtype": "f16", "out_dtype": "f16"}, "not f16 of f16"),
        ({"rows": 3592}, "multiples of 16, not 3592 and 5120"),
        ({"format": "fp8_block"}, "multiplies no fp8_block weights"),
        ({"format": "fp8_tensor"}, "multiplies no fp8_tensor weights"),
    ],
)
def test_a_measurement_for_another_layer_of_the_key_is_passed_over(
    changes: dict[str, Any], words: str, files: dict[str, Any]
) -> None:
    """The key leaves out types. Then the nearest entry of another path serves, or the default tile."""
    p = replace(P, **changes)
    assert words in str(_dense_library.accepts(p, H200))
    files[dense_gpu.key(p)] = ENTRIES
    assert path_of(p, 256, H200) == Path(MANY, TILE, "measured")
    files[dense_gpu.key(p)] = {256: LIBRARY}
    path = path_of(p, 256, H200)
    assert (path.name, path.why) == (MANY, "default")


def test_gpus_without_fp8_have_no_such_product() -> None:
    old = replace(H200, name="old", facts=H200.facts - {"fp8"})
    assert "has no FP8 type on old" in str(_dense_library.accepts(P, old))
    assert _dense_library.accepts(Problem(640, 512, "bf16"), old) is None


def test_a_wrong_product_gives_way_to_our_kernel() -> None:
    chosen = path_of(P, 300, H200)
    _veto.veto(dense_gpu.choice_of(P, chosen), "cublas, off by 0.1 at 300 tokens")
    path = path_of(P, 300, H200)
    assert (path.name, path.config) == (MANY, linear.default(P, 300, H200))
    assert path.why == "default; instead of cublas, off by 0.1 at 300 tokens"
    assert list(requests(P, 300, H200)) == ["quantise_fp8", "linear"]


# ---- the plan


def test_the_plan_names_what_rounds_and_the_call() -> None:
    rounding = requests(P, 100, H200)["quantise_fp8"]
    assert requests(P, 300, H200) == {"quantise_fp8": rounding}
    compiles = dense_gpu.made(P, 300, H200).compiles
    assert [(c.op, c.request) for c in compiles] == [("quantise_fp8", rounding), ("linear", None)]
    rows = planned(Operation("o", "fp8_channel", dense_gpu, P), H200, 1000)
    by_op = {(row.op, row.first, row.last, row.request is None) for row in rows if row.last > 64}
    assert by_op == {
        ("quantise_fp8", 17, 1000, False),
        ("linear", 17, 128, False),
        ("linear", 129, 1000, True),
    }
    assert [row.untuned(H200) for row in rows] == [None] * len(rows)


def test_which_paths_round() -> None:
    assert [rounds(P, path) for path in (FEW, MANY, CUBLAS)] == [False, True, True]
    assert not rounds(Problem(640, 512, "bf16"), CUBLAS)


def test_the_workspace_has_room_for_a_product_whose_place_the_residual_takes(files: dict[str, Any]) -> None:
    space = Workspace([P], 1000, H200, "meta")
    assert (space.y.numel(), space.y.dtype) == (1000 * 3584, torch.bfloat16)
    assert (space.x.numel(), space.x_scale.numel()) == (1000 * 5120, 1000)
    assert Workspace([P], 128, H200, "meta").y.numel() == 1, "as many do not go there"
    assert Workspace([replace(P, residual=False)], 1000, H200, "meta").y.numel() == 1
    files[dense_gpu.key(P)] = {64: LIBRARY, 4096: ENTRIES[64]}
    dense_gpu._path_of.cache_clear()
    assert path_of(P, 512, H200).name == CUBLAS and path_of(P, 513, H200).name == MANY
    assert Workspace([P], 1000, H200, "meta").y.numel() == 512 * 3584
    files.clear()
    dense_gpu._path_of.cache_clear()
    assert Workspace([P], 1000, H200, "meta").y.numel() == 1


# ---- the numbers


@functools.cache
def ran() -> Any:
    return interpreted("interpreted_dense_library")


def test_layers_equal_float32_on_rounded_activations() -> None:
    """Bias, residual, both in place; 1, 17 and 300 tokens. Against activations before rounding the error is
    that of E4M3, which the interpreter truncates: 0.06, and 0.1 of the 48 numbers of one token."""
    errors = ran()["layers"]
    assert len(errors) == 12
    for case, (rounded, exact) in errors.items():
        assert rounded < (TWICE if "residual=True" in case else ONCE), (case, rounded)
        assert 5e-3 < exact < (0.12 if " 1 bias" in case else 7e-2), (case, exact)


def test_the_self_test_finds_a_wrong_product_behind_a_rounding() -> None:
    found = ran()["trials"]
    assert [row[:2] for row in found["sound"]] == [["cublas", 1], ["cublas", 70]]
    assert all(error < limit and choice == CUBLAS for _, _, error, limit, choice in found["sound"])
    excess = [bad[2] - good[2] for bad, good in zip(found["broken"], found["sound"], strict=True)]
    assert all(0.01 < more < 0.1 for more in excess), excess


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_scales_of_tokens_and_rows_are_each_their_own(tokens: int) -> None:
    """The call alone, on activations whose sizes differ by 10⁶ between tokens."""
    generator = torch.Generator().manual_seed(3)
    p = Problem(64, 128, "fp8_channel", bias=True)
    weights = random_weights(p, generator)
    scale = 10.0 ** (6 * torch.rand(tokens, generator=generator) - 3)
    codes = (100 * torch.randn(tokens, 128, generator=generator)).to(torch.float8_e4m3fn)
    out = torch.full((tokens, 64), float("nan"), dtype=torch.bfloat16)
    assert weights.bias is not None
    y = torch.empty(1, dtype=torch.bfloat16)
    _dense_library.row_wise(codes, scale, weights, weights.bias.bfloat16(), out, None, y)
    wanted = reference(p, codes.float() * scale[:, None], weights)
    for token in range(tokens):
        assert relative_error(out[token], wanted[token]) < ONE_TOKEN, token


def test_a_workspace_that_is_too_small_is_refused_before_anything_is_written() -> None:
    p = Problem(64, 128, "fp8_channel", residual=True)
    weights = random_weights(p, torch.Generator().manual_seed(3))
    out, small = torch.ones(4, 64, dtype=torch.bfloat16), torch.empty(255, dtype=torch.bfloat16)
    codes = torch.zeros(4, 128).to(torch.float8_e4m3fn)
    with pytest.raises(AssertionError, match="255"):
        _dense_library.row_wise(codes, torch.ones(4), weights, None, out, out, small)
    assert (out == 1).all()
