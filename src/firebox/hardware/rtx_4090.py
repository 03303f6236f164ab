"""GeForce RTX 4090. There is no fp4 instruction.

Sources: NVIDIA's Ada whitepaper (128 multiprocessors, 72 MiB L2, 24 GB, 1,008 GB/s; 165 TFLOP/s bf16 and
330 fp8 with float32 accumulation); 24,564 MiB as nvidia-smi lists it. No bandwidth was measured yet."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM89
from firebox.hardware.base import MIB

GPU = replace(
    SM89,
    name="rtx-4090",
    device_names=("NVIDIA GeForce RTX 4090",),
    memory_bytes=24_564 * MIB,
    memory_free_bytes=24_564 * MIB,
    sms=128,
    l2_bytes=72 * MIB,
    bandwidth_gb_s=1008,
    bf16_tflop_s=165,
    fp8_tflop_s=330,
    link="PCIe 4.0 x16; no peer-to-peer",
)
