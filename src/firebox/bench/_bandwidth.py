"""How fast this machine copies memory, measured where and when it is needed."""

from __future__ import annotations

import statistics

import torch

from firebox.bench.timer import now
from firebox.hardware.base import MIB

GPU_BYTES, CPU_BYTES = 2048 * MIB, 256 * MIB  # far beyond any cache
SAMPLES = 7


def copy_gb_s(device: torch.device) -> float:
    """Bytes read plus bytes written, over time: the median of several copies of a large block, whose memory
    is given back."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(SAMPLES + 1):
        wait_for(device)
        began = now()
        target.copy_(source)
        wait_for(device)
        seconds.append(now() - began)
    del source, target
    give_back(device)
    return 2 * size / statistics.median(seconds[1:]) / 1e9  # the first one maps the pages


def wait_for(device: torch.device) -> None:
    """Until everything launched has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """Memory that torch keeps for later goes back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
