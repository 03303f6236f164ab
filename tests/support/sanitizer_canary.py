"""A fault on purpose, which compute-sanitizer must find before it is believed (tools/sanitize.py).

compute-sanitizer --tool memcheck python -m tests.support.sanitizer_canary memcheck
"""

from __future__ import annotations

import contextlib
import sys

import torch
import triton
import triton.language as tl

THREADS = 128


@triton.jit
def canary_writes_behind(out, size, LANES: tl.constexpr):
    """One element behind the last."""
    tl.store(out + size + tl.arange(0, LANES), tl.arange(0, LANES))


@triton.jit
def canary_races(x, out, LANES: tl.constexpr):
    """All threads write one word of shared memory, and read it, without a barrier between them."""
    i = tl.arange(0, LANES)
    total = tl.sum(tl.load(x + i), axis=0)  # across warps, so that there is shared memory
    seen = tl.inline_asm_elementwise(
        "st.shared.b32 [global_smem], $1; ld.shared.b32 $0, [global_smem];", "=r,r", [i], tl.int32, False, 1
    )
    tl.store(out + i, seen + total)


def memcheck() -> None:
    """A tensor of its own, where torch caches nothing."""
    out = torch.zeros(THREADS, dtype=torch.int32, device="cuda")
    canary_writes_behind[(1,)](out, THREADS, THREADS)


def racecheck() -> None:
    x = torch.zeros(THREADS, dtype=torch.int32, device="cuda")
    canary_races[(1,)](x, torch.empty_like(x), THREADS)


def main() -> None:
    """Ends with 0 whatever the tool does to the kernel: its own finding is what counts."""
    {"memcheck": memcheck, "racecheck": racecheck}[sys.argv[1]]()
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
