"""Quantised weights for tests, made by the libraries that define the formats: compressed-tensors' compressors
and transformers' FP8 code; by_hand.py has the other layouts, and they are importable from here too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.by_hand import (
    GPT_OSS_MXFP4,
    Recipe,
    Tensors,
    awq_tensors,
    excepting,
    expert_by_expert,
    gptq_tensors,
    integer_meaning,
    integer_quantise,
    modelopt_nvfp4,
    modelopt_nvfp4_meaning,
    pack,
    quantise_checkpoint,
    read_tensors,
    write_tensors,
)

__all__ = [
    "GPT_OSS_MXFP4",
    "RECIPES",
    "awq_tensors",
    "compress",
    "compressed_scheme",
    "decompress",
    "excepting",
    "expert_by_expert",
    "fp8_dequantise",
    "fp8_quantise",
    "gpt_oss_in_mxfp4",
    "gptq_tensors",
    "integer_meaning",
    "integer_quantise",
    "modelopt_nvfp4",
    "modelopt_nvfp4_meaning",
    "mxfp4",
    "pack",
    "quantise_checkpoint",
    "read_tensors",
    "write_tensors",
]


# ---- compressed-tensors


def compressed_scheme(**weights: Any) -> QuantizationScheme:
    """A scheme for linear layers with these weight arguments."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compress(layout: str, scheme: QuantizationScheme, weight: torch.Tensor) -> Tensors:
    """`weight` [rows, columns] float32 → what the library stores for it."""
    args = scheme.weights
    assert args is not None
    rows, columns = weight.shape
    extra: Tensors = {}
    global_scale = None
    if args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        assert args.block_structure is not None
        height, width = args.block_structure
        down, across = -(-rows // height), -(-columns // width)
        padded = torch.zeros(down * height, across * width)
        padded[:rows, :columns] = weight
        blocks = padded.view(down, height, across, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(2), groups.amax(2)
    if args.strategy == "tensor_group":
        global_scale = generate_gparam(weight.min(), weight.max())
        extra["weight_global_scale"] = global_scale
    scale, zero_point = calculate_qparams(low, high, args, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8), **extra}
    if args.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(layout)
    return {name: tensor.contiguous() for name, tensor in compressor.compress(state, scheme).items()}


def decompress(layout: str, scheme: QuantizationScheme, tensors: Tensors) -> torch.Tensor:
    """What the library makes of them, with float32 arithmetic (it would do 4-bit floats in bfloat16)."""
    compressor = BaseCompressor.get_value_from_registry(layout)
    if layout not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        wide = {
            name: tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
            for name, tensor in tensors.items()
        }
        return compressor.decompress(wide, scheme)["weight"].float()
    packed = tensors["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
    return dequantize(
        codes,
        compressor._decompress_scale(tensors["weight_scale"], torch.float32),
        args=scheme.weights,
        global_scale=tensors.get("weight_global_scale"),
        dtype=torch.float32,
    )


# ---- transformers' FP8


def _fp8(**options: Any) -> Any:
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(**options))


def fp8_quantise(weight: torch.Tensor, **options: Any) -> Tensors:
    """`weight` in transformers' FP8; `options` of FineGrainedFP8Config. Only for whole blocks."""
    found = Fp8Quantize(_fp8(**options))._quantize_one("x.weight", weight)
    assert len(found) == 2, "the library left it as it is"
    return {name.removeprefix("x."): tensor for name, tensor in found.items()}


def fp8_dequantise(tensors: Tensors) -> torch.Tensor:
    """What transformers makes of them."""
    operation = Fp8Dequantize(_fp8())
    return operation._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)


# ---- whole checkpoints


def _compressed(name: str, layout: str, **weights: Any) -> Recipe:
    scheme = compressed_scheme(**weights)

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors = compress(layout, scheme, weight)
        return tensors, decompress(layout, scheme, tensors)

    assert scheme.weights is not None
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": None}
    section = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$"],
        "kv_cache_scheme": None,
    }
    return Recipe(name, section, quantise)


def _fp8_block(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """An edge that is no whole block has a scale of its own, as DeepSeek's kv_a_proj_with_mqa of 576 rows."""
    rows, columns = weight.shape
    padded = fp8_quantise(F.pad(weight, (0, -columns % 32, 0, -rows % 32)), weight_block_size=(32, 32))
    codes = padded["weight"][:rows, :columns].contiguous()
    return padded | {"weight": codes}, fp8_dequantise(padded)[:rows, :columns]


def _fp8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors = fp8_quantise(weight, weight_block_size=None)
    meaning = fp8_dequantise(tensors)
    return tensors | {"weight_scale_inv": tensors["weight_scale_inv"].reshape(())}, meaning


def _modelopt(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors = modelopt_nvfp4(weight)
    return tensors, modelopt_nvfp4_meaning(tensors)


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    found = integer_quantise(weight, 32)
    return awq_tensors(*found), integer_meaning(*found, torch.arange(weight.shape[1]) // 32)


def _gptq(bits: int, desc_act: bool) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        group_of = torch.arange(weight.shape[1]) // 32
        if desc_act:
            group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(1))]
        found = integer_quantise(weight, 32, bits, group_of)
        return gptq_tensors(*found, bits, group_of, 1), integer_meaning(*found, group_of)

    return quantise


INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "group_size": 32,
    "checkpoint_format": "gptq",
    "lm_head": False,
}
RECIPES = (
    _compressed("fp8_channel", "float-quantized", num_bits=8, type="float", strategy="channel"),
    _compressed("fp8_tensor", "float-quantized", num_bits=8, type="float", strategy="tensor"),
    _compressed(
        "fp8_block_ct",
        "float-quantized",
        num_bits=8,
        type="float",
        strategy="block",
        block_structure=[32, 48],
    ),
    _compressed("int4_group", "pack-quantized", **INT4),
    _compressed("int4_group_asymmetric", "pack-quantized", **INT4, symmetric=False),
    _compressed(
        "nvfp4_ct",
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
    _compressed(
        "mxfp4_ct",
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    ),
    Recipe("fp8_block", {"quant_method": "fp8", "weight_block_size": [32, 32]}, _fp8_block),
    Recipe("fp8_tensor_transformers", {"quant_method": "fp8", "weight_block_size": None}, _fp8_tensor),
    Recipe(
        "nvfp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
        _modelopt,
    ),
    Recipe(
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        _awq,
    ),
    Recipe("gptq", {**GPTQ, "bits": 4, "desc_act": False}, _gptq(4, False)),
    Recipe("gptq_8bit_desc_act", {**GPTQ, "bits": 8, "desc_act": True}, _gptq(8, True)),
)


# ---- gpt-oss


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [experts, columns, rows], as transformers stores it unquantised → blocks and scales."""
    scheme = compressed_scheme(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    )
    found = [compress("mxfp4-pack-quantized", scheme, matrix.T.contiguous()) for matrix in weight]
    blocks = torch.stack([tensors["weight_packed"].unflatten(1, (-1, 16)) for tensors in found])
    return blocks, torch.stack([tensors["weight_scale"] for tensors in found])


def gpt_oss_in_mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors of an unquantised gpt-oss with its experts in MXFP4, under the names of openai/gpt-oss-20b;
    and what they mean, under transformers' own."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4(tensor)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            stored[name] = meant[name] = tensor
    return stored, meant
