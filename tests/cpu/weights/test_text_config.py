"""What a config.json says of the language model, when half of it is under `text_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firebox.formats.select import formats_of
from firebox.weights.checkpoint import Checkpoint, open_checkpoint

EXPERT = "language_model.model.layers.3.mlp.experts.7.down_proj"
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
}
NVFP4 = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["*lm_head", "*self_attn*"]}}


def checkpoint(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return open_checkpoint(folder)


def test_the_section_goes_before_the_whole(tmp_path: Path) -> None:
    found = checkpoint(
        tmp_path,
        {
            "model_type": "kimi_k25",
            "eos_token_id": 1,
            "dtype": "bfloat16",
            "hidden_size": 1152,
            "text_config": {"model_type": "kimi_k2", "hidden_size": 7168, "eos_token_id": 2},
        },
    )
    assert found.model_type == "kimi_k25"
    assert found.text_config["model_type"] == "kimi_k2" and found.text_config["hidden_size"] == 7168
    assert found.eos_token_ids == {2} and found.dtype == "bfloat16"


def test_null_in_the_section_says_nothing(tmp_path: Path) -> None:
    """transformers writes text_config with every key it knows; those it was not told are null."""
    nothing = {"eos_token_id": None, "dtype": None, "quantization_config": None, "tie_word_embeddings": None}
    found = checkpoint(
        tmp_path,
        {
            "model_type": "kimi_k25",
            "eos_token_id": [5, 6],
            "torch_dtype": "bfloat16",
            "quantization_config": INT4,
            "text_config": {"model_type": "kimi_k2", **nothing},
        },
    )
    assert found.eos_token_ids == {5, 6} and found.dtype == "bfloat16"
    assert formats_of(found.text_config)(EXPERT).name == "int4_group"
    assert "tie_word_embeddings" not in found.text_config


def test_quantization_config_at_either_level(tmp_path: Path) -> None:
    for config in (
        {"model_type": "kimi_k25", "text_config": {"quantization_config": INT4}},
        {"model_type": "kimi_k25", "text_config": {}, "quantization_config": INT4},
    ):
        format_of = formats_of(checkpoint(tmp_path, config).text_config)
        assert format_of(EXPERT).name == "int4_group"
        assert format_of("language_model.lm_head").name == "bf16"
        assert format_of("language_model.model.layers.3.self_attn.kv_b_proj").name == "bf16"


def test_what_quantised_the_checkpoint_again_goes_before_the_section(tmp_path: Path) -> None:
    """nvidia/Kimi-K2.5-NVFP4 keeps the section of the int4 checkpoint that it was made from; the truth stands
    in hf_quant_config.json, or at the top of config.json."""
    config: dict[str, Any] = {"model_type": "kimi_k25", "text_config": {"quantization_config": INT4}}
    found = checkpoint(tmp_path, config, hf_quant_config=NVFP4)
    assert formats_of(found.text_config)(EXPERT).name == "nvfp4"
    top = {**config, "quantization_config": {"quant_method": "modelopt", **NVFP4["quantization"]}}
    assert formats_of(checkpoint(tmp_path, top).text_config)(EXPERT).name == "nvfp4"


def test_generation_config_goes_first(tmp_path: Path) -> None:
    config = {"model_type": "kimi_k25", "text_config": {"eos_token_id": 2}}
    assert checkpoint(tmp_path, config, generation_config={"eos_token_id": 9}).eos_token_ids == {9}


def test_a_model_that_only_reads(tmp_path: Path) -> None:
    config = {"model_type": "glm4_moe", "sliding_window": None}
    assert checkpoint(tmp_path, config).text_config == config
