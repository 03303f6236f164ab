"""What every layer is built with, and the two moments of its life before it runs: `slots` fills it, `finish`
readies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import torch

from firebox.errors import ConfigError
from firebox.formats import bf16
from firebox.formats.base import FormatOf, KeptSlot, OneOf, PlainSlot, Slot, Slots, StoredSlot, WeightSlot
from firebox.formats.kv.base import ScaleSlot
from firebox.hardware.base import Gpu
from firebox.kernels.select import Choice
from firebox.layers.device import Device
from firebox.step import Step

__all__ = [
    "Build",
    "KeptSlot",
    "OneOf",
    "PlainSlot",
    "ScaleSlot",
    "Slot",
    "Slots",
    "StoredSlot",
    "WeightSlot",
]  # models see slots through layers

# a module's path and its weight [rows, columns] → the tensors of formats/fp8_channel.py
Quantise = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Build:
    """Where and how layers are built. `device` "meta" gives shapes without memory. `threads`: CPU threads of
    the kernels. `max_positions`: the longest context. `format_of`: a module's path → the format of its
    weight. `kv_dtype`: of the cache's elements; `kv_scaled`: its format divides by a scale, which the
    checkpoint may hold. `choices` collects one Choice per operation, for the ledger. `stored`: the names of
    the checkpoint's tensors; None where they are not known, and config.json's word counts. `requantisable`:
    --requantize may change what is unquantised. `requantise`: on a GPU, what it does to such a weight before
    kernels pack it; None on a CPU, where the loader changes what layers already have. `shared`: what layers
    share on an NVIDIA GPU, None elsewhere and in a plan, for which nothing is loaded. Raises ConfigError for
    a GPU that cannot do what `requantise` asks for.
    """

    gpu: Gpu
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_positions: int
    threads: int = 1
    attention_backend: str = "auto"
    moe_backend: str = "auto"
    format_of: FormatOf = lambda path: bf16.Format()
    kv_scaled: bool = False
    requantisable: bool = True
    choices: list[Choice] = field(default_factory=list)
    stored: frozenset[str] | None = None
    shared: Device | None = None
    requantise: Quantise | None = None

    def __post_init__(self) -> None:
        if self.requantise is not None and "fp8" not in self.gpu.facts:
            raise ConfigError(f"--requantize fp8: {self.gpu.name} has no FP8 type", hint="--requantize none")

    def requantises(self, path: str) -> bool:
        """Does this projection become FP8 as it is loaded, if a kernel reads it so?"""
        wanted = self.requantise is not None and self.requantisable
        return wanted and self.format_of(path).name == "bf16"

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised weights on the device, in the compute dtype unless another is given."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def kv_scales(self) -> torch.Tensor | None:
        """A layer's scales of keys and values [2] float32, 1.0 until the checkpoint says otherwise; None
        where the KV format has none."""
        return torch.ones(2, device=self.device) if self.kv_scaled else None


class AttentionLike(Protocol):
    """The first half of a block: hidden states in and out, the residual included; writes the step's cache."""

    @property
    def backend(self) -> ModuleType | None:
        """What plans each step for it, if it needs that."""
        ...

    @property
    def kv_scales(self) -> torch.Tensor | None:
        """Its cache's scales of keys and values [2] float32; None where the KV format has none."""
        ...

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        ...

    def slots(self) -> Slots:
        """Its checkpoint tensors."""
        ...

    def finish(self) -> None:
        """All slots are filled."""
        ...

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        ...


class MlpLike(Protocol):
    """The second half of a block: hidden states in and out, the residual included."""

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        ...

    def slots(self) -> Slots:
        """Its checkpoint tensors."""
        ...

    def finish(self) -> None:
        """All slots are filled."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        ...


Block = tuple[AttentionLike, MlpLike]
