"""Sorts the choices of many tokens by expert and cuts each expert's into blocks, in two launches:

    order [choices]    places in expert_ids (token · top_k + k), those of expert 0 first
    blocks [n, 3]      expert, first place in `order`, how many (0: nothing to do), for n programs
    ready [n]          zeros, for kernels/moe_gate_up.py to count each block's programs, where it does

expert_ids [tokens, top_k] int32. Within an expert the order may differ from run to run; what is computed per
choice does not depend on it. First launch: programs count, the last one makes offsets of the counts. Second:
programs take places from the offsets with atomics; others write the blocks. Counts and the counter of ended
programs are zero before and after.

BESIDE: the launch before the first one rounds or arranges the activations, and waits for its own predecessor
before it lets this one begin. So expert ids are there, and choices are counted while that one runs; the first
launch then ends no sooner than that one, as whoever waits for this one has to find its results.

Source: own. Measured: H200, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "moe_sort"
CHOICES = 1024  # that one program counts or places
BLOCKS = 32  # that one program writes


@dataclass(frozen=True)
class Problem:
    """`experts` and how many choices make a block."""

    experts: int
    block: int


@dataclass(frozen=True)
class Scratch:
    """int32 [experts padded to a power of two] each, but `ended` [1]. `counts` and `ended` are zero between
    calls."""

    counts: torch.Tensor
    ended: torch.Tensor
    starts: torch.Tensor
    last_blocks: torch.Tensor
    cursors: torch.Tensor


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs, up to 1,024 experts."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    return None if problem.experts <= 1024 else f"sorts up to 1,024 experts, not {problem.experts}"


def most_blocks(problem: Problem, choices: int) -> int:
    """The most blocks that so many choices can make."""
    return min(choices, choices // problem.block + problem.experts)


def scratch(problem: Problem, device: torch.device | str) -> Scratch:
    """Zeroed."""
    padded = triton.next_power_of_2(problem.experts)
    widths = (padded, 1, padded, padded, padded)
    return Scratch(*(torch.zeros(width, dtype=torch.int32, device=device) for width in widths))


# ---- 2. the device code


@triton.jit
def count_choices(
    expert_ids, counts, ended, starts, last_blocks, cursors, choices,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, PDL: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """EXPERTS: padded to a power of two; those that are not there count nothing."""
    let_next_launch_begin(PDL)
    if not BESIDE:
        wait_for_launch_before(PDL)
    place = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    chosen = tl.load(expert_ids + place, mask=place < choices, other=0)
    mine = tl.histogram(chosen, EXPERTS, mask=place < choices)
    e = tl.arange(0, EXPERTS)
    tl.atomic_add(counts + e, mine, mask=mine > 0, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(ended, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        total = tl.load(counts + e, cache_modifier=".cg")
        start = tl.cumsum(total, 0) - total
        tl.store(starts + e, start)
        tl.store(cursors + e, start)
        tl.store(last_blocks + e, tl.cumsum((total + BLOCK - 1) // BLOCK, 0))
        tl.store(counts + e, tl.zeros((EXPERTS,), tl.int32))
        tl.store(ended, 0)
    if BESIDE:
        wait_for_launch_before(PDL)


@triton.jit
def place_choices(
    expert_ids, starts, last_blocks, cursors, order, blocks, ready, choices, placing, total_blocks,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The first `placing` programs place choices, the others write blocks."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    program = tl.program_id(0)
    if program < placing:
        place = program * CHOICES + tl.arange(0, CHOICES)
        there = place < choices
        chosen = tl.load(expert_ids + place, mask=there, other=0)
        at = tl.atomic_add(cursors + chosen, 1, mask=there, sem="relaxed")
        tl.store(order + at, place, mask=there)
    else:
        b = (program - placing) * BLOCKS + tl.arange(0, BLOCKS)
        e = tl.arange(0, EXPERTS)
        ends = tl.load(last_blocks + e)
        expert = tl.sum((ends[None, :] <= b[:, None]).to(tl.int32), axis=1)
        real = expert < EXPERTS
        expert = tl.minimum(expert, EXPERTS - 1)
        before = tl.load(last_blocks + expert - 1, mask=expert > 0, other=0)
        first = tl.load(starts + expert) + (b - before) * BLOCK
        end = tl.load(starts + expert + 1, mask=expert < EXPERTS - 1, other=0)
        end = tl.where(expert < EXPERTS - 1, end, choices)
        entry = blocks + b * 3
        written = b < total_blocks
        tl.store(entry, expert, mask=written)
        tl.store(entry + 1, first, mask=written)
        tl.store(entry + 2, tl.where(real, tl.minimum(end - first, BLOCK), 0), mask=written)
        if ready is not None:
            tl.store(ready + b, 0, mask=written)


# ---- 3. the launch


def requests(
    problem: Problem, gpu: Gpu, *, beside: bool = False, counted: bool = False, interpreted: bool = False
) -> tuple[CompileRequest, CompileRequest]:
    """Counting and placing; `beside`: see above; `counted`: there is `ready`."""
    pdl = "pdl" in gpu.facts and not interpreted
    shared = {
        "EXPERTS": triton.next_power_of_2(problem.experts),
        "BLOCK": problem.block,
        "CHOICES": CHOICES,
        "PDL": pdl,
    }
    options = {"launch_pdl": True} if pdl else {}

    def request(
        kernel: object, pointers: tuple[str, ...], numbers: tuple[str, ...], **more: int | None
    ) -> CompileRequest:
        signature = dict.fromkeys(pointers, "*i32") | dict.fromkeys(numbers, "i32")
        return CompileRequest(kernel, signature, shared | more, gpu, pointers, num_warps=4, options=options)

    offsets = ("starts", "last_blocks", "cursors")
    return (
        request(count_choices, ("expert_ids", "counts", "ended", *offsets), ("choices",), BESIDE=beside),
        request(
            place_choices,
            ("expert_ids", *offsets, "order", "blocks", *(("ready",) if counted else ())),
            ("choices", "placing", "total_blocks"),
            BLOCKS=BLOCKS,
            **({} if counted else {"ready": None}),
        ),
    )


def run(
    launchers: tuple[Launcher, Launcher],
    expert_ids: torch.Tensor,
    scratch: Scratch,
    order: torch.Tensor,
    blocks: torch.Tensor,
    ready: torch.Tensor | None = None,
) -> None:
    """Writes `order` [choices], `blocks` [most_blocks, 3] and, if the requests are `counted`, `ready`
    [most_blocks], all int32; changes `scratch`."""
    count, place = launchers
    choices, total = expert_ids.numel(), blocks.shape[0]
    programs = -(-choices // CHOICES)
    offsets = {"starts": scratch.starts, "last_blocks": scratch.last_blocks, "cursors": scratch.cursors}
    count(
        (programs, 1, 1),
        expert_ids=expert_ids,
        counts=scratch.counts,
        ended=scratch.ended,
        choices=choices,
        **offsets,
    )
    counters = {}
    if "ready" in place.request.signature:
        assert ready is not None, "programs of blocks are to be counted"
        counters["ready"] = ready
    place(
        (programs + -(-total // BLOCKS), 1, 1),
        expert_ids=expert_ids,
        order=order,
        blocks=blocks,
        choices=choices,
        placing=programs,
        total_blocks=total,
        **offsets,
        **counters,
    )


# ---- 4. the reference


def reference(
    problem: Problem, expert_ids: torch.Tensor
) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Each expert's places, ascending, and the blocks that do something."""
    flat = expert_ids.flatten().tolist()
    of_expert: list[list[int]] = [[] for _ in range(problem.experts)]
    for place, expert in enumerate(flat):
        of_expert[expert].append(place)
    blocks, first = [], 0
    for expert, places in enumerate(of_expert):
        for done in range(0, len(places), problem.block):
            blocks.append((expert, first + done, min(problem.block, len(places) - done)))
        first += len(places)
    return of_expert, blocks
