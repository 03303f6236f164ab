"""Runs one of the small kernels under Triton's interpreter, on the CPU, in float16, and prints the
differences from its reference as JSON: {case: {output: [share of unequal numbers, relative error, within the
limits]}}. A process of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_small OP
"""

from __future__ import annotations

import json
import sys

from firebox.hardware.base import find_gpu
from tests.support import quick_interpreter
from tests.support.small import beyond, cases, fused, run_case

TOKENS = (0, 1, 3)


def main(op: str) -> None:
    quick_interpreter.begin()
    gpu, found = find_gpu("gb10"), {}
    for name, problem in cases(op, "f16"):
        found |= {f"{tokens} × {name}": run_case(op, problem, tokens, "cpu", gpu) for tokens in TOKENS}
        if getattr(problem, "kv_dtype", None) == "fp8":
            found[f"beyond × {name}"] = beyond(op, problem, 2, "cpu", gpu)
        if "outputs" in dir(problem) and problem.outputs.fp8:
            found[f"fused × {name}"] = {"q": (0.0, 0.0, fused(op, problem, 3, "cpu", gpu))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
