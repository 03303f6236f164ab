"""kernels/attention_rope_decode.py without a GPU: under Triton's interpreter against rotation, write and
attention by formula, and compiled for GPUs that are not here. On a GPU: tests/gpu/testrope_decode_gpu.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import _veto, attention_decode, rope_write
from firebox.kernels import attention_rope_decode as kernel
from firebox.kernels._attention import FP8
from firebox.kernels._attention import Problem as PagedProblem
from firebox.kernels.compile import compile_all
from firebox.layers import rope_decode_gpu
from tests.support.interpreter import check_launches, interpreted
from tests.support.rope_decode import Found
from tests.support.small import Difference

BF16 = torch.bfloat16
CASES = [f"{number} {kv}" for number in range(len(kernel.CASES)) for kv in (torch.float16, FP8)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted("interpreted_rope_decode")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(found: dict[str, Any], name: str) -> None:
    attended, keys, values, others = found[name]
    case = Found(attended, Difference(*keys), Difference(*values), others)
    assert case.right, case


def test_every_case_is_looked_at(found: dict[str, Any]) -> None:
    assert set(found) == set(CASES)


def problem(heads: int, kv_heads: int, head_dim: int, rotary_dim: int, **options: Any) -> kernel.Problem:
    """Of a model's layer; `options` of the rotation, and window and sinks."""
    masks = {name: options.pop(name) for name in ("window", "sinks") if name in options}
    rope = rope_write.Problem(heads, kv_heads, head_dim, rotary_dim, **options)
    kv = FP8 if rope.kv_dtype == "fp8" else BF16
    return kernel.Problem(rope, PagedProblem(heads, kv_heads, head_dim, head_dim, 64, BF16, kv, **masks))


LAYERS = {
    "gpt-oss": problem(64, 8, 64, 64, window=True, sinks=BF16),
    "qwen3": problem(32, 4, 128, 128, qk_norm="head"),
    "glm-4.7": problem(24, 2, 128, 64, qk_norm="head"),
    "glm-4.7 fp8": problem(24, 2, 128, 64, qk_norm="head", kv_dtype="fp8"),
    "qwen3.5": problem(32, 2, 256, 64, qk_norm="head", gated=True),
}


@pytest.mark.parametrize("split", [False, True])
def test_every_launch_fits_without_spills(split: bool) -> None:
    """No more shared memory than attention_decode.py with the same tile, so that its tuned tiles fit."""
    launches = {
        (name, gpu_name): kernel.requests(layer, kernel.default(layer, gpu), gpu, split=split)[kernel.OP]
        for gpu_name in ("gb10", "h200", "rtx-4090")
        for gpu in (find_gpu(gpu_name),)
        for name, layer in LAYERS.items()
    }
    check_launches({" ".join(key): request for key, request in launches.items()}, spill_bytes=0)
    apart = [
        attention_decode.requests(layer.paged, kernel.default(layer, request.gpu), request.gpu)[0]
        for (name, _), request in launches.items()
        for layer in (LAYERS[name],)
    ]
    for both, alone in zip(compile_all(list(launches.values())), compile_all(apart), strict=True):
        assert both.shared_bytes <= alone.shared_bytes, (both, alone)


def test_the_merge_is_that_of_decode() -> None:
    layer, gpu = LAYERS["qwen3"], find_gpu("h200")
    config = kernel.default(layer, gpu)
    merge = kernel.requests(layer, config, gpu)[kernel.MERGE]
    assert merge == attention_decode.requests(layer.paged, config, gpu)[1]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (problem(48, 8, 128, 64, qk_norm="row"), "each head"),
        (replace(LAYERS["qwen3"], paged=replace(LAYERS["qwen3"].paged, tree=True)), "one query"),
        (problem(128, 1, 128, 64), "64 query heads"),
        (problem(24, 2, 128, 48), "power of two"),
    ],
)
def test_what_it_cannot_do_it_says(layer: kernel.Problem, said: str) -> None:
    reason = kernel.accepts(layer, find_gpu("gb10"))
    assert reason is not None and said in reason, reason


def test_only_where_it_was_measured_to_be_faster() -> None:
    layer, gpu = LAYERS["gpt-oss"], find_gpu("h200")
    assert rope_decode_gpu.config_of(layer, gpu, 2) is not None
    for other, name, tokens in ((layer, "h200", 8), (layer, "gb10", 1), (LAYERS["qwen3.5"], "h200", 1)):
        made = rope_decode_gpu.made(other, tokens, find_gpu(name))
        assert rope_decode_gpu.config_of(other, find_gpu(name), tokens) is None
        assert made.compiles == () and made.why == "not measured to be faster"


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_under_a_limit_a_tile_has_as_many_keys_as_fit(name: str) -> None:
    layer, gpu = LAYERS[name], find_gpu("h200")
    small = replace(gpu, smem_per_block_bytes=101_376)
    usual, fitting = (rope_decode_gpu.config_of(layer, g, 1) for g in (gpu, small))
    assert usual is not None and fitting is not None
    assert fitting == replace(usual, block_n=128) and usual.block_n == {"gpt-oss": 128, "qwen3": 256}[name]
    compiled = compile_all([c.request for c in rope_decode_gpu.made(layer, 1, small).compiles if c.request])
    assert len(compiled) == 3 and all(result.fits for result in compiled)
    why = rope_decode_gpu.made(layer, 1, small).why
    assert why == (
        "measured" if fitting == usual else "measured; another tile, 139,264 of 101,376 shared bytes"
    )
    none = replace(gpu, smem_per_block_bytes=8192)
    assert rope_decode_gpu.config_of(layer, none, 1) is None
    made = rope_decode_gpu.made(layer, 1, none)
    assert made.compiles == () and "8,192 shared bytes" in made.why and str(usual) in made.why


def test_a_tile_with_wrong_results_leaves_the_step_to_two_launches() -> None:
    layer, gpu = LAYERS["gpt-oss"], find_gpu("h200")
    config = rope_decode_gpu.config_of(layer, gpu, 1)
    assert config is not None
    assert len(rope_decode_gpu.made(layer, 1, gpu).compiles) == 3
    try:
        _veto.veto(rope_decode_gpu.choice_of(layer, config), "a tile that was off")
        assert rope_decode_gpu.config_of(layer, gpu, 1) is None
        made = rope_decode_gpu.made(layer, 1, gpu)
        assert made.compiles == () and "a tile that was off" in made.why
    finally:
        _veto.lift()
    assert rope_decode_gpu.config_of(layer, gpu, 1) == config
