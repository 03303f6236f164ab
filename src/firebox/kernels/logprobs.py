"""Of every row, the logarithm of the chosen token's probability, its rank, and the likeliest tokens:

    logprob = l[token] − ln Σ exp l;  rank = how many l are larger than l[token]

logits [rows, vocab] float32; token_ids [rows] int64; logprobs [rows] float32, ranks [rows] int32; top_ids
[rows, top] int32 and top_logprobs [rows, top] float32, likeliest first, among equals the lower id first.
Sums in float32: of a chunk as its program adds it up, of the chunks in their order.

A program takes CHUNK tokens; the last one of a row (a counter says so; it is zero before and after) puts the
chunks together.

Source: own.
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
from firebox.kernels.moe_route import TAKEN, first_largest, sortable, unsortable
from firebox.kernels.plan import Compile

# ---- 1. the problem

OP = "logprobs"
MOST = 20
NOWHERE = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Problem:
    """`top`: how many of the likeliest tokens are wanted, 0 to 20."""

    vocab: int
    top: int


@dataclass(frozen=True)
class Config:
    """`chunk`: tokens that a program takes, a power of two."""

    chunk: int = 4096
    warps: int = 8


@dataclass(frozen=True)
class Scratch:
    """`tops`, `sums` float32 and `above` int32 [rows, chunks]; `keys` and `ids` int32 [rows, chunks, top];
    `ended` [rows] int32, zero between calls."""

    tops: torch.Tensor
    sums: torch.Tensor
    above: torch.Tensor
    keys: torch.Tensor
    ids: torch.Tensor
    ended: torch.Tensor


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs, up to 20 alternatives."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if problem.top > min(MOST, problem.vocab):
        return f"finds up to {min(MOST, problem.vocab)} likeliest tokens, not {problem.top}"
    return None


def default(problem: Problem, gpu: Gpu) -> Config:
    """For want of a tuned one."""
    return Config()


def chunks(problem: Problem, config: Config) -> int:
    """Programs a row."""
    return -(-problem.vocab // config.chunk)


def scratch(problem: Problem, config: Config, rows: int, device: torch.device | str) -> Scratch:
    """For up to so many rows a call."""
    count = chunks(problem, config)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    return Scratch(
        tops=empty(count, dtype=torch.float32),
        sums=empty(count, dtype=torch.float32),
        above=empty(count),
        keys=empty(count, problem.top),
        ids=empty(count, problem.top),
        ended=torch.zeros(rows, dtype=torch.int32, device=device),
    )


def outputs(
    problem: Problem, rows: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for logprobs, ranks, top_ids and top_logprobs."""
    values = torch.empty(rows, device=device)
    ids = torch.empty(rows, problem.top, dtype=torch.int32, device=device)
    return (
        values,
        torch.empty_like(values, dtype=torch.int32),
        ids,
        torch.empty_like(ids, dtype=torch.float32),
    )


# ---- 2. the device code


@triton.jit
def _likeliest(key, number, TOP: tl.constexpr, PADDED: tl.constexpr):
    """The TOP largest keys [n] and their numbers, both [PADDED]."""
    at = tl.arange(0, PADDED)
    keys = tl.zeros((PADDED,), tl.int32)
    numbers = tl.zeros((PADDED,), tl.int32)
    for j in tl.static_range(TOP):
        largest, best = first_largest(key, number, NOWHERE)
        keys = tl.where(at == j, largest, keys)
        numbers = tl.where(at == j, best, numbers)
        key = tl.where(number == best, TAKEN, key)
    return keys, numbers


@triton.jit
def _put_together(
    tops, sums, above, keys, ids, chosen, logprob, rank, top_ids, top_logprobs,
    CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, TOP: tl.constexpr, TOP_PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """All pointers are the row's. Around the L1 cache (.cg), which may hold what stood there before."""
    chunk = tl.arange(0, CHUNKS_PADDED)
    real = chunk < CHUNKS
    its_top = tl.load(tops + chunk, mask=real, other=float("-inf"), cache_modifier=".cg")
    its_sum = tl.load(sums + chunk, mask=real, other=0.0, cache_modifier=".cg")
    larger = tl.load(above + chunk, mask=real, other=0, cache_modifier=".cg")
    top = tl.max(its_top, 0)
    weight = tl.where(its_top == float("-inf"), 0.0, tl.exp(its_top - top))
    log_sum = tl.log(tl.sum(its_sum * weight))
    tl.store(logprob, (chosen - top) - log_sum)
    tl.store(rank, tl.sum(larger))
    if TOP > 0:
        i = tl.arange(0, CANDIDATES)
        key = tl.load(keys + i, mask=i < CHUNKS * TOP, other=TAKEN, cache_modifier=".cg")
        number = tl.load(ids + i, mask=i < CHUNKS * TOP, other=NOWHERE, cache_modifier=".cg")
        best, its_ids = _likeliest(key, number, TOP, TOP_PADDED)
        j = tl.arange(0, TOP_PADDED)
        tl.store(top_ids + j, its_ids, mask=j < TOP)
        tl.store(top_logprobs + j, (unsortable(best) - top) - log_sum, mask=j < TOP)


@triton.jit
def log_probabilities(
    logits, token_ids, tops, sums, above, keys, ids, ended, logprobs, ranks, top_ids, top_logprobs,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    TOP: tl.constexpr, TOP_PADDED: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    mine = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = mine * CHUNK + tl.arange(0, CHUNK)
    there = token < VOCAB
    x = tl.load(logits + row * VOCAB + token, mask=there, other=float("-inf"))
    chosen = tl.load(logits + row * VOCAB + tl.load(token_ids + row))
    top = tl.max(x, 0)
    at = row * CHUNKS + mine
    tl.store(tops + at, top)
    tl.store(sums + at, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top)), 0))
    tl.store(above + at, tl.sum((x > chosen).to(tl.int32), 0))
    if TOP > 0:
        best, numbers = _likeliest(tl.where(there, sortable(x), TAKEN), token, TOP, TOP_PADDED)
        j = tl.arange(0, TOP_PADDED)
        tl.store(keys + at * TOP + j, best, mask=j < TOP)
        tl.store(ids + at * TOP + j, numbers, mask=j < TOP)
    tl.debug_barrier()  # every thread's part is written before the counter says so
    if tl.atomic_add(ended + row, 1, sem="acq_rel") == CHUNKS - 1:
        tl.debug_barrier()
        first = row * CHUNKS
        _put_together(
            tops + first, sums + first, above + first, keys + first * TOP, ids + first * TOP, chosen,
            logprobs + row, ranks + row, top_ids + row * TOP, top_logprobs + row * TOP,
            CHUNKS, CHUNKS_PADDED, TOP, TOP_PADDED, CANDIDATES,
        )  # fmt: skip
        tl.store(ended + row, 0)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of rows."""
    pdl, count = "pdl" in gpu.facts and not interpreted, chunks(problem, config)
    signature = {"logits": "*fp32", "token_ids": "*i64", "tops": "*fp32", "sums": "*fp32"}
    signature |= dict.fromkeys(("above", "keys", "ids", "ended", "ranks", "top_ids"), "*i32")
    signature |= dict.fromkeys(("logprobs", "top_logprobs"), "*fp32")
    constants = {
        "VOCAB": problem.vocab,
        "CHUNK": config.chunk,
        "CHUNKS": count,
        "CHUNKS_PADDED": triton.next_power_of_2(count),
        "TOP": problem.top,
        "TOP_PADDED": triton.next_power_of_2(max(problem.top, 1)),
        "CANDIDATES": triton.next_power_of_2(count * max(problem.top, 1)),
        "PDL": pdl,
    }
    return CompileRequest(
        log_probabilities,
        signature,
        constants,
        gpu,
        tuple(signature),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def kinds(vocab: int) -> tuple[Problem, Problem]:
    """What the engine looks up: the chosen token alone, or as many others as there may be."""
    return Problem(vocab, 0), Problem(vocab, min(MOST, vocab))


def variants(vocab: int, gpu: Gpu) -> tuple[Compile, ...]:
    """Those of `kinds`, for the plan."""
    found = []
    for problem, variant in zip(kinds(vocab), ("", "alternatives"), strict=True):
        config = default(problem, gpu)
        found.append(Compile(OP, request(problem, config, gpu), config, variant))
    return tuple(found)


def run(
    launcher: Launcher,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    scratch: Scratch,
    logprobs: torch.Tensor,
    ranks: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Writes the four outputs for all rows of `logits`; changes `scratch`."""
    outputs = {"logprobs": logprobs, "ranks": ranks, "top_ids": top_ids, "top_logprobs": top_logprobs}
    if logits.shape[0]:
        grid = (launcher.request.constexprs["CHUNKS"], logits.shape[0], 1)
        launcher(grid, logits=logits, token_ids=token_ids, **vars(scratch), **outputs)


# ---- 4. the reference


def reference(
    problem: Problem, logits: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, ranks, top_ids and top_logprobs; logarithms in float64."""
    logprobs = logits.double().log_softmax(-1)
    chosen = token_ids.unsqueeze(-1)
    ranks = (logits > logits.gather(-1, chosen)).sum(-1)
    top_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : problem.top]
    return logprobs.gather(-1, chosen).squeeze(-1), ranks, top_ids, logprobs.gather(-1, top_ids)
