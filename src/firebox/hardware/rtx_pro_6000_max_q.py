"""RTX PRO 6000 Blackwell, Max-Q Workstation Edition: the Workstation Edition at 300 W.

Source: Fixstars, "What Kind of GPU is the NVIDIA RTX PRO 6000 Blackwell Max-Q?" (2,288 MHz). Rates: 188 ×
1,024 bf16 operations a clock × 2,288 MHz = 440 TFLOP/s, twice that in fp8, four times in fp4."""

from __future__ import annotations

from dataclasses import replace

from firebox.hardware.rtx_pro_6000 import GPU as WORKSTATION

GPU = replace(
    WORKSTATION,
    name="rtx-pro-6000-max-q",
    device_names=("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",),
    bf16_tflop_s=440,
    fp8_tflop_s=881,
    fp4_tflop_s=1762,
)
