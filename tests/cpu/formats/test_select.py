"""Which module is stored in which format: against the libraries' own matching, and on published configs."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils.match import is_match, match_name
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from firebox.errors import UnsupportedFormat
from firebox.formats import awq, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.select import (
    PLAIN,
    formats_of,
    matches_compressed_tensors,
    matches_modelopt,
    matches_parts,
    matches_transformers,
)
from firebox.weights.checkpoint import open_checkpoint

NAMES = (
    "lm_head",
    "model.lm_head",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.kv_a_proj_with_mqa",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.experts.1.gate_proj",
    "model.layers.1.mlp.experts.11.down_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.1.mlp.shared_expert_gate",
    "model.layers.92.eh_proj",
    "language_model.model.layers.1.mlp.experts.1.gate_proj",
    "language_model.lm_head",
    "visual.blocks.1.attn.qkv",
)
PATTERNS = (
    "lm_head",
    "gate",
    "mlp.gate",
    ".gate",
    "model.layers.1",
    "model.layers.1.",
    "model.layers.1.mlp.gate",
    "model.layers.1.self_attn.q_proj",
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "layers.1",
    "self_attn",
    "down_proj",
    "experts",
    "visual",
    "(visual|lm_head)",
    "Linear",
    "Linea",
    "",
    "re:.*",
    "re:.*mlp.gate",
    r"re:.*mlp\.gate$",
    "re:.*self_attn.*",
    "re:self_attn",
    r"re:model\.layers\.1\.",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    "re:.*lm_head",
    "re:visual.*",
    "re:^lm_head$",
)


def test_names_as_compressed_tensors_matches_them() -> None:
    linear = torch.nn.Linear(1, 1, device="meta")
    told_apart = 0
    for name in NAMES:
        for pattern in PATTERNS:
            found = matches_compressed_tensors(name, [pattern])
            assert found == is_match(name, linear, pattern), (name, pattern)
            assert found == (match_name(name, pattern) or pattern == "Linear"), (name, pattern)
            told_apart += found
    assert 40 < told_apart < len(NAMES) * len(PATTERNS) // 2
    assert matches_compressed_tensors("a.b", ["x", "a.b"]) and not matches_compressed_tensors("a.b", [])


def test_names_as_transformers_matches_them() -> None:
    told_apart = 0
    for name in NAMES:
        for pattern in (pattern for pattern in PATTERNS if not pattern.startswith("re:")):
            found = matches_transformers(name, [pattern])
            assert found == (not should_convert_module(name, [pattern])), (name, pattern)
            told_apart += found
    assert told_apart > 40


@pytest.mark.parametrize(
    ("match", "pattern", "meant", "not_meant"),
    [
        (
            matches_compressed_tensors,
            "model.layers.1.mlp.gate",
            ["model.layers.1.mlp.gate"],
            ["gate_proj", "x"],
        ),
        (matches_transformers, "mlp.gate", ["model.layers.1.mlp.gate"], ["model.layers.1.mlp.gate_proj"]),
        (matches_transformers, "model.layers.1", ["model.layers.1.mlp.gate"], ["model.layers.11.mlp.gate"]),
        (matches_parts, "mlp.gate", ["model.layers.1.mlp.gate"], ["model.layers.1.mlp.gate_proj"]),
        (
            matches_parts,
            "self_attn",
            ["model.layers.1.self_attn.q_proj"],
            ["model.layers.1.self_attn2.q_proj"],
        ),
        (matches_parts, "model.layers.1.", ["model.layers.1.mlp.gate"], ["model.layers.11.mlp.gate"]),
        (matches_parts, "expert", [], ["model.layers.1.mlp.experts.1.gate_proj"]),
        (matches_modelopt, "model.layers.1", ["model.layers.1.mlp.gate"], ["model.layers.11.mlp.gate"]),
        (
            matches_modelopt,
            "model.layers.1.self_attn*",
            ["model.layers.1.self_attn.q_proj"],
            ["model.layers.1"],
        ),
        (matches_modelopt, "*.mlp.gate", ["model.layers.1.mlp.gate"], ["model.layers.1.mlp.gate_proj"]),
        (matches_modelopt, "lm_head", ["lm_head"], ["model.lm_head", "lm_head2"]),
        (matches_modelopt, "model.layers.9?", ["model.layers.92.eh_proj"], ["model.layers.9.mlp.gate"]),
        (matches_modelopt, "mtp*", ["mtp.layers.0.mlp.gate"], ["model.mtp"]),
    ],
)
def test_no_pattern_means_a_part_of_a_name(
    match: Any, pattern: str, meant: list[str], not_meant: list[str]
) -> None:
    assert all(match(name, [pattern]) for name in meant)
    assert not any(match(name, [pattern]) for name in not_meant)


SHELL = st.lists(st.text("ab.*?", max_size=8), max_size=3)


@given(st.text("ab.", max_size=10), SHELL)
@settings(max_examples=500)
def test_shell_patterns_mean_a_module_or_one_that_contains_it(path: str, patterns: list[str]) -> None:
    heads = [path[:i] for i in range(len(path) + 1) if path[i:][:1] in ("", ".")]
    wanted = any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)
    assert matches_modelopt(path, patterns) == wanted


# ---- whole configs against compressed-tensors itself


def weights(**changed: Any) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    } | changed


def compressed(groups: dict[str, dict[str, Any]], ignore: list[str], layout: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


class Tree(torch.nn.Module):
    """Linear layers under these names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            *parents, last = name.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.add_module(last, torch.nn.Linear(128, 128, device="meta"))


INT4 = weights(num_bits=4, type="int", strategy="group", group_size=32)
BLOCK = weights(strategy="block", block_structure=[128, 128])
GROUPS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"group_0": {"targets": ["Linear"], "weights": weights()}}, ["lm_head", "re:.*mlp.gate$"]),
    ({"group_0": {"targets": ["re:.*down_proj", "lm_head"], "weights": weights()}}, []),
    (
        {
            "group_0": {"targets": ["Linear"], "weights": weights()},
            "group_1": {"targets": [r"re:.*experts\..*"], "weights": weights(strategy="tensor")},
            "group_2": {"targets": ["model.layers.1.mlp.experts.1.gate_proj"], "weights": BLOCK},
        },
        ["re:.*self_attn.*"],
    ),
    (
        {  # two regular expressions mean one module: the first in the alphabet is taken, not the first group
            "group_0": {"targets": [r"re:model\..*gate_proj"], "weights": weights()},
            "group_1": {"targets": [r"re:.*experts\..*"], "weights": weights(strategy="tensor")},
        },
        ["Linea"],
    ),
    ({"group_0": {"targets": ["Linear"], "weights": weights()}}, ["Linear"]),
]


@pytest.mark.parametrize(("groups", "ignore"), GROUPS)
def test_groups_as_compressed_tensors_applies_them(
    groups: dict[str, dict[str, Any]], ignore: list[str]
) -> None:
    names = tuple(name for name in NAMES if not name.startswith("language_model."))
    section = compressed(groups, ignore, "float-quantized")
    model = Tree(names)
    apply_quantization_config(model, QuantizationConfig.model_validate(section), show_progress=False)
    format_of = formats_of({"quantization_config": section})
    for name in names:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        strategy = None if scheme is None else scheme.weights.strategy
        expected = {None: "bf16", "channel": "fp8_channel", "tensor": "fp8_tensor", "block": "fp8_block"}[
            strategy
        ]
        assert format_of(name).name == expected, name


# ---- configs as published, cut to what matters

GLM_47_FP8 = {
    "quantization_config": compressed(
        {
            "group_0": {
                "input_activations": weights(strategy="token", dynamic=True),
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights(observer="minmax"),
            }
        },
        ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(3, 93)), "model.layers.92.eh_proj"],
        "float-quantized",
    )
}
DEEPSEEK_V3 = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
MINIMAX_M2 = {
    "quantization_config": {
        **DEEPSEEK_V3["quantization_config"],
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
}
GPT_OSS = {
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
}
ATTENTION = [f"model.layers.{layer}.self_attn*" for layer in range(92)]
GLM_47_NVFP4 = {
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head", *ATTENTION, "model.layers.92*"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quant_method": "modelopt",
    }
}
HF_QUANT_CONFIG = {
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", *ATTENTION, "model.layers.92*"],
    },
}
KIMI_K25 = {
    "quantization_config": compressed(
        {
            "group_0": {
                "input_activations": None,
                "targets": ["Linear"],
                "weights": {**INT4, "actorder": None},
            }
        },
        ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "pack-quantized",
    )
}
AWQ = {
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["self_attn", "shared_experts", "mlp.gate", "model.layers.0."],
    }
}
GPTQ = {
    "quantization_config": {
        "bits": 4,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": {r"-:.*self_attn\.k_proj": {}},
        "group_size": 128,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:4.0.0"]},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
    }
}

LAYER, EXPERT = "model.layers.3", "model.layers.3.mlp.experts.7.down_proj"
CHANNEL, BLOCKS, NV = fp8_channel.Format(), fp8_block.Format(), nvfp4.Format()
K25 = int4_group.Format(32)
PUBLISHED: list[tuple[dict[str, Any], dict[str, object]]] = [
    (
        GLM_47_FP8,
        {
            EXPERT: CHANNEL,
            f"{LAYER}.self_attn.q_proj": CHANNEL,
            f"{LAYER}.mlp.shared_experts.up_proj": CHANNEL,
            "model.layers.0.mlp.gate_proj": CHANNEL,
            f"{LAYER}.mlp.gate_proj": CHANNEL,
            f"{LAYER}.mlp.gate": PLAIN,
            "lm_head": PLAIN,
        },
    ),
    (DEEPSEEK_V3, {EXPERT: BLOCKS, f"{LAYER}.self_attn.kv_b_proj": BLOCKS, "lm_head": PLAIN}),
    (
        MINIMAX_M2,
        {
            f"{LAYER}.block_sparse_moe.experts.7.w1": BLOCKS,
            f"{LAYER}.block_sparse_moe.gate": PLAIN,
            f"{LAYER}.self_attn.q_proj": BLOCKS,
            "lm_head": PLAIN,
        },
    ),
    (
        GPT_OSS,
        {
            f"{LAYER}.mlp.experts.gate_up_proj": mxfp4.Format(),
            f"{LAYER}.self_attn.q_proj": PLAIN,
            "model.layers.11.self_attn.o_proj": PLAIN,
            f"{LAYER}.mlp.router": PLAIN,
            "lm_head": PLAIN,
        },
    ),
    *(
        (
            config,
            {
                EXPERT: NV,
                f"{LAYER}.mlp.shared_experts.up_proj": NV,
                f"{LAYER}.self_attn.q_proj": PLAIN,
                "model.layers.91.self_attn.o_proj": PLAIN,
                "model.layers.92.mlp.experts.1.up_proj": PLAIN,
                "lm_head": PLAIN,
            },
        )
        for config in (GLM_47_NVFP4, {"quantization_config": HF_QUANT_CONFIG})
    ),
    (
        KIMI_K25,
        {
            f"language_model.{EXPERT}": K25,
            EXPERT: K25,
            f"language_model.{LAYER}.mlp.shared_experts.up_proj": PLAIN,
            "language_model.model.layers.0.mlp.gate_proj": PLAIN,
            f"language_model.{LAYER}.self_attn.kv_b_proj": PLAIN,
            "language_model.lm_head": PLAIN,
            "lm_head": PLAIN,
        },
    ),
    (
        AWQ,
        {
            EXPERT: awq.Format(128),
            f"{LAYER}.mlp.gate_proj": awq.Format(128),
            f"{LAYER}.self_attn.q_proj": PLAIN,
            f"{LAYER}.mlp.shared_experts.up_proj": PLAIN,
            "model.layers.0.mlp.gate_proj": PLAIN,
            "model.layers.10.mlp.gate_proj": awq.Format(128),
            "lm_head": PLAIN,
        },
    ),
    (
        GPTQ,
        {
            EXPERT: gptq.Format(128),
            f"{LAYER}.self_attn.q_proj": gptq.Format(128),
            f"{LAYER}.self_attn.k_proj": PLAIN,
            "lm_head": PLAIN,
        },
    ),
    ({}, {EXPERT: PLAIN, "lm_head": PLAIN}),
    ({"quantization_config": None}, {EXPERT: PLAIN}),
]


@pytest.mark.parametrize(("config", "expected"), PUBLISHED)
def test_published_configs(config: dict[str, Any], expected: dict[str, object]) -> None:
    format_of = formats_of(config)
    assert {path: format_of(path) for path in expected} == expected


def section(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {"quantization_config": {**config["quantization_config"], **changed}}


def group_of(layout: str, **changed: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights(**changed)}
    return {"quantization_config": compressed({"group_0": group}, [], layout)}


@pytest.mark.parametrize(
    ("config", "format"),
    [
        (group_of("float-quantized", strategy="tensor"), fp8_tensor.Format()),
        (
            group_of("float-quantized", strategy="block", block_structure=[64, 32]),
            fp8_block.Format((64, 32), "weight_scale"),
        ),
        (group_of("pack-quantized", num_bits=4, type="int", strategy="channel"), int4_group.Format(0)),
        (
            group_of(
                "pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=False
            ),
            int4_group.Format(128, symmetric=False),
        ),
        (
            group_of("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
            nvfp4.Format("compressed_tensors"),
        ),
        (
            group_of("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32),
            mxfp4.Format("compressed_tensors"),
        ),
        (section(DEEPSEEK_V3, weight_block_size=[64, 32]), fp8_block.Format((64, 32))),
        (
            section(DEEPSEEK_V3, weight_block_size=None),
            fp8_tensor.Format("weight_scale_inv", "activation_scale"),
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
            fp8_tensor.Format(),
        ),
        (section(GLM_47_NVFP4, quant_algo="FP8"), fp8_tensor.Format()),
        (section(GPTQ, group_size=-1, bits=8, desc_act=True), gptq.Format(0, 8, desc_act=True)),
        (section(GPTQ, checkpoint_format="gptq_v2"), gptq.Format(128, zero_offset=0)),
    ],
)
def test_variants(config: dict[str, Any], format: object) -> None:
    assert formats_of(config)("model.layers.3.mlp.up_proj") == format


def test_the_output_matrix_where_the_config_says_so() -> None:
    assert formats_of(section(GPTQ, lm_head=True))("lm_head") == gptq.Format(128)
    assert formats_of(section(DEEPSEEK_V3, modules_to_not_convert=[]))("lm_head") == BLOCKS
    ignored = {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["lm_head"]}}
    assert formats_of(ignored)("lm_head") == PLAIN


def test_modelopt_with_a_format_for_each_layer() -> None:
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4"}, "lm_head": {"quant_algo": "FP8"}}
    config = section(GLM_47_NVFP4, quant_algo="MIXED_PRECISION", quantized_layers=layers)
    format_of = formats_of(config)
    assert format_of("model.layers.0.mlp.up_proj") == NV and format_of("lm_head") == fp8_tensor.Format()
    assert format_of("model.layers.0.mlp.down_proj") == PLAIN


def test_hf_quant_config_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4_moe"}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(HF_QUANT_CONFIG))
    format_of = formats_of(open_checkpoint(tmp_path).config)
    assert format_of(EXPERT) == NV and format_of("lm_head") == PLAIN


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ({"quantization_config": {"bits": 4}}, "'None'"),
        (section(GLM_47_NVFP4, quant_algo="W4A8_AWQ"), "'W4A8_AWQ'"),
        (section(GLM_47_NVFP4, group_size=32), "group_size is 32"),
        (
            section(
                GLM_47_NVFP4, quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "INT8"}}
            ),
            "'INT8'",
        ),
        (section(AWQ, bits=8), "bits is 8"),
        (section(AWQ, version="gemv"), "'gemv'"),
        (section(AWQ, zero_point=False), "zero_point is False"),
        (section(AWQ, group_size=None), "group_size"),
        (section(GPTQ, bits=3), "bits is 3"),
        (section(GPTQ, checkpoint_format="marlin"), "'marlin'"),
        (section(GPTQ, pack_dtype="int16"), "'int16'"),
        (section(GPTQ, dynamic={"+:.*down_proj": {"bits": 8}}), r"\+:\.\*down_proj"),
        (group_of("int-quantized", type="int"), "8-bit int"),
        (group_of("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32), "8-bit int"),
        (group_of("marlin-24", num_bits=4, type="int", strategy="group", group_size=32), "'marlin-24'"),
        (group_of("float-quantized", strategy="group", group_size=32), "'group'"),
        (group_of("float-quantized", strategy="block"), "block_structure"),
        (
            group_of(
                "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group"
            ),
            "actorder 'group'",
        ),
        (section(GLM_47_FP8, quantization_status="initialized"), "'initialized'"),
        (section(GLM_47_FP8, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (section(GLM_47_FP8, config_groups=None), "config_groups"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedFormat, match=named):
        formats_of(config)
