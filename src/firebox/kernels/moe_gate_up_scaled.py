"""The first half of an expert layer for many tokens, sorted by expert, with a block-scaled tensor instruction
(kernels/_block_scaled.py):

    h_i = activation(gate_e · x_t, up_e · x_t)   for the i-th choice in `order`, of token t and expert e

x [tokens, hidden] as kernels/quantise_groups.py leaves it; weights in nibbles; h [choices, inter] bf16 in the
sorted order. Products are exact, their sum and the activation in float32.

Source: own. Compiled for sm_120 and sm_121 and read back; not measured, for want of such a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _block_scaled
from firebox.kernels._block_scaled import Rounded, accepts, add_step, finished, kind_of
from firebox.kernels._experts import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._sorted import activated, empty_tile, store_tile
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_gate_up import Config

__all__ = ["accepts"]

# ---- 1. the problem

OP = "moe_gate_up"


def search_space(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Tiles of `tokens` choices that are worth compiling."""
    yield from _block_scaled.search_space(2 * problem.inter, tokens)


def default(problem: Problem, tokens: int, gpu: Gpu) -> Config:
    """A tile that fits everywhere, for want of a tuned one."""
    return _block_scaled.default(2 * problem.inter, tokens)


# ---- 2. the device code


@triton.jit
def gate_up_scaled(
    x, x_scale, x_row_scale, w, scale, row_scale, bias, order, blocks, out,
    HIDDEN: tl.constexpr, INTER: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    EMULATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of choices is PARTS programs' work."""
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
    # choices that are not there read token 0 and are not stored: loads need no mask
    token = (tl.load(order + first + i, mask=live, other=0) // TOP_K).to(tl.int64)
    RAGGED: tl.constexpr = 2 * INTER % ROWS != 0
    rows = n * ROWS + tl.arange(0, ROWS)
    if RAGGED:
        rows = tl.minimum(rows, 2 * INTER - 1)
    X_BYTES: tl.constexpr = HIDDEN if KIND == "mxf8" else HIDDEN // 2
    matrix = w + e * (2 * INTER * (HIDDEN // 2)) + rows[:, None] * (HIDDEN // 2)
    scale_of_row = scale + e * (2 * INTER * GROUPS) + rows[:, None] * GROUPS
    row_of_x = x + token[:, None] * X_BYTES
    scale_of_x = x_scale + token[:, None] * GROUPS
    acc = empty_tile(ROWS, TOKENS, True)
    for column in tl.range(0, HIDDEN, DEPTH, num_stages=STAGES):
        acc = add_step(
            acc, row_of_x, scale_of_x, matrix, scale_of_row, column,
            HIDDEN, TOKENS, ROWS, DEPTH, KIND, GROUP, EMULATED,
        )  # fmt: skip
    acc = finished(acc, x_row_scale, token, live, row_scale, bias, e * (2 * INTER) + rows, KIND)
    y = activated(acc, ROWS, TOKENS, CLAMPED, LIMIT, ALPHA, True)
    place = n * (ROWS // 2) + tl.arange(0, ROWS // 2)
    store_tile(out, y, (first + i).to(tl.int64) * INTER, place, live, place < INTER, True, RAGGED, "")


# ---- 3. the launch


def request(
    problem: Problem, config: Config, gpu: Gpu, *, block: int = 0, kind: str = "", interpreted: bool = False
) -> CompileRequest:
    """One compile for any number of tokens. `block` as in moe_gate_up; `kind`: another than the format's
    own."""
    kind = kind or kind_of(problem)
    constants: dict[str, Any] = _block_scaled.constants(
        problem, kind, problem.hidden, config, block, gpu, interpreted=interpreted
    )
    constants |= {
        "TOP_K": problem.top_k,
        "CLAMPED": problem.activation == "clamped_swiglu",
        "LIMIT": problem.limit,
        "ALPHA": problem.alpha,
    }
    return _block_scaled.request(gate_up_scaled, problem, kind, config, constants, gpu)


def run(
    launcher: Launcher,
    problem: Problem,
    x: Rounded,
    weights: Weights,
    order: torch.Tensor,
    blocks: torch.Tensor,
    h: torch.Tensor,
) -> None:
    """Writes `h`; one row of programs for each of `blocks` [n, 3]."""
    sizes = launcher.request.constexprs
    grid = (-(-2 * problem.inter // sizes["ROWS"]), blocks.shape[0] * sizes["PARTS"], 1)
    arguments = _block_scaled.bound(launcher, weights, x)
    launcher(grid, **arguments, order=order, blocks=blocks, out=h)


# ---- 4. the reference


def reference(
    problem: Problem, x: torch.Tensor, weights: Weights, expert_ids: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """h [choices, inter] in float32, in the order of `order`. `x`: dequantised."""
    from firebox.kernels import moe_gate_up

    return moe_gate_up.reference(problem, x, weights, expert_ids, order)
