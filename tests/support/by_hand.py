"""Quantised weights in the layouts of modelopt, AutoAWQ and GPTQModel, written out from their documents, and
whole checkpoints of them. Needs torch and safetensors, nothing of the libraries that define formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


# ---- modelopt's NVFP4: weight_scale_2 = amax / (6 · 448), weight_scale = group amax / (6 · weight_scale_2)

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def modelopt_nvfp4(weight: torch.Tensor, group: int = 16) -> Tensors:
    """`weight` [rows, columns] as modelopt exports it."""
    scale_2 = weight.abs().amax() / (6 * 448)
    groups = weight.unflatten(1, (-1, group))
    scale = (groups.abs().amax(2) / (6 * scale_2)).clamp(min=2**-9).to(torch.float8_e4m3fn)
    scaled = groups / (scale.float() * scale_2).unsqueeze(2)
    nearest = (
        (scaled.abs().unsqueeze(-1) - LEVELS).abs().argmin(-1)
    )  # which of two equally near is no matter here
    codes = (nearest + 8 * (scaled < 0)).flatten(1).to(torch.uint8)
    return {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.01),
    }


def modelopt_nvfp4_meaning(tensors: Tensors, group: int = 16) -> torch.Tensor:
    """The weight, one code at a time: even columns in the low four bits."""
    levels = [float(level) for level in LEVELS] + [-float(level) for level in LEVELS]
    scales = (tensors["weight_scale"].float() * tensors["weight_scale_2"].reshape(())).tolist()
    rows = zip(tensors["weight"].tolist(), scales, strict=True)
    values = [
        [levels[line[c // 2] >> 4 * (c % 2) & 15] * scale[c // group] for c in range(2 * len(line))]
        for line, scale in rows
    ]
    return torch.tensor(values)  # a product of two float32 in Python's double is rounded here, once


# ---- AutoAWQ's "gemm" layout and GPTQ's

AWQ_ORDER = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # the place of a word, lowest bits first, → the row of its eight that is there


def integer_quantise(
    weight: torch.Tensor, group: int, bits: int = 4, group_of: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, columns], zeros and scales [rows, groups] by the range of each group of columns."""
    columns = weight.shape[1]
    group_of = torch.arange(columns) // group if group_of is None else group_of
    groups, top = int(group_of.max()) + 1, 2**bits - 1
    low, high = (
        torch.stack([reduce(weight[:, group_of == g], 1) for g in range(groups)], 1).clamp(*limits)
        for reduce, limits in ((torch.amin, (None, 0)), (torch.amax, (0, None)))
    )
    scales = ((high - low) / top).clamp(min=1e-6).half().float()
    zeros = (-low / scales).round().clamp(1, top)  # GPTQ stores zero − 1
    codes = (weight / scales[:, group_of] + zeros[:, group_of]).round().clamp(0, top)
    return codes.int(), zeros.int(), scales


def pack(codes: list[int], bits: int) -> int:
    """One int32 word of codes, the first in the lowest bits."""
    word = sum(code << (bits * place) for place, code in enumerate(codes))
    return word - 2**32 if word >= 2**31 else word


def awq_tensors(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Tensors:
    """AutoAWQ's three tensors for codes [rows, columns], zeros and scales [rows, groups]."""

    def words(per_row: torch.Tensor) -> torch.Tensor:
        packed = [
            [pack([line[8 * word + row] for row in AWQ_ORDER], 4) for word in range(len(line) // 8)]
            for line in per_row.T.tolist()
        ]
        return torch.tensor(packed, dtype=torch.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T.contiguous().half()}


def gptq_tensors(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    group_of: torch.Tensor,
    offset: int,
) -> Tensors:
    """GPTQ's four tensors; `offset` 1 for "gptq", which stores zeros less one, and 0 for "gptq_v2"."""
    per_word = 32 // bits
    along_columns = [
        [pack(line[first : first + per_word], bits) for first in range(0, len(line), per_word)]
        for line in codes.tolist()
    ]
    along_rows = [
        [pack(line[first : first + per_word], bits) for first in range(0, len(line), per_word)]
        for line in (zeros - offset).T.tolist()
    ]
    return {
        "qweight": torch.tensor(along_columns, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(along_rows, dtype=torch.int32),
        "scales": scales.T.contiguous().half(),
        "g_idx": group_of.int(),
    }


def integer_meaning(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor
) -> torch.Tensor:
    """(code − zero) · scale in float32, with the scales as they are stored."""
    return (codes - zeros[:, group_of]).float() * scales.half().float()[:, group_of]


# ---- whole checkpoints


@dataclass(frozen=True)
class Recipe:
    """One way to quantise a checkpoint. `section`: its quantization_config. `quantise`: a weight → its
    tensors and what they mean in float32, both by the library."""

    name: str
    section: dict[str, Any]
    quantise: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]] = field(repr=False)


UNQUANTISED = ("lm_head", "embed_tokens", "mlp.gate", "block_sparse_moe.gate")
SIGHT = ("visual", "vision_tower", "mm_projector")  # what sees images, which no one here reads


def quantise_checkpoint(source: Path, target: Path, recipe: Recipe, plain: Sequence[str] = ()) -> Path:
    """Writes a quantised copy of `source` to `target`, every linear layer by `recipe`, one tensor an expert,
    but the routers, the output matrix and modules whose path has one of the parts `plain`; returns a folder
    beside it with what the quantised weights mean, unquantised."""
    meant = target.with_name(f"{target.name}-meant")
    config = json.loads((source / "config.json").read_text())
    stored, meanings = {}, {}
    for name, tensor in expert_by_expert(read_tensors(source)).items():
        module, _, part = name.rpartition(".")
        if part != "weight" or tensor.dim() != 2 or _stays(module, plain):
            stored[name] = meanings[name] = tensor
            continue
        pieces, meanings[name] = recipe.quantise(tensor)
        stored |= {f"{module}.{piece}": found for piece, found in pieces.items()}
    write_tensors(target, config | {"quantization_config": excepting(recipe.section, plain)}, stored)
    write_tensors(meant, config, meanings)
    return meant


def _stays(module: str, plain: Sequence[str]) -> bool:
    return module.endswith(UNQUANTISED) or any(f".{part}." in f".{module}." for part in (*plain, *SIGHT))


def excepting(section: Mapping[str, Any], plain: Sequence[str]) -> dict[str, Any]:
    """`section` with modules whose path has one of the parts `plain` left out, each library in its own
    words."""
    words: dict[str, tuple[str, list[str]]] = {
        "compressed-tensors": ("ignore", [rf"re:.*\.{re.escape(part)}(\.|$)" for part in plain]),
        "fp8": ("modules_to_not_convert", [rf".*\.{re.escape(part)}" for part in plain]),
        "modelopt": ("ignore", [f"*.{part}" for part in plain]),
        "awq": ("modules_to_not_convert", list(plain)),
        "gptq": ("dynamic", [rf"-:.*\.{re.escape(part)}(\.|$)" for part in plain]),
    }
    key, exceptions = words[section["quant_method"]]
    if not exceptions:
        return dict(section)
    if section["quant_method"] == "fp8":
        exceptions = ["lm_head", *exceptions]  # transformers' own exception is gone once there is a list
    if section["quant_method"] == "gptq":
        return {**section, key: {pattern: {} for pattern in exceptions}}
    return {**section, key: [*(section.get(key) or ()), *exceptions]}


def expert_by_expert(tensors: Tensors) -> Tensors:
    """Experts that transformers saves all in one tensor, [experts, rows, columns], one by one as quantised
    checkpoints have them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if not module.endswith(".experts") or tensor.dim() != 3:
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            if part == "down_proj":
                found[f"{module}.{e}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                found |= {f"{module}.{e}.gate_proj.weight": gate, f"{module}.{e}.up_proj.weight": up}
    return found


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def write_tensors(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A folder with one shard."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


# ---- gpt-oss

GPT_OSS_MXFP4: dict[str, Any] = {  # the quantization_config of openai/gpt-oss-20b
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
