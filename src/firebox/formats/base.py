"""How a checkpoint's tensors reach a layer: slots. (Quantised formats will each be a file in this room.)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor and the memory it goes to; its shape must be `target`'s, its dtype is converted.

    Widening bf16 or fp16 to fp32 is exact; narrowing rounds to nearest even.
    """

    name: str
    target: torch.Tensor


Slots = Iterator[Slot]
