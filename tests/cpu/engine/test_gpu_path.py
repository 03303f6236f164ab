"""The path that models take on a GPU, without one: every launch under Triton's interpreter. On a GPU:
tests/gpu/test_engine.py."""

from __future__ import annotations

import pytest

from tests.support.interpreter import interpreted

# float16 rounds to 2.8e-4 RMS, some twenty times between embedding and logits; FP8 activations of the longer
# prompt (E4M3, truncated by the interpreter where a GPU rounds) and bf16 group scales count for more.
LIMITS = {"bf16": 5e-3, "mxfp4": 5e-3, "nvfp4": 8e-3, "awq": 2e-2, "fp8_channel": 2.5e-1}
KERNELS = {"attention_gpu", "head_gpu", "moe_gpu"}


@pytest.mark.parametrize(
    ("model", "format", "ran"),
    [
        ("qwen3_moe", "bf16", KERNELS | {"dense_gpu"}),
        ("glm4_moe", "fp8_channel", KERNELS | {"dense_gpu"}),
        ("glm4_moe", "nvfp4", KERNELS | {"dense_gpu"}),
        ("gpt_oss", "mxfp4", KERNELS),
        ("qwen3_moe", "awq", KERNELS | {"dense_gpu"}),
    ],
)
def test_logits_equal_torch_operators_in_float32(model: str, format: str, ran: set[str]) -> None:
    found = interpreted("interpreted_model", model, format)
    assert set(found["ran"]) == ran
    assert len(found["errors"]) == 2
    for request, error in found["errors"].items():
        assert error < LIMITS[format], (request, error)
