"""The published configs of gpt-oss-120b and MiniMax-M2: their tensors' names and shapes, and the values that
the code refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from firebox.cache.specs import PagedSpec, WindowSpec
from firebox.errors import UnsupportedModel
from firebox.formats.select import formats_of
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.models import gpt_oss, minimax_m2
from firebox.weights.load import chosen_slots

GPT_OSS_120B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}


def on_meta(module: Any, config: dict[str, Any]) -> Any:
    build = Build(
        gpu=probe_cpu(),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        max_positions=1,
        format_of=formats_of(config),
    )
    return module.Model(module.Config.from_hf(config), build)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for slot in chosen_slots(model, None) for name, spec in slot.tensors.items()}


def test_gpt_oss_120b_has_its_published_tensors() -> None:
    model = on_meta(gpt_oss, GPT_OSS_120B)
    found = shapes(model)
    layer = {
        name.removeprefix("model.layers.7."): s
        for name, s in found.items()
        if name.startswith("model.layers.7.")
    }
    attention = {"q_proj": (4096, 2880), "k_proj": (512, 2880), "v_proj": (512, 2880), "o_proj": (2880, 4096)}
    assert layer == {
        "input_layernorm.weight": (2880,),
        "post_attention_layernorm.weight": (2880,),
        "self_attn.sinks": (64,),
        **{f"self_attn.{part}.weight": shape for part, shape in attention.items()},
        **{f"self_attn.{part}.bias": shape[:1] for part, shape in attention.items()},
        "mlp.router.weight": (128, 2880),
        "mlp.router.bias": (128,),
        "mlp.experts.gate_up_proj_blocks": (128, 5760, 90, 16),
        "mlp.experts.gate_up_proj_scales": (128, 5760, 90),
        "mlp.experts.gate_up_proj_bias": (128, 5760),
        "mlp.experts.down_proj_blocks": (128, 2880, 90, 16),
        "mlp.experts.down_proj_scales": (128, 2880, 90),
        "mlp.experts.down_proj_bias": (128, 2880),
    }
    assert len(found) == 36 * len(layer) + 3
    # the model card: 116.83 B parameters
    targets = {id(slot): slot.target.numel() for slot in chosen_slots(model, None)}
    assert round(sum(targets.values()) / 1e9, 2) == 116.83
    assert model.cache_specs == (WindowSpec(8, 64, 128), PagedSpec(8, 64)) * 18


def test_minimax_m2_has_its_published_tensors() -> None:
    """96,103 of them: two each for 62 · (256 · 3 + 4) matrices, 6 more a layer, and three."""
    model = on_meta(minimax_m2, MINIMAX_M2)
    found = shapes(model)
    assert len(found) == 96103
    experts = "model.layers.61.block_sparse_moe.experts.255"
    assert found[f"{experts}.w1.weight"] == found[f"{experts}.w3.weight"] == (1536, 3072)
    assert found[f"{experts}.w2.weight"] == (3072, 1536) and found[f"{experts}.w2.weight_scale_inv"] == (
        24,
        12,
    )
    assert found["model.layers.0.self_attn.q_norm.weight"] == (48 * 128,)
    assert found["model.layers.0.self_attn.k_norm.weight"] == (8 * 128,)
    assert found["model.layers.0.block_sparse_moe.e_score_correction_bias"] == (256,)
    assert found["model.layers.0.block_sparse_moe.gate.weight"] == (256, 3072)
    assert "lm_head.weight_scale_inv" not in found


def test_minimax_m2_leaves_mtp_modules_out() -> None:
    model = on_meta(minimax_m2, MINIMAX_M2 | {"num_hidden_layers": 1, "attn_type_list": [1]})
    assert [model.unused(f"model.layers.{layer}.enorm.weight") is None for layer in range(6)] == [
        True, False, False, False, True, True,
    ]  # fmt: skip
    assert model.unused("model.layers.10.enorm.weight") is None


def test_gpt_oss_without_layer_types_alternates() -> None:
    config = {key: value for key, value in GPT_OSS_120B.items() if key != "layer_types"}
    assert gpt_oss.Config.from_hf(config).windows == (128, None) * 18


def test_minimax_m2_rotates_what_any_of_its_words_says() -> None:
    without = {key: value for key, value in MINIMAX_M2.items() if key != "rotary_dim"}
    parameters = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}
    for changed, dims in (
        ({"rotary_dim": 64}, 64),
        ({"partial_rotary_factor": 0.5}, 64),
        ({"rope_parameters": parameters}, 32),
        ({"rope_parameters": parameters, "rotary_dim": 32}, 32),
        ({}, 128),
    ):
        assert minimax_m2.Config.from_hf(without | changed).rotary_dim == dims


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"layer_types": ["chunked_attention", "full_attention"] * 18}, "'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 36 layers"),
        ({"sliding_window": None}, "'sliding_window'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_scaling": None}, "'rope_parameters'"),
        ({"num_local_experts": None}, "'num_local_experts'"),
    ],
)
def test_gpt_oss_refuses(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        gpt_oss.Config.from_hf(GPT_OSS_120B | changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"use_routing_bias": False}, "use_routing_bias"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
        ({"shared_intermediate_size": 3072}, "shared_intermediate_size = 3072"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"attn_type_list": [0, 1]}, "attn_type_list = 0"),
        ({"layernorm_mlp_beta": 3.5}, "layernorm_mlp_beta = 3.5"),
        ({"partial_rotary_factor": 0.25}, r"\[32, 64\]"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "'linear'"),
    ],
)
def test_minimax_m2_refuses(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        minimax_m2.Config.from_hf(MINIMAX_M2 | changed)
