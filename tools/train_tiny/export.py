"""Writes and reads the model folder: Hugging Face names, one bf16 safetensors file, config.json.

Names and dtypes are those of the published GLM-4.x checkpoints: one tensor an expert, the MTP layer as
`model.layers.<layers>` with its own copies of the embedding and the head, the routers' selection bias in
fp32. `dtype` in config.json is float32: loaders widen the bf16 weights exactly and compute in fp32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.train_tiny.model import SparseMLP, TinyModel
from tools.train_tiny.spec import END_ID, WORK, Sizes

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_model(model: TinyModel, folder: Path) -> None:
    """Everything a server needs, in `folder`; the weights are rounded to bf16 here."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor, exact in checkpoint_tensors(model):
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.float() if exact else tensor.bfloat16()).contiguous().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config(model.sizes))
    _write_json(folder / "generation_config.json", {"eos_token_id": [END_ID], "pad_token_id": END_ID})
    for name in COPIED:
        shutil.copy(WORK / name, folder / name)


def read_model(folder: Path, sizes: Sizes | None = None) -> TinyModel:
    """The exported weights, widened to fp32, in the training model; raises on a missing or unknown name."""
    model = TinyModel(sizes or Sizes()).eval()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter, _ in checkpoint_tensors(model):
            parameter.copy_(tensors.pop(name))
    assert not tensors, f"unknown tensors: {sorted(tensors)[:5]}"
    return model


def checkpoint_tensors(model: TinyModel) -> Iterator[tuple[str, Tensor, bool]]:
    """(published name, tensor or view of one, keep fp32) for the whole checkpoint."""
    yield "model.embed_tokens.weight", model.embed_tokens.weight, False
    yield "model.norm.weight", model.norm.weight, False
    yield "lm_head.weight", model.head.weight, False
    for index, layer in enumerate([*model.layers, model.mtp]):
        yield from _layer_tensors(f"model.layers.{index}", layer)
    draft = f"model.layers.{model.sizes.layers}"
    yield f"{draft}.embed_tokens.weight", model.embed_tokens.weight, False
    yield f"{draft}.shared_head.head.weight", model.head.weight, False


def _layer_tensors(prefix: str, layer: torch.nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in layer.named_parameters():
        if name.startswith("mlp.") and isinstance(layer.mlp, SparseMLP) and parameter.ndim == 3:
            projection = name.removeprefix("mlp.")
            for expert in range(parameter.shape[0]):
                yield f"{prefix}.mlp.experts.{expert}.{projection}.weight", parameter[expert], False
        else:
            yield f"{prefix}.{name.replace('head_norm', 'shared_head.norm')}", parameter, False
    if isinstance(layer.mlp, SparseMLP):
        yield f"{prefix}.mlp.gate.e_score_correction_bias", layer.mlp.gate.bias, True


def config(sizes: Sizes) -> dict:
    """config.json as for any GLM-4.x checkpoint."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "dtype": "float32",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "first_k_dense_replace": sizes.dense_layers,
        "intermediate_size": sizes.dense_intermediate,
        "hidden_act": "silu",
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "use_qk_norm": True,
        "partial_rotary_factor": sizes.rotary_dim / sizes.head_dim,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": sizes.max_context_tokens,
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "n_shared_experts": 1,
        "moe_intermediate_size": sizes.expert_intermediate,
        "norm_topk_prob": True,
        "routed_scaling_factor": sizes.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": sizes.norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
