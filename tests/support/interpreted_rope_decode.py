"""Runs kernels/attention_rope_decode.py over its cases under Triton's interpreter and prints {case: what
tests/support/rope_decode.py finds} as JSON. The interpreter's bf16 products are wrong: operands are float16.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_rope_decode
"""

from __future__ import annotations

import json

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import attention_rope_decode as kernel
from firebox.kernels._attention import FP8
from tests.support import quick_interpreter
from tests.support.rope_decode import compare


def main() -> None:
    quick_interpreter.begin()
    gpu, found = find_gpu("gb10"), {}
    for number, case in enumerate(kernel.CASES):
        for kv_dtype in (torch.float16, FP8):
            found[f"{number} {kv_dtype}"] = compare(case.of(torch.float16, kv_dtype), gpu, number, "cpu")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
