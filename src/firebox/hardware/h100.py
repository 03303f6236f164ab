"""H100 SXM. There is no fp4 instruction.

The PCIe card has fewer multiprocessors and slower memory and is not this file.

Sources: NVIDIA's H100 datasheet (132 multiprocessors, 50 MiB L2, 3,350 GB/s, 989 TFLOP/s bf16, 1,979 fp8,
NVLink 900 GB/s); 81,559 MiB as nvidia-smi lists it."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM90
from firebox.hardware.base import MIB

GPU = replace(
    SM90,
    name="h100",
    device_names=("NVIDIA H100 80GB HBM3",),
    memory_bytes=81_559 * MIB,
    memory_free_bytes=81_559 * MIB,
    sms=132,
    l2_bytes=50 * MIB,
    bandwidth_gb_s=3350,
    bf16_tflop_s=989,
    fp8_tflop_s=1979,
    link="NVLink 900 GB/s",
)
