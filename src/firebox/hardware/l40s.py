"""L40S. There is no fp4 instruction.

Sources: ai-dynamo/aiconfigurator (142 multiprocessors, 864 GB/s, 362 TFLOP/s bf16, 733 fp8); 46,068 MiB as
nvidia-smi lists it. L2: 96 MiB as in NVIDIA's Ada whitepaper (the whole AD102 die); some lists give 48.
"""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM89
from firebox.hardware.base import MIB

GPU = replace(
    SM89,
    name="l40s",
    device_names=("NVIDIA L40S",),
    memory_bytes=46_068 * MIB,
    memory_free_bytes=46_068 * MIB,
    sms=142,
    l2_bytes=96 * MIB,
    bandwidth_gb_s=864,
    bf16_tflop_s=362,
    fp8_tflop_s=733,
    link="PCIe 4.0 x16",
)
