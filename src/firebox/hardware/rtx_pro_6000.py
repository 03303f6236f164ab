"""RTX PRO 6000 Blackwell, Workstation Edition (600 W).

Sources: brandonmmusic-max/sm120-moe-bench (188 multiprocessors, L2); NVIDIA datasheet (96 GB, 1,792 GB/s);
97,887 MiB as nvidia-smi lists it. Rates: 188 × 1,024 bf16 operations a clock × 2,617 MHz boost = 503.8
TFLOP/s, twice that in fp8, four times in fp4. No bandwidth was measured yet."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM120
from firebox.hardware.base import MIB

GPU = replace(
    SM120,
    name="rtx-pro-6000",
    device_names=("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",),
    memory_bytes=97_887 * MIB,
    memory_free_bytes=97_887 * MIB,
    sms=188,
    l2_bytes=128 * MIB,
    bandwidth_gb_s=1792,
    bf16_tflop_s=503.8,
    fp8_tflop_s=1007.6,
    fp4_tflop_s=2015,
    link="PCIe 5.0 x16",
)
