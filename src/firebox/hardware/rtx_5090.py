"""GeForce RTX 5090.

GeForce halves bf16 and plain fp8 with float32 accumulation; the block-scaled fp8 instruction runs at full
rate (838 TFLOP/s), triton-lang/triton#11320.

Sources: NVIDIA's RTX Blackwell whitepaper (170 multiprocessors, 96 MiB L2, 1,792 GB/s, rates);
Dao-AILab/quack gemm_sm120 notes (rates by accumulator); 32,607 MiB as nvidia-smi lists it. No bandwidth was
measured yet."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM120
from firebox.hardware.base import MIB

GPU = replace(
    SM120,
    name="rtx-5090",
    device_names=("NVIDIA GeForce RTX 5090",),
    memory_bytes=32_607 * MIB,
    memory_free_bytes=32_607 * MIB,
    sms=170,
    l2_bytes=96 * MIB,
    bandwidth_gb_s=1792,
    bf16_tflop_s=209.5,
    fp8_tflop_s=419,
    fp4_tflop_s=1676,
    link="PCIe 5.0 x16; the stock driver offers no peer-to-peer",
)
