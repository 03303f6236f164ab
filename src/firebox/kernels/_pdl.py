"""Programmatic dependent launch: a kernel may begin while the one before still runs, and waits where it reads
what that one writes (GPUs with the fact "pdl"; PDL says whether the launch asked for it)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_launch_before(PDL: tl.constexpr):
    """Programmatic dependent launch: nothing the launch before wrote is read above this line."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_launch_begin(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
