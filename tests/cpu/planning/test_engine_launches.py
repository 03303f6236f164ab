"""Nothing is launched that is not in the plan: a real engine under random traffic, launches recorded, on a
GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from firebox.find import load
from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned, _veto
from firebox.kernels.compile import CompileRequest
from firebox.kernels.plan import Operation, Setting
from firebox.layers import dense_gpu
from firebox.layers.launches import layers_of, rows
from firebox.planning.fit import Source, open_source
from tests.support.dry import MAX_TOKENS, PAGE_TOKENS, model_of, nothing_runs, random_traffic

MXFP4 = {
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"intermediate_size": 256, "moe_intermediate_size": 128},
    "glm4_moe": {"intermediate_size": 256, "moe_intermediate_size": 128, "num_nextn_predict_layers": 0},
    "gpt_oss": {"intermediate_size": 128} | MXFP4,
    "minimax_m2": {"intermediate_size": 128},
    "deepseek_v3": {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "num_nextn_predict_layers": 0,
    },
    "qwen3_5_moe_text": {
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
NVFP4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
CASES = {
    **{name: (name, sizes) for name, sizes in SIZES.items()},
    "fp8": ("glm4_moe", SIZES["glm4_moe"] | FP8),
    "nvfp4": ("qwen3_moe", SIZES["qwen3_moe"] | NVFP4),
    "awq": ("qwen3_moe", SIZES["qwen3_moe"] | AWQ),
    "gptq": ("qwen3_moe", SIZES["qwen3_moe"] | GPTQ),
}
# Where up to MAX_TOKENS tokens of these sizes reach the block-scaled products.
BLOCK_SCALED = {("gpt_oss", "gb10"), ("gpt_oss", "rtx-5090"), ("nvfp4", "rtx-5090")}
COMMON = {"hidden_size": 256, "head_dim": 64, "dtype": "bfloat16"}


def missing(seen: list[CompileRequest], plan: list[CompileRequest]) -> list[str]:
    """The launches that the plan does not have, by their kernels' names."""
    return sorted({request.kernel.__name__ for request in seen if request not in plan})


@pytest.mark.parametrize(
    ("case", "gpu_name"),
    sorted({(case, gpu_name) for case in CASES for gpu_name in ("gb10", "h200")} | BLOCK_SCALED),
)
def test_every_launch_is_in_the_plan(case: str, gpu_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = find_gpu(gpu_name)
    model_type, sizes = CASES[case]
    model = model_of(model_type, gpu, **COMMON, **sizes)
    layers = layers_of(model, Setting(gpu, page_tokens=PAGE_TOKENS))
    assert [alike.op for alike in layers if alike.refusal] == []
    plan = [row.request for _, row in rows(layers, gpu, MAX_TOKENS) if row.request is not None]
    seen = nothing_runs(monkeypatch, gpu)
    random_traffic(model, gpu, seed=7)
    assert missing(seen, plan) == []
    kernels = {request.kernel.__name__ for request in seen}
    assert kernels >= {"normalise_rows", "linear_rows", "route", "sample_rows", "decode", "extend"}
    assert ({"gate_up_scaled", "down_scaled", "quantise_by_group"} <= kernels) == (
        (case, gpu_name) in BLOCK_SCALED
    )
    assert kernels == {request.kernel.__name__ for request in plan}, "all kinds of launches were made"


def test_activations_of_a_library_s_product_are_rounded_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FP8 products of more than some tokens are measured to be the library's, quantise_fp8 is planned
    and launched before each, and our kernel of many tokens is not: no step has as many rows of logits."""
    gpu = find_gpu("h200")
    few = {"path": "few", "config": {}}

    class File(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return {1: few, 300: {"path": "cublas", "config": None}} if "fp8" in key else default

    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": File() if name == "linear" else {})
    _veto.lift()
    try:
        model = model_of("glm4_moe", gpu, requantize=True, **COMMON, **SIZES["glm4_moe"])
        layers = layers_of(model, Setting(gpu, page_tokens=PAGE_TOKENS))
        planned = [row for _, row in rows(layers, gpu, MAX_TOKENS)]
        seen = nothing_runs(monkeypatch, gpu)
        random_traffic(model, gpu, seed=7)
    finally:
        _veto.lift()
    assert missing(seen, [row.request for row in planned if row.request is not None]) == []
    library = {row.operation.name for row in planned if row.path == "cublas" and row.request is None}
    assert library >= {"qkv", "o", "gate_up", "down"} and "head" not in library
    kernels = {r.kernel.__name__ for r in seen}
    assert "quantise_rows" in kernels and "linear_rows" in kernels and "linear_tiles" not in kernels


@pytest.mark.parametrize("gpu_name", ["gb10", "h200"])
@pytest.mark.parametrize("case", ["gpt_oss", "glm4_moe", "qwen3_5_moe_text"])
def test_with_requantize_the_plan_has_fp8(case: str, gpu_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine launches is in the plan that `firebox fit --requantize fp8` makes without weights, and
    that of few and of many tokens with FP8 weights is among it."""
    gpu = find_gpu(gpu_name)
    model_type, sizes = CASES[case]
    model = model_of(model_type, gpu, requantize=True, **COMMON, **sizes)
    config = load("models", model_type).TINY | COMMON | sizes
    planned = open_source(Source("tiny", model_type, config, "bfloat16", requantise=True), gpu).model
    setting = Setting(gpu, page_tokens=PAGE_TOKENS)
    layers = layers_of(planned, setting)
    assert layers == layers_of(model, setting)
    plan = [row.request for _, row in rows(layers, gpu, MAX_TOKENS) if row.request is not None]
    in_fp8 = [
        (operation.name, operation.format)
        for alike in layers
        for operation in alike.operations
        if operation.source is dense_gpu and type(operation) is Operation
    ]
    attention = {"qkv", "o"} if case != "qwen3_5_moe_text" else {"qkv, z", "o", "out", "qkv"}
    shared = set() if case == "gpt_oss" else {"shared_gate_up", "shared_down"}
    dense = {"gate_up", "down"} if case == "glm4_moe" else set()
    wanted = attention | shared | dense | {"head"}
    assert {name for name, format in in_fp8 if format == "fp8_channel"} == wanted
    gates = {"b, a"} if case == "qwen3_5_moe_text" else set()
    assert {name for name, format in in_fp8 if format == "bf16"} == {"router"} | gates
    seen = nothing_runs(monkeypatch, gpu)
    random_traffic(model, gpu, seed=7)
    assert missing(seen, plan) == []
    of_fp8 = {r.kernel.__name__ for r in seen if r.constexprs.get("FORMAT") == "fp8_channel"}
    assert of_fp8 == {r.kernel.__name__ for r in plan if r.constexprs.get("FORMAT") == "fp8_channel"}
    assert len(of_fp8) == 2 and "quantise_rows" in {r.kernel.__name__ for r in seen}
