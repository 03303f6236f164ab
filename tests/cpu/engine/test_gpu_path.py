"""The path that models take on a GPU, without one: every launch under Triton's interpreter. On a GPU:
tests/gpu/test_engine.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from firebox.find import names
from tests.gpu.test_engine import ALL
from tests.support.interpreter import interpreted
from tests.support.small_models import write_quantised, write_small

# float16 rounds to 2.8e-4 RMS, some twenty times between embedding and logits; FP8 activations of the longer
# prompt (E4M3, truncated by the interpreter where a GPU rounds) and bf16 group scales count for more.
LIMITS = {
    "bf16": 5e-3,
    "mxfp4": 5e-3,
    "nvfp4": 8e-3,
    "int4_group": 8e-3,
    "awq": 2e-2,
    "gptq": 2e-2,
    "fp8_channel": 2.5e-1,
}
KERNELS = {"attention_gpu", "head_gpu", "moe_gpu"}
LATENT = {"latent_attention_gpu", "dense_gpu", "head_gpu", "moe_gpu"}


@pytest.mark.parametrize(
    ("model", "format", "ran"),
    [
        ("qwen3_moe", "bf16", KERNELS | {"dense_gpu"}),
        ("glm4_moe", "fp8_channel", KERNELS | {"dense_gpu"}),
        ("glm4_moe", "nvfp4", KERNELS | {"dense_gpu"}),
        ("gpt_oss", "mxfp4", KERNELS),
        ("qwen3_moe", "awq", KERNELS | {"dense_gpu"}),
        ("deepseek_v3", "nvfp4", LATENT),  # in bf16 with graphs, below
        ("qwen3_5_moe", "nvfp4", KERNELS | {"gated_delta_gpu"}),
        ("qwen3_5_moe", "fp8_channel", KERNELS | {"gated_delta_gpu"}),  # b and a are a product of their own
        ("kimi_k25", "int4_group", LATENT),
        ("minimax_m2", "gptq", KERNELS),
    ],
)
def test_logits_equal_torch_operators_in_float32(
    model: str, format: str, ran: set[str], tmp_path: Path
) -> None:
    found = as_on_a_gpu(tmp_path, model, format)
    assert set(found["ran"]) == ran
    assert set(found["steps"]) == {"eager"}
    check_errors(found["errors"], LIMITS[format])


@pytest.mark.parametrize(("model", "cached"), [("deepseek_v3", 48 + 16), ("qwen3_5_moe", 16 + 16)])
def test_decode_steps_as_graphs_capture_and_fill_them(model: str, cached: int, tmp_path: Path) -> None:
    """With the runner of a GPU, whose graphs are replayed by running their step again: two requests that
    decode together, and two that go on where these ended, one behind what steps from graphs wrote."""
    found = as_on_a_gpu(tmp_path, model, "bf16", "graphs")
    assert found["steps"]["graph"] >= 8 and found["cached"] == cached
    assert found["ahead"] == found["steps"]["graph"] - 2, "no decode step but the first of two texts waits"
    assert found["slot 0 is zero"], "capturing advanced the state before the first token"
    check_errors(found["errors"], LIMITS["bf16"])


def test_a_gpu_meets_every_architecture_and_every_format() -> None:
    """Of tests/gpu/test_engine.py, which compares graph, eager and CPU."""
    assert {case.model for case in ALL} == set(names("models")) - {"base"}
    assert {case.format for case in ALL} == {*names("formats")} - {"kv", "layouts", "select"}


def as_on_a_gpu(folder: Path, model: str, format: str, *option: str) -> dict[str, Any]:
    """What interpreted_model.py finds of a small checkpoint that is written here."""
    checkpoint = write_small(folder, model)
    checkpoint = checkpoint if format == "bf16" else write_quantised(checkpoint, format)
    found: dict[str, Any] = interpreted("interpreted_model", model, str(checkpoint), *option)
    return found


def check_errors(errors: dict[str, float], limit: float) -> None:
    assert len(errors) == 2
    for request, error in errors.items():
        assert error < limit, (request, error)


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLPS = {f"{path}.{part}_proj" for path in ("mlp", "mlp.shared_experts") for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("model", "format", "parts", "ran"),
    [
        ("gpt_oss", "mxfp4", ATTENTION | {"lm_head"}, KERNELS),
        ("glm4_moe", "bf16", ATTENTION | MLPS | {"lm_head"}, KERNELS | {"dense_gpu"}),
    ],
)
def test_requantised_weights_stay_fp8(
    model: str, format: str, parts: set[str], ran: set[str], tmp_path: Path
) -> None:
    """Few tokens meet FP8 weights as they are: to float16's rounding the logits are those of torch operators
    on what the FP8 weights mean. From those of the checkpoint's weights they are as far as FP8 makes them:
    0.026 for each product, four a layer in three layers and the output matrix, that add up as squares."""
    found = as_on_a_gpu(tmp_path, model, format, "fp8")
    assert {re.sub(r"model\.layers\.\d+\.", "", module) for module in found["requantised"]} == parts
    assert set(found["ran"]) == ran and found["left"] == []
    assert len(found["errors"]) == len(found["moved"]) == 2
    for request, error in found["errors"].items():
        assert error < LIMITS["bf16"], (request, error)
        assert 0.02 < found["moved"][request] < 0.2, (request, found["moved"])
