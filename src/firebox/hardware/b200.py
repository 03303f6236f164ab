"""B200.

Sources: pytorch/ao#4002 (148 multiprocessors, 126.5 MiB L2, 178.35 GiB, 7,672 GB/s from bus and clock, as
queried); ai-dynamo/aiconfigurator (rates, NVLink)."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware._families import SM100
from firebox.hardware.base import KIB, MIB

GPU = replace(
    SM100,
    name="b200",
    device_names=("NVIDIA B200",),
    memory_bytes=182_630 * MIB,
    memory_free_bytes=182_630 * MIB,
    sms=148,
    l2_bytes=129_536 * KIB,
    bandwidth_gb_s=7672,
    bf16_tflop_s=2250,
    fp8_tflop_s=4500,
    fp4_tflop_s=9000,
    link="NVLink 1,800 GB/s",
)
