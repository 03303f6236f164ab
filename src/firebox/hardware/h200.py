"""H200 SXM. There is no fp4 instruction.

Sources: NVIDIA's H200 datasheet (132 multiprocessors, 4,800 GB/s, 989 TFLOP/s bf16, 1,979 fp8, NVLink 900
GB/s); L2 as PyTorch reports it (60 MiB; datasheets say 50); 143,155 MiB as PyTorch reports it. Measured
2026-11-20: copy 4,210 to 4,280 GB/s, read 4,600 at best, bf16 793 TFLOP/s, fp8 1,520."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM90
from firebox.hardware.base import MIB

GPU = replace(
    SM90,
    name="h200",
    device_names=("NVIDIA H200",),
    memory_bytes=143_155 * MIB,
    memory_free_bytes=143_155 * MIB,
    sms=132,
    l2_bytes=60 * MIB,
    bandwidth_gb_s=4800,
    copy_gb_s=4240,
    read_gb_s=4600,
    bf16_tflop_s=989,
    fp8_tflop_s=1979,
    link="NVLink 900 GB/s",
)
