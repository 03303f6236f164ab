"""From what a checkpoint stores to what the GPU kernels read (formats/layouts.py): codes are moved, never
rounded again. The one number that is rounded is a group scale of 4-bit integers that is stored in float16 or
float32: it becomes bf16, as the weight that it scales would.

    pack(format, tensors, rows, columns)      one matrix
    stack(parts)                              matrices of one layer, row-wise (q, k, v; gate, up)
    padded(packed, rows, columns)             a matrix with zeros behind it, for widths that no tile divides
    problem(packed, …)                        the kernels' sizes for it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from firebox.errors import UnsupportedFormat
from firebox.formats import awq, fp8_block, gptq, int4_group, layouts, mxfp4, nvfp4
from firebox.formats.base import Format
from firebox.kernels._experts import BLOCK, INT4_ZERO
from firebox.kernels._linear import GROUPS, Problem, Weights

Tensors = Mapping[str, torch.Tensor]
Bits = tuple[tuple[int, ...], ...]  # where the bits of a word's codes go
LARGEST_MXFP4_SCALE = 128  # the kernels hold E2M1 times 2⁻¹²⁶: a scale above 2¹ would leave bf16's range


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as the kernels read it; `format` and `group` as in kernels/_linear.py. `unit`:
    of its words (formats/layouts.py), 0 for a group's."""

    rows: int
    columns: int
    format: str
    group: int
    weights: Weights
    unit: int = 0


def kind(format: Format, columns: int) -> tuple[str, int]:
    """What the kernels call a checkpoint's format, and the columns of its groups."""
    if isinstance(format, int4_group.Format):
        return ("int4_group" if format.symmetric else INT4_ZERO), format.group or columns
    if isinstance(format, awq.Format | gptq.Format):
        return INT4_ZERO, format.group or columns
    return format.name, {"mxfp4": mxfp4.GROUP, "nvfp4": nvfp4.GROUP}.get(format.name, 0)


def refusal(format: Format) -> str | None:
    """Why no kernel reads this variant of a format, or None."""
    if isinstance(format, fp8_block.Format) and format.block != (BLOCK, BLOCK):
        return f"blocks are {format.block[0]} × {format.block[1]}; kernels know {BLOCK} × {BLOCK}"
    if isinstance(format, gptq.Format) and format.bits != 4:
        return f"gptq of {format.bits} bits; kernels know 4"
    return None


def pack(
    format: Format, tensors: Tensors, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16,
    nibbles: bool = False, unit: int = 0,
) -> Packed:  # fmt: skip
    """`tensors` as `format.tensors(rows, columns)` describes them. `dtype`: of unquantised weights;
    `nibbles`: 4-bit floats as block-scaled products read them; `unit`: of their words. Raises
    UnsupportedFormat for variants that the kernels do not know."""
    if format.name == "bf16":
        return Packed(rows, columns, "bf16", 0, Weights(tensors["weight"].to(dtype).contiguous()))
    if isinstance(format, mxfp4.Format | nvfp4.Format):
        bits = layouts.INT4_BITS if nibbles else layouts.E2M1_BITS
        weights = _FLOATS[format.name](format, tensors, rows, columns, bits, unit)
        name = f"{format.name}_nibbles" if nibbles else format.name
        return Packed(rows, columns, name, kind(format, columns)[1], weights, unit)
    name, group, weights = _PACKERS[format.name](format, tensors, rows, columns)
    if group not in GROUPS.get(name, (0,)):
        raise _unknown(format, f"groups of {group} columns", f"groups of {_listed(GROUPS[name])}")
    return Packed(rows, columns, name, group, weights)


def stack(parts: Sequence[Packed], bias: torch.Tensor | None = None) -> Packed:
    """The parts row-wise, and the bias [rows] of all. Raises UnsupportedFormat where they differ in format,
    or where blocks of 128 rows would not begin with a part."""
    first = parts[0]
    kinds = {(part.format, part.group, part.columns) for part in parts}
    if len(kinds) > 1:
        listed = "; ".join(
            f"{name}, group {group}, {columns} columns" for name, group, columns in sorted(kinds)
        )
        raise UnsupportedFormat(f"the parts of one linear layer are in different formats: {listed}")
    if first.format == "fp8_block" and any(part.rows % BLOCK for part in parts[:-1]):
        sizes = ", ".join(str(part.rows) for part in parts)
        raise UnsupportedFormat(f"stacked parts of {sizes} rows; fp8_block needs multiples of {BLOCK}")
    w = _joined([part.weights.w for part in parts])
    assert w is not None
    weights = Weights(
        w,
        _joined([part.weights.scale for part in parts]),
        _joined([part.weights.row_scale for part in parts]),
        None if bias is None else bias.float(),
    )
    return Packed(sum(part.rows for part in parts), first.columns, first.format, first.group, weights)


def padded(packed: Packed, rows: int, columns: int) -> Packed:
    """The same matrix with zeros behind it, up to [rows, columns]: any number of rows, columns in groups and
    blocks. A code of 4-bit integers that is zero stands for another number; its scale, which is zero
    too, makes it one."""
    of = packed.weights
    if (rows, columns) == (packed.rows, packed.columns):
        return packed
    items = columns
    if packed.group:
        items = layouts.whole_units(columns, packed.unit or packed.group) // layouts.PER_WORD
    scale = of.scale
    if scale is not None and packed.group:
        groups = -(-columns // packed.group // layouts.GROUPS_PADDED) * layouts.GROUPS_PADDED
        scale = _grown(scale, rows, groups)
    elif scale is not None:
        scale = _grown(scale, -(-rows // BLOCK), columns // BLOCK)
    row_scale = None if of.row_scale is None else _grown(of.row_scale.unsqueeze(1), rows, 1).squeeze(1)
    bias = None if of.bias is None else F.pad(of.bias, (0, rows - packed.rows))
    w = _grown(of.w, rows, items)
    return replace(packed, rows=rows, columns=columns, weights=Weights(w, scale, row_scale, bias))


def problem(
    packed: Packed, *, residual: bool = False, dtype: str = "bf16", out_dtype: str = "bf16"
) -> Problem:
    """The sizes of a layer with these weights."""
    return Problem(
        packed.rows,
        packed.columns,
        packed.format,
        packed.group,
        packed.weights.bias is not None,
        residual,
        dtype,
        out_dtype,
    )


# ---- one function a format: → the kernels' name, columns of a group, weights


def _fp8_tensor(format: Any, tensors: Tensors, rows: int, columns: int) -> tuple[str, int, Weights]:
    scale = tensors[format.scale].float().reshape(1).expand(rows).contiguous()
    return "fp8_tensor", 0, Weights(tensors["weight"].contiguous(), row_scale=scale)


def _fp8_channel(format: Any, tensors: Tensors, rows: int, columns: int) -> tuple[str, int, Weights]:
    scale = tensors["weight_scale"].float().reshape(rows).contiguous()
    return "fp8_channel", 0, Weights(tensors["weight"].contiguous(), row_scale=scale)


def _fp8_block(
    format: fp8_block.Format, tensors: Tensors, rows: int, columns: int
) -> tuple[str, int, Weights]:
    if format.block != (BLOCK, BLOCK):
        height, width = format.block
        raise _unknown(format, f"blocks of {height} × {width}", f"blocks of {BLOCK} × {BLOCK}")
    scale = tensors[format.scale].float().contiguous()
    return "fp8_block", 0, Weights(tensors["weight"].contiguous(), scale)


def _int4_group(
    format: int4_group.Format, tensors: Tensors, rows: int, columns: int
) -> tuple[str, int, Weights]:
    codes = int4_group.unpack_words(tensors["weight_packed"])[:, :columns]
    group = format.group or columns
    if format.symmetric:
        return "int4_group", group, _integers(codes, tensors["weight_scale"], None, group)
    zeros = int4_group.unpack_words(tensors["weight_zero_point"].T.contiguous()).T[:rows]
    return INT4_ZERO, group, _integers(codes, tensors["weight_scale"], zeros, group)


def _awq(format: awq.Format, tensors: Tensors, rows: int, columns: int) -> tuple[str, int, Weights]:
    def in_order(packed: torch.Tensor) -> torch.Tensor:
        """[n, rows / 8] words → [rows, n] codes."""
        words: torch.Tensor = int4_group.unpack_words(packed).unflatten(1, (-1, int4_group.PER_WORD))
        return words[..., awq.PLACES].flatten(1).T

    codes, zeros = in_order(tensors["qweight"]), in_order(tensors["qzeros"])
    return INT4_ZERO, format.group, _integers(codes, tensors["scales"].T, zeros, format.group)


def _gptq(format: gptq.Format, tensors: Tensors, rows: int, columns: int) -> tuple[str, int, Weights]:
    group = format.group or columns
    if format.bits != 4:
        raise _unknown(format, f"{format.bits} bits", "4 bits")
    in_turn = torch.arange(columns) // group
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].cpu().long(), in_turn):
        raise _unknown(format, "columns in another order than their groups (desc_act)", "columns in order")
    codes = int4_group.unpack_words(tensors["qweight"].T.contiguous())
    zeros = int4_group.unpack_words(tensors["qzeros"]).T + format.zero_offset
    return INT4_ZERO, group, _integers(codes, tensors["scales"].T, zeros, group)


def _mxfp4(format: Any, tensors: Tensors, rows: int, columns: int, bits: Bits, unit: int) -> Weights:
    packed, scales = (tensors[name] for name in format.tensors(rows, columns))
    largest = int(scales.max())
    if largest > LARGEST_MXFP4_SCALE:
        raise _unknown(format, f"a group scale of code {largest}", f"codes up to {LARGEST_MXFP4_SCALE} (2¹)")
    codes = _nibbles(packed.reshape(rows, -1))[:, :columns]
    return Weights(layouts.pack_words(codes, unit or mxfp4.GROUP, bits), layouts.pad_groups(scales))


def _nvfp4(format: Any, tensors: Tensors, rows: int, columns: int, bits: Bits, unit: int) -> Weights:
    if format.spelling == "modelopt":
        packed, of_weight = tensors["weight"], tensors["weight_scale_2"].float()
    else:
        packed, of_weight = tensors["weight_packed"], 1 / tensors["weight_global_scale"].float()
    words = layouts.pack_words(_nibbles(packed)[:, :columns], unit or nvfp4.GROUP, bits)
    row_scale = of_weight.reshape(1).expand(rows).contiguous()
    return Weights(words, layouts.pad_groups(tensors["weight_scale"]), row_scale)


_PACKERS: dict[str, Callable[[Any, Tensors, int, int], tuple[str, int, Weights]]] = {
    "fp8_tensor": _fp8_tensor,
    "fp8_channel": _fp8_channel,
    "fp8_block": _fp8_block,
    "int4_group": _int4_group,
    "awq": _awq,
    "gptq": _gptq,
}
_FLOATS: dict[str, Callable[[Any, Tensors, int, int, Bits, int], Weights]] = {
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
}


def _integers(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int) -> Weights:
    """`codes` [rows, columns] of 0 … 15, `scales` and `zeros` [rows, groups]."""
    if codes.shape[1] % group or group % 8:
        raise UnsupportedFormat(
            f"{codes.shape[1]} columns in groups of {group}; the kernels know whole groups"
        )
    words = layouts.pack_words(codes, group, layouts.INT4_BITS)  # strided as the codes are
    stored = scales.bfloat16() if zeros is None else layouts.pack_zeros(scales, zeros)
    return Weights(words.contiguous(), layouts.pad_groups(stored))


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[rows, n] bytes → codes [rows, 2 n], the low four bits first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    if len(there) < 2:
        return there[0] if there else None
    # As bytes: not every type can be joined on every device.
    raw = torch.cat([tensor.contiguous().view(torch.uint8) for tensor in there])
    return raw.view(there[0].dtype)


def _grown(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`matrix` [m, n] with zeros behind, as bytes: not every type can be padded on every device."""
    (height, width), itemsize = matrix.shape, matrix.itemsize
    raw = matrix.contiguous().view(torch.uint8)
    grown = F.pad(raw, (0, (columns - width) * itemsize, 0, rows - height))
    return grown.view(matrix.dtype)


def _unknown(format: Format, what: str, known: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{format.name} with {what}", hint=f"the GPU kernels know {known}")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
