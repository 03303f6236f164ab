"""The second half of an expert layer for many tokens, sorted by expert, with a block-scaled tensor
instruction (kernels/_block_scaled.py):

    y_p = weight_p · down_e · h_i     for the i-th choice in `order`: place p, expert e

h [choices, inter] as kernels/quantise_groups.py rounds what the first half left; weights in nibbles;
routing_weights [tokens, top_k] float32; y [choices, hidden] bf16 by place, as kernels/moe_down.py leaves it.
Products are exact, their sum is in float32.

Source: own. Compiled for sm_120 and sm_121 and read back; not measured, for want of such a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _block_scaled
from firebox.kernels._block_scaled import Rounded, accepts, add_step, finished, kind_of
from firebox.kernels._experts import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._sorted import empty_tile, scaled, store_tile
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_gate_up import Config

__all__ = ["accepts"]

# ---- 1. the problem

OP = "moe_down"


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles of `tokens` choices that are worth compiling."""
    yield from _block_scaled.search_space(problem.hidden, tokens)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one."""
    return _block_scaled.default(problem.hidden, tokens)


# ---- 2. the device code


@triton.jit
def down_scaled(
    x, x_scale, x_row_scale, w, scale, row_scale, bias, order, blocks, routing_weights, out,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    EMULATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of choices is PARTS programs' work. `x` is h."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    n = tl.program_id(0)
    part = tl.program_id(1) % PARTS
    entry = blocks + tl.program_id(1) // PARTS * 3
    count = tl.load(entry + 2) - part * TOKENS
    if count <= 0:
        return
    e = tl.load(entry).to(tl.int64)
    first = tl.load(entry + 1) + part * TOKENS
    i = tl.arange(0, TOKENS)
    live = i < count
    place = tl.load(order + first + i, mask=live, other=0)
    at = (first + tl.where(live, i, 0)).to(tl.int64)  # others read the first and are not stored
    RAGGED: tl.constexpr = HIDDEN % ROWS != 0
    column = n * ROWS + tl.arange(0, ROWS)
    rows = column
    if RAGGED:
        rows = tl.minimum(column, HIDDEN - 1)
    H_BYTES: tl.constexpr = INTER if KIND == "mxf8" else INTER // 2
    matrix = w + e * (HIDDEN * (INTER // 2)) + rows[:, None] * (INTER // 2)
    scale_of_row = scale + e * (HIDDEN * GROUPS) + rows[:, None] * GROUPS
    row_of_h = x + at[:, None] * H_BYTES
    scale_of_h = x_scale + at[:, None] * GROUPS
    acc = empty_tile(ROWS, TOKENS, True)
    for k in tl.range(0, INTER, DEPTH, num_stages=STAGES):
        acc = add_step(
            acc, row_of_h, scale_of_h, matrix, scale_of_row, k,
            INTER, TOKENS, ROWS, DEPTH, KIND, GROUP, EMULATED,
        )  # fmt: skip
    acc = finished(acc, x_row_scale, at, live, row_scale, bias, e * HIDDEN + rows, KIND)
    y = scaled(acc, None, tl.load(routing_weights + place, mask=live, other=0.0), True)
    store_tile(out, y, place.to(tl.int64) * HIDDEN, column, live, column < HIDDEN, True, RAGGED, "")


# ---- 3. the launch


def request(
    problem: Problem, config: Config, gpu: Gpu, *, block: int = 0, kind: str = "", interpreted: bool = False
) -> CompileRequest:
    """One compile for any number of tokens; `block` and `kind` as in moe_gate_up_scaled."""
    kind = kind or kind_of(problem)
    constants = _block_scaled.constants(
        problem, kind, problem.inter, config, block, gpu, interpreted=interpreted
    )
    return _block_scaled.request(
        down_scaled, problem, kind, config, constants, gpu, {"routing_weights": "*fp32"}
    )


def run(
    launcher: Launcher,
    problem: Problem,
    h: Rounded,
    weights: Weights,
    order: torch.Tensor,
    blocks: torch.Tensor,
    routing_weights: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Writes `y` [choices, hidden]; one row of programs for each of `blocks` [n, 3]."""
    sizes = launcher.request.constexprs
    grid = (-(-problem.hidden // sizes["ROWS"]), blocks.shape[0] * sizes["PARTS"], 1)
    arguments = _block_scaled.bound(launcher, weights, h)
    launcher(grid, **arguments, order=order, blocks=blocks, routing_weights=routing_weights, out=y)


# ---- 4. the reference


def reference(
    problem: Problem,
    h: torch.Tensor,
    weights: Weights,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """y [choices, hidden] in float32, by place. `h`: dequantised."""
    from firebox.kernels import moe_down

    return moe_down.reference(problem, h, weights, expert_ids, order, routing_weights)
