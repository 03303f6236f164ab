"""Small checkpoints in bf16 whose sizes the GPU kernels accept: a model file's TINY with wider layers, as
transformers would save it, and quantised copies. Needs transformers, not compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from firebox.find import load
from firebox.formats import awq, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, nvfp4
from firebox.formats.base import Format
from tests.support.by_hand import (
    GPT_OSS_MXFP4,
    LEVELS,
    Recipe,
    Tensors,
    awq_tensors,
    gptq_tensors,
    integer_quantise,
    modelopt_nvfp4,
    quantise_checkpoint,
    read_tensors,
    write_tensors,
)

VOCAB = 320
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512}
MLPS = {"intermediate_size": 256, "moe_intermediate_size": 128}
LATENT: dict[str, Any] = {
    "hidden_size": 256,
    **MLPS,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
}
RECURRENT: dict[str, Any] = WIDE | {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": WIDE | MLPS,
    "glm4_moe": WIDE | MLPS | {"num_nextn_predict_layers": 0},
    "minimax_m2": WIDE | {"intermediate_size": 128, "rotary_dim": 32, "num_mtp_modules": 0},
    "gpt_oss": WIDE | {"intermediate_size": 128},
    "deepseek_v3": LATENT,
    "kimi_k2": LATENT | {"q_lora_rank": None},
    "kimi_k25": LATENT,
    "qwen3_5_moe": RECURRENT,
    "qwen3_5_moe_text": RECURRENT,
}


def small_config(model: str) -> dict[str, Any]:
    """TINY in these sizes, computed in bf16."""
    config, sizes = load("models", model).TINY, SIZES[model] | {"dtype": "bfloat16"}
    if "text_config" not in config:
        return config | sizes
    sight, text = dict(config["vision_config"]), config["text_config"] | sizes
    if "out_hidden_size" in sight:
        sight["out_hidden_size"] = sizes["hidden_size"]
    return config | {"text_config": text, "vision_config": sight, "dtype": "bfloat16"}


def write_small(folder: Path, model: str) -> Path:
    """A random checkpoint, the same for every call, all of it in bf16: an engine in float32 and one in bf16
    begin with the same numbers."""
    from tests.support.checkpoints import write_checkpoint  # not for who wants a config: 1.6 s of imports

    config = small_config(model)
    written = write_checkpoint(folder / "wide", config, seed=7)
    kept = json.loads((written / "config.json").read_text()) | {"dtype": "bfloat16"}
    write_tensors(
        folder / "bf16", kept, {n: _narrow(n, tensor) for n, tensor in read_tensors(written).items()}
    )
    return folder / "bf16"


def _narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """In bf16, exactly scaled: embeddings N(0, 0.5²) and matrices N(0, 1 / columns). With those of
    `write_checkpoint` attention is so sharp that rounding to bf16 alone moves logits by 2 to 6 %, and a
    kernel that is wrong by as much would go unseen."""
    if "embed_tokens" in name:
        return tensor.bfloat16() * 4
    plain = tensor.dim() < 2 or "lm_head" in name or "conv1d" in name or name.endswith("bias")
    return tensor.bfloat16() * (1.0 if plain else 0.5)


def write_quantised(plain: Path, format: str) -> Path:
    """A copy of `plain` beside it, in a format of RECIPES or in gpt-oss's MXFP4."""
    target = plain.with_name(format)
    if format == "mxfp4":
        config = json.loads((plain / "config.json").read_text())
        stored = _gpt_oss_in_mxfp4(read_tensors(plain))
        write_tensors(target, config | {"quantization_config": GPT_OSS_MXFP4}, stored)
    else:
        quantise_checkpoint(plain, target, RECIPES[format], PLAIN.get(format, ()))
    return target


def fp8_blocks(weight: torch.Tensor, block: int = 128) -> Tensors:
    """`weight` [rows, columns], whole blocks, in DeepSeek-V3's FP8."""
    tiles = weight.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [down, block, across, block]
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scales}


def mxfp4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [..., rows, columns] → gpt-oss's blocks [..., rows, groups, 16] and scales [..., rows,
    groups]. The largest of a group is 4 to 8 times its scale, and what is above 6 becomes 6."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    scaled = groups / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - LEVELS).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def _gpt_oss_in_mxfp4(tensors: Tensors) -> Tensors:
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # [experts, columns, rows]
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4_groups(tensor.transpose(1, 2))
        else:
            stored[name] = tensor
    return stored


def _recipe(format: Format, section: dict[str, Any], quantise: Callable[[torch.Tensor], Tensors]) -> Recipe:
    def both(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors = quantise(weight.float())
        return tensors, format.dequantise(tensors, *weight.shape)

    return Recipe(format.name, section, both)


def int4_groups(weight: torch.Tensor, group: int = 32) -> Tensors:
    """`weight` [rows, columns] in compressed-tensors' symmetric integers: −8 … 7 times a scale."""
    rows, columns = weight.shape
    parts = weight.unflatten(1, (-1, group))
    scales = (parts.abs().amax(-1) / 7.5).clamp(min=1e-6).bfloat16()
    codes = (parts / scales.float().unsqueeze(-1)).round().clamp(-8, 7).int().flatten(1) + 8
    places = torch.arange(0, 32, 4)
    words = (codes.unflatten(1, (-1, 8)).long() << places).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    shape = torch.tensor([rows, columns])
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}


def gptq_groups(weight: torch.Tensor, group: int = 32) -> Tensors:
    """`weight` [rows, columns] in GPTQ's integers, groups in order."""
    return gptq_tensors(*integer_quantise(weight, group), 4, torch.arange(weight.shape[1]) // group, 1)


def fp8_whole(weight: torch.Tensor) -> Tensors:
    """`weight` in E4M3 with one scale."""
    scale = (weight.abs().amax() / 448).float()
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """The section of a checkpoint in compressed-tensors, routers and output matrix left out."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$"],
    }


CHANNELS = _compressed("float-quantized", num_bits=8, type="float", strategy="channel")
TENSOR = _compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
INT4 = _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "desc_act": False}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
# Parts of paths that stay as they are.
PLAIN = dict.fromkeys(("fp8_channel", "fp8_tensor"), ("in_proj_b", "in_proj_a"))
RECIPES: dict[str, Recipe] = {
    "fp8_block": _recipe(
        fp8_block.Format(), {"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_blocks
    ),
    "fp8_channel": _recipe(fp8_channel.Format(), CHANNELS, fp8_channel.quantise),
    "nvfp4": _recipe(nvfp4.Format(), MODELOPT, modelopt_nvfp4),
    "fp8_tensor": _recipe(fp8_tensor.Format(), TENSOR, fp8_whole),
    "int4_group": _recipe(int4_group.Format(), INT4, int4_groups),
    "gptq": _recipe(gptq.Format(group=32), GPTQ, gptq_groups),
    "awq": _recipe(awq.Format(32), AWQ, lambda weight: awq_tensors(*integer_quantise(weight, 32))),
}
