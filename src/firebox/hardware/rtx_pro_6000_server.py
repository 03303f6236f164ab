"""RTX PRO 6000 Blackwell, Server Edition (600 W, passive): the Workstation Edition at a lower clock.

Sources: ai-dynamo/aiconfigurator (467.8 TFLOP/s bf16 at 2,430 MHz, twice that in fp8, four times in fp4).
Some lists give 1,597 GB/s; NVIDIA's gives 1,792."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware.rtx_pro_6000 import GPU as WORKSTATION

GPU = replace(
    WORKSTATION,
    name="rtx-pro-6000-server",
    device_names=("NVIDIA RTX PRO 6000 Blackwell Server Edition",),
    bf16_tflop_s=467.8,
    fp8_tflop_s=935.6,
    fp4_tflop_s=1871,
)
