"""Programmatic dependent launch: a kernel may begin while the one before still runs, and waits where it reads
what that one writes (GPUs with the fact "pdl"; PDL says whether the launch asked for it).

Who lets the next launch begin before it waits itself lets that one read weights while both wait: norms,
rope, decode attention, counting and sums do, because linear layers follow them. But programs that begin
beside others are spread unevenly over the multiprocessors, and a launch of few programs then took up to
three times as long (H200, 2026-11-22). So a linear layer of few tokens lets the next begin when a program's
tile is done; experts do so for one token, unless the second half loads its whole tile before it waits; and
what comes directly before the programs of experts (moe_route.py, moe_norm_route.py, moe_sort.py's second,
quantise_fp8.py) waits first.

The second half of few tokens' experts waits for each expert's first half only (`say_ready`,
`wait_until_ready`): while the last programs of a launch run, most of the memory's time is nobody's. For 16
and 64 tokens a layer takes 1 to 7 % less (H200, 2026-11-23). Its programs begin when all of the first half's
have, so none waits for one that has no place to run. So do blocks of up to 32 choices of many tokens; with
more, the tensor cores are what a layer waits for, and gpt-oss's 4,096 tokens took 10 % longer.

What a kernel reads before its wait no launch of the same step has written, but for the choices of experts
that moe_down_few.py and moe_down_one.py read: moe_gate_up_few.py and moe_gate_up_one.py, before them, wait
first, as moe_gate_up.py does before moe_down.py reads blocks, order and weights of choices; and that
moe_sort.py's first reads beside quantise_fp8.py or moe_arrange.py, which wait first."""

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


@triton.jit
def say_ready(counter):
    """Counts this program at `counter`, which points at an int32; what it wrote is there for who sees the
    count."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _seen(counter, PDL: tl.constexpr):
    if PDL:
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def wait_until_ready(counter, wanted, PDL: tl.constexpr):
    """Returns when `wanted` programs have been counted, and what they wrote can be read. Every thread looks
    for itself: an atomic operation takes a barrier more."""
    while _seen(counter, PDL) < wanted:
        pass
