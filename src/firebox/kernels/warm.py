"""`python -m firebox.kernels.warm`: compiles the CPU kernels into the cache on disk, so that no server start
waits for it."""

from __future__ import annotations

import sys
import time

import torch

from firebox.find import load, names
from firebox.hardware.probe import probe_cpu


def main() -> int:
    """Runs every CPU kernel once with float32 and once with bf16 weights, for the thread count that engines
    here use by default."""
    threads = max(1, probe_cpu().cpu_cores - 1)
    for name in names("kernels"):
        if not name.startswith("cpu_"):
            continue
        kernel, began = load("kernels", name), time.perf_counter()
        for dtype in (torch.float32, torch.bfloat16):
            case = kernel.CASES[0]
            made = kernel.inputs(case)
            weights = {key: weight.to(dtype).float() for key, weight in made.pop("weights", {}).items()}
            kernel.bind(case[0], weights, threads)(*made.values())  # the launcher's arguments, in order
        sys.stderr.write(f"{name}: {time.perf_counter() - began:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
