"""What the small kernels share that write rows [tokens, width]: the results as they are, as FP8 codes with
scales for a kernel that multiplies FP8 (kernels/quantise_fp8.py, its layout and to the bit its numbers), or
both.

A tile is [ROWS, GROUPS, GROUP]: GROUP columns share a scale. Where all of a row's columns do, or where there
are no scales, it is one group as wide as the row, padded to a power of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import quantise_fp8
from firebox.kernels._experts import DTYPES, POINTER_NAMES

ALIGNED = 16  # bytes of a vector load; the compiler counts elements, so it is also the unit of widths


@dataclass(frozen=True)
class Outputs:
    """What is written. `plain`: `out` in the type of the input. `fp8`: `q` and `scales`, one scale for a row
    (`group` 0) or for each `group` columns of it."""

    plain: bool = True
    fp8: bool = False
    group: int = 0


PLAIN = Outputs()


def refuse(width: int, outputs: Outputs, gpu: Gpu) -> str | None:
    """Why no kernel of this family can write such rows on that device, or None."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if outputs.fp8 and "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    if not (outputs.plain or outputs.fp8) or (outputs.group and not outputs.fp8):
        return f"needs something to write, and a group of FP8 codes only, not {outputs}"
    if width % ALIGNED or (outputs.group and width % outputs.group):
        return f"needs a width that is a multiple of {outputs.group or ALIGNED}, not {width}"
    return None


def arguments(outputs: Outputs, dtype: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The arguments out, q and scales: those that are there with their Triton types, the others as constants
    None."""
    there = {"out": f"*{POINTER_NAMES[dtype]}"} if outputs.plain else {}
    there |= {"q": "*fp8e4nv", "scales": "*fp32"} if outputs.fp8 else {}
    return there, dict.fromkeys({"out", "q", "scales"} - set(there))


def constants(width: int, columns: int, outputs: Outputs, dtype: str, *, pdl: bool) -> dict[str, Any]:
    """The constants of `write_rows`. `columns`: of a tile, a power of two."""
    return {
        "WIDTH": width,
        "GROUPS": columns // (outputs.group or columns),
        "GROUP": outputs.group or columns,
        "LEAST": quantise_fp8.LEAST_SCALE,
        "DTYPE": DTYPES[dtype],
        "PDL": pdl,
    }


def pointers(signature: dict[str, str]) -> tuple[str, ...]:
    """The run-time arguments that are pointers; all of them are divisible by 16."""
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))


def aligned(rows: torch.Tensor) -> int:
    """The stride of `rows` [rows, width], perhaps columns of a wider matrix, in elements. The launch was
    compiled for starts and strides that vector loads can use."""
    stride = rows.stride(0)
    assert rows.stride(-1) == 1 and stride % ALIGNED == 0 and rows.data_ptr() % ALIGNED == 0, (
        f"rows of strides {rows.stride()} at {rows.data_ptr()} are not aligned to {ALIGNED}"
    )
    return stride


# ---- device code


@triton.jit
def tile_columns(first, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The columns of a tile from `first` on, [1, GROUPS, GROUP]."""
    group = tl.arange(0, GROUPS) * GROUP
    return (first + group[:, None] + tl.arange(0, GROUP)[None, :])[None, :, :]


@triton.jit
def write_rows(
    values, out, q, scales, row, first, there, WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    LEAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`values` [ROWS, GROUPS, GROUP] float32, zero where not `there`; `row` [ROWS, 1, 1] int64. The codes are
    those of the values as DTYPE holds them, whether or not these are written too."""
    rounded = values.to(DTYPE)
    at = row * WIDTH + tile_columns(first, GROUPS, GROUP)
    if out is not None:
        tl.store(out + at, rounded, mask=there)
    if q is not None:
        wide = rounded.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), axis=2, keep_dims=True) / 448.0, LEAST)  # [ROWS, GROUPS, 1]
        tl.store(q + at, (wide / scale).to(tl.float8e4nv), mask=there)
        group = (first // GROUP + tl.arange(0, GROUPS))[None, :, None]
        held = tl.max(there.to(tl.int32), axis=2, keep_dims=True) > 0  # does the group have a column?
        tl.store(scales + row * tl.cdiv(WIDTH, GROUP) + group, scale, mask=held)


# ---- the reference


def written(outputs: Outputs, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the kernel writes of `rows` [rows, width], which have the dtype of `out`."""
    found = {"out": rows} if outputs.plain else {}
    if outputs.fp8:
        codes = quantise_fp8.reference(quantise_fp8.Problem(rows.shape[-1], outputs.group), rows)
        found |= dict(zip(("q", "scales"), codes, strict=True))
    return found
