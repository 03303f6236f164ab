"""What DeepSeek-V3's config may say, and which of its checkpoint's tensors are not read; Kimi's two names for
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from firebox.errors import MissingTensor, UnknownTensor, UnsupportedModel
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.models import deepseek_v3, kimi_k2, kimi_k25
from firebox.models.base import rotary
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import InProcessEngine

META = torch.device("meta")
PROMPT = [7, 100, 3, 250, 9, 9, 42, 311, 5, 6, 77, 30, 8, 120, 64, 2, 1, 19]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("attention_dropout", 0.1, "attention_dropout"),
        ("scoring_func", "softmax", "scoring_func"),
        ("topk_method", "greedy", "topk_method"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("ep_size", 8, "ep_size"),
        ("pretraining_tp", 2, "pretraining_tp"),
        ("num_key_value_heads", 2, "num_key_value_heads"),
        ("rope_scaling", {"type": "linear", "factor": 4.0}, "linear"),
        ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": 64}, "factor"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ("rope_scaling", {"full_attention": {"rope_type": "yarn", "factor": 4.0}}, "full_attention"),
        ("n_group", None, "n_group"),
        ("n_group", 3, "n_group"),
        ("n_group", 16, "n_group"),
        ("topk_group", 5, "topk_group"),
        ("num_experts_per_tok", 9, "num_experts_per_tok"),
        ("kv_lora_rank", None, "kv_lora_rank"),
        ("qk_rope_head_dim", None, "qk_rope_head_dim"),
    ],
)
def test_unsupported_values_are_named(key: str, value: Any, named: str) -> None:
    assert deepseek_v3.Config.from_hf(deepseek_v3.TINY).n_group == 4
    with pytest.raises(UnsupportedModel, match=named):
        deepseek_v3.Config.from_hf({**deepseek_v3.TINY, key: value})


def test_rotary_parameters_by_layer_are_refused_by_name() -> None:
    parameters = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(UnsupportedModel, match="'full_attention'"):
        rotary({"rope_parameters": parameters}, 10000.0)


@pytest.mark.parametrize("module", [deepseek_v3, kimi_k2, kimi_k25])
def test_tensors_that_are_not_read(module: Any) -> None:
    config = module.TINY | module.TINY.get("text_config", {}) | {"num_nextn_predict_layers": 0}
    build = Build(probe_cpu(), META, torch.float32, torch.float32, 8)
    model = module.Model(module.Config.from_hf(config), build)
    prefix = "language_model." if module is kimi_k25 else ""
    assert "MTP" in str(model.unused(f"{prefix}model.layers.3.eh_proj.weight"))
    assert model.unused(f"{prefix}model.layers.2.self_attn.extra.weight") is None
    assert model.unused(f"{prefix}model.layers.30.input_layernorm.weight") is None
    for name in ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.bias"):
        assert (model.unused(name) is not None) == (module is kimi_k25)


def test_kimi_k25_needs_its_text_config() -> None:
    with pytest.raises(UnsupportedModel, match="model_type"):
        kimi_k25.Config.from_hf({**kimi_k2.TINY, "model_type": "kimi_k25"})


def test_kimi_k25_loads_as_it_is_published(tmp_path: Path) -> None:
    """transformers renames the language model's layers to `blocks` when it saves; the published checkpoints
    call them `layers`."""
    folder = write_checkpoint(tmp_path, kimi_k25.TINY)
    file = folder / "model.safetensors"
    saved = load_file(file)
    assert any(".model.blocks." in name for name in saved)
    published = {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): tensor
        for name, tensor in saved.items()
    }
    save_file(published, file, {"format": "pt"})
    expected = reference_greedy(load_reference(folder), PROMPT, 12)
    assert InProcessEngine(folder).generate([PROMPT])[0][:12] == expected

    lost = next(name for name in published if ".layers.1.self_attn.kv_b_proj" in name)
    save_file({k: v for k, v in published.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(MissingTensor, match=lost.replace(".", r"\.")):
        InProcessEngine(folder)
    save_file(published | {"language_model.model.extra": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(UnknownTensor, match=r"language_model\.model\.extra"):
        InProcessEngine(folder)


def test_experts_in_one_tensor_load_too(tmp_path: Path) -> None:
    """The layout of models in memory: [experts, 2 · inter, hidden], gate rows first."""
    folder = write_checkpoint(tmp_path, deepseek_v3.TINY)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    expected = InProcessEngine(folder).generate([PROMPT])
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(16)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{prefix}.down_proj"] = down
    save_file(tensors, file, {"format": "pt"})
    assert InProcessEngine(folder).generate([PROMPT]) == expected


def test_an_mtp_layer_that_config_json_does_not_announce_is_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, deepseek_v3.TINY | {"num_nextn_predict_layers": 0})
    file = folder / "model.safetensors"
    expected = InProcessEngine(folder).generate([PROMPT])
    tensors = load_file(file)
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128)
    tensors["model.layers.3.embed_tokens.weight"] = torch.randn(320, 64)
    save_file(tensors, file, {"format": "pt"})
    assert InProcessEngine(folder).generate([PROMPT]) == expected
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
