"""A100 SXM4 with 80 GB. There is no fp8 type and no fp4 instruction; int8 does 624 TOPS.

The other A100s (40 GB, PCIe) have other bandwidths and are not this file.

Sources: NVIDIA's A100 datasheet and whitepaper (108 multiprocessors, 40 MiB L2, 2,039 GB/s, 312 TFLOP/s bf16,
NVLink 600 GB/s); 81,920 MiB as nvidia-smi lists it.
"""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM80
from firebox.hardware.base import MIB

GPU = replace(
    SM80,
    name="a100",
    device_names=("NVIDIA A100-SXM4-80GB",),
    memory_bytes=81_920 * MIB,
    memory_free_bytes=81_920 * MIB,
    sms=108,
    l2_bytes=40 * MIB,
    bandwidth_gb_s=2039,
    bf16_tflop_s=312,
    link="NVLink 600 GB/s",
)
