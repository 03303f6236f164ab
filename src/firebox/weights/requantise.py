"""Unquantised projections become FP8 with a scale for each row while they are loaded (`--requantize fp8`),
and each says what that cost it.

On an NVIDIA GPU they stay FP8: `quantise` turns a weight into codes and scales before its layer packs them
(layers/linear.py), and what no kernel reads in FP8 is left alone. A CPU computes with dequantised weights, so
there the weight becomes decode(encode(weight)): the numbers that a kernel for FP8 weights reads.

The error is the root mean square (RMS) of the difference over the RMS of the weight. It is measured twice,
because an outlier in each row can hide the loss of all the rest: over the whole tensor, and over its bulk,
which is what does not exceed 8 times its row's mean magnitude. A normal row's bulk is all of it. With one
outlier a row of a million times the others, these are lost: the error over the whole is 1e-5, of the bulk 1.

Why the limit is 0.04 unless asked otherwise: e4m3 rounds a value just above a power of two by an error that
is even in ±2^-4 of it, which is 0.036 RMS, and every other value by less, so that no smooth distribution
within its range comes to more; for normal rows 0.026 is measured. More means that values fell below the
smallest normal code.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from firebox.errors import ConfigError
from firebox.formats import fp8_channel
from firebox.formats.base import Format, Slot, StoredSlot, WeightSlot

FP8 = fp8_channel.Format()
BULK = 8.0  # times the row's mean magnitude
ELEMENTS_AT_ONCE = 2**24  # of a matrix in float32, so that an output matrix does not need gigabytes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Requantised:
    """One tensor that was: its module, and its relative errors over all of it and over its bulk."""

    module: str
    error: float
    bulk_error: float

    @property
    def worst(self) -> float:
        """The larger error; NaN if either is."""
        return self.error if math.isnan(self.error) else max(self.bulk_error, self.error)


class Requantiser:
    """Called with each slot that the loader has filled; changes those that `is_requantised` and lists them in
    `done`. Raises ConfigError for one whose error exceeds `limit`. `kernels`: layers call `quantise` instead,
    for kernels that read FP8; what they did not is listed in `left`, as it is."""

    def __init__(self, limit: float, *, kernels: bool = False) -> None:
        if not 0.0 < limit <= 1.0:
            raise ConfigError(f"requantize_limit is {limit}", hint="a relative error between 0 and 1")
        self.limit, self.kernels = limit, kernels
        self.done: list[Requantised] = []
        self.left: list[str] = []

    def __call__(self, slot: Slot) -> None:
        """Replaces the slot's target by what it is in FP8."""
        if not isinstance(slot, WeightSlot) or not is_requantised(slot):
            return
        if self.kernels:
            self.left.append(slot.module)
        else:
            self._take(Requantised(slot.module, *round_trip(slot.target)))

    def quantise(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """`weight` [rows, columns], any float dtype → the tensors of formats/fp8_channel.py, on its device.
        Takes a few rows at a time, so that beside the two of them little memory is needed."""
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = torch.empty(weight.shape[0], 1, device=weight.device)
        sums = _no_sums(weight.device)
        rows = _rows_at_once(weight)
        for before, code, scale in zip(*(part.split(rows) for part in (weight, codes, scales)), strict=True):
            wide = before.float()
            made = fp8_channel.quantise(wide)
            code.copy_(made["weight"])
            scale.copy_(made["weight_scale"])
            sums += _squares(wide, FP8.dequantise(made, *wide.shape))
        self._take(Requantised(module, *_ratios(sums)))
        return {"weight": codes, "weight_scale": scales}

    def kept_bytes(self, slot: Slot) -> int:
        """Of a slot's tensors as a GPU keeps them after all this, as `stored_bytes` counts them."""
        left = self.kernels and isinstance(slot, WeightSlot)
        return stored_bytes(slot) if left else requantised_bytes(slot)

    def _take(self, found: Requantised) -> None:
        if not found.worst <= self.limit:  # NaN too
            raise ConfigError(
                f"--requantize fp8: {found.module} has a relative error of {found.error:.3g}, "
                f"{found.bulk_error:.3g} without outliers; the limit is {self.limit:g}",
                hint="--requantize none, or a higher --requantize-limit",
            )
        log.debug(
            "requantised %s: relative error %.4f, %.4f without outliers",
            found.module,
            found.error,
            found.bulk_error,
        )
        self.done.append(found)

    def summary(self, before_bytes: int, after_bytes: int) -> list[str]:
        """Lines of text; the bytes are those of `models.base.decode_bytes`."""
        left = [
            f"requantize fp8: {len(self.left)} tensors stay unquantised, as no kernel reads them in FP8 "
            f"({self.left[0]} first)"
        ] if self.left else []  # fmt: skip
        if not self.done:
            return left or ["requantize fp8: no tensor is unquantised, nothing changed"]
        elsewhere = "" if self.kernels else "; a CPU reads all of them dequantised, and so no less"
        worst = max(self.done, key=lambda found: found.worst)
        mean = sum(found.error for found in self.done) / len(self.done)
        return [
            f"requantize fp8: {len(self.done)} tensors; relative error {mean:.4f} on average, at most "
            f"{worst.worst:.4f} ({worst.module}), limit {self.limit:g}",
            "requantize fp8: weights read per decoded token, in their formats: "
            f"{before_bytes / 1e6:,.3f} MB → "
            f"{after_bytes / 1e6:,.3f} MB ({after_bytes / before_bytes - 1:+.1%}), unquantised ones in the "
            f"compute dtype{elsewhere}",
            *left,
        ]


def is_requantised(slot: Slot) -> bool:
    """Is it one of the weights that `--requantize fp8` changes?"""
    if isinstance(slot, StoredSlot):
        return slot.kept not in (None, slot.format)
    return isinstance(slot, WeightSlot) and slot.requantisable and slot.format.name == "bf16"


def round_trip(weight: torch.Tensor) -> tuple[float, float]:
    """Replaces `weight` [rows, columns] by what FP8 makes of it; its relative errors, over all and over the
    bulk."""
    sums = _no_sums(weight.device)
    for rows in weight.split(_rows_at_once(weight)):
        before = rows.float()
        meant = FP8.dequantise(fp8_channel.quantise(before), *rows.shape).to(rows.dtype)
        sums += _squares(before, meant.float())
        rows.copy_(meant)  # not before: in float32 `before` is the very same memory
    return _ratios(sums)


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, ELEMENTS_AT_ONCE // weight.shape[1])


def _no_sums(device: torch.device) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.float64, device=device)


def _squares(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Sums of squares [4] of: difference, weight, and both over the bulk. Nothing waits for them."""
    difference, size = after - before, before.abs()
    bulk = size <= BULK * size.mean(1, keepdim=True)
    parts = (difference, before, difference * bulk, before * bulk)
    return torch.stack([part.double().pow(2).sum() for part in parts])


def _ratios(sums: torch.Tensor) -> tuple[float, float]:
    """The relative errors over all and over the bulk."""
    difference, whole, of_bulk, bulk = sums.cpu()
    return _ratio(difference, whole), _ratio(of_bulk, bulk)


def _ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """√(difference / whole); nothing out of nothing is no error."""
    return 0.0 if difference == 0 else float((difference / whole).sqrt())


def stored_bytes(slot: Slot) -> int:
    """Of a slot's tensors as a GPU keeps them: quantised parts as the checkpoint stores them, plain numbers
    in the dtype of their target. An activation's optional scale is not counted."""
    if isinstance(slot, WeightSlot | StoredSlot):
        return _format_bytes(slot, slot.format)
    return slot.target.nbytes


def requantised_bytes(slot: Slot) -> int:
    """The same after --requantize fp8."""
    if is_requantised(slot):
        assert isinstance(slot, WeightSlot | StoredSlot)
        return _format_bytes(slot, FP8)
    return stored_bytes(slot)


def _format_bytes(slot: WeightSlot | StoredSlot, format: Format) -> int:
    stored = slot.stored if isinstance(slot, WeightSlot) else None
    rows, columns = stored or (slot.target.shape[-2], slot.target.shape[-1])
    matrices = math.prod(slot.target.shape[:-2])
    plain = format.name == "bf16"
    return matrices * sum(
        math.prod(spec.shape) * (slot.target.itemsize if plain else spec.dtypes[0].itemsize)
        for spec in format.tensors(rows, columns).values()
        if not spec.optional
    )
