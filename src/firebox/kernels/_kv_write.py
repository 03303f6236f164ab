"""What the two kernels share that rotate queries and keys and write the paged cache (rope_write,
latent_write): the type of the cache, and how a number is stored, which is to the bit what formats/kv says.

A step's integers, `positions` and `token_slots` [tokens] int64, are read before the launch before has ended:
they must have been written before that one began. A step writes them once, before its first launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._experts import POINTER_NAMES

FP8 = "fp8"
KV_POINTER_NAMES = {**POINTER_NAMES, FP8: "fp8e4nv"}
LARGEST = 448.0


def refuse(dtype: str, kv_dtype: str, half: int, gpu: Gpu) -> str | None:
    """Why no kernel of this family can run on that device, or None. `half` of the rotated dimensions."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if kv_dtype not in (dtype, FP8):
        return f"writes a cache in {dtype} or fp8, not in {kv_dtype}"
    if kv_dtype == FP8 and "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    if half < 8 or half & (half - 1):
        return f"rotates a power of two of at least 16 dimensions, not {2 * half}"
    return None


def types(kv_dtype: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The arguments that both kernels take, with their Triton types, and the absent one as a constant
    None."""
    there = dict.fromkeys(("cos", "sin"), "*fp32") | dict.fromkeys(("positions", "token_slots"), "*i64")
    return (there | {"scales": "*fp32"}, {}) if kv_dtype == FP8 else (there, {"scales": None})


def pointers(signature: dict[str, str]) -> tuple[str, ...]:
    """The pointers that vector loads go through."""
    few = ("positions", "token_slots", "scales")
    return tuple(name for name, kind in signature.items() if kind.startswith("*") and name not in few)


def stored(rows: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
    """`rows` as a cache of that dtype holds them (formats/kv)."""
    if cache.itemsize > 1:
        return rows.to(cache.dtype)
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(cache.dtype)


def put(cache: torch.Tensor, token_slots: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
    """Writes `rows` [tokens, heads, dim] into a copy's or a kernel's cache [pages, page_tokens, heads,
    dim]."""
    into, codes = cache.flatten(0, 1), stored(rows, cache, scale)
    if cache.itemsize == 1:  # torch has no index_copy_ for float8; bytes are bytes
        into, codes = into.view(torch.uint8), codes.view(torch.uint8)
    into.index_copy_(0, token_slots, codes)


def rows_at(cache: torch.Tensor, token_slots: torch.Tensor) -> torch.Tensor:
    """The rows [tokens, heads, dim] that `put` wrote."""
    rows = cache.flatten(0, 1)
    if cache.itemsize > 1:
        return rows[token_slots]
    return rows.view(torch.uint8)[token_slots].view(cache.dtype)


# ---- device code


@triton.jit
def encoded(values, scale, TYPE: tl.constexpr):
    """`values` float32, already rounded to what the layer computes in → as they are stored. `scale` None: as
    they are. NaN stays NaN."""
    if scale is not None:
        values = tl.clamp(tl.div_rn(values, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(TYPE)
