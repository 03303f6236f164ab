"""GB10: the GPU of DGX Spark and of its cousins from other makers, which CUDA does not tell apart.

Host and device share one LPDDR5X memory, so what is free is what the operating system can give
(MemAvailable), and weights, KV cache and page cache compete for it.

Sources: flashinfer-ai/flashinfer#4990 (multiprocessors, L2); AlexsJones/llmfit#872 (121.63 of 128 GB
visible); huggingface/kernels#283 and antirez/ds4#773 (273 GB/s, measured copy 218 and read 231 to 234);
triton-lang/triton#10010 (fp4 rate). The rates are calculated: 48 multiprocessors × 1,024 bf16 operations a
clock × 2,418 MHz = 119 TFLOP/s, twice that in fp8, four times in fp4; measured so far: 92 in bf16, 168 in
fp8, about 270 in fp4."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM121
from firebox.hardware.base import MIB

GPU = replace(
    SM121,
    name="gb10",
    device_names=("NVIDIA GB10",),
    memory_bytes=124_549 * MIB,
    memory_free_bytes=124_549 * MIB,
    cpu_cores=20,
    unified_memory=True,
    sms=48,
    l2_bytes=24 * MIB,
    bandwidth_gb_s=273,
    copy_gb_s=218,
    read_gb_s=231,
    bf16_tflop_s=119,
    fp8_tflop_s=238,
    fp4_tflop_s=475,
    link="two QSFP ports of a ConnectX-7, 200 Gb/s; no NVLink, no GPUDirect RDMA",
)
