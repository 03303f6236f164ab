"""Token ids to hidden states: out_t = table[token_ids_t].

token_ids [tokens] int64; table [vocab, hidden] bf16; out [tokens, hidden] bf16. Exact. An id outside the
table reads outside it: the engine refuses such ids where a request is submitted.

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _rows
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "embed"
COLUMNS = 1024  # that one program copies


@dataclass(frozen=True)
class Problem:
    """`dtype`: of the table, "bf16" or "f16"."""

    hidden: int
    dtype: str = "bf16"


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs."""
    return _rows.refuse(problem.hidden, _rows.PLAIN, gpu)


# ---- 2. the device code


@triton.jit
def copy_rows(token_ids, table, out, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """One program COLUMNS columns of a token."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < HIDDEN
    row = tl.load(token_ids + token)  # int64: a table can have more than 2^31 numbers
    values = tl.load(table + row * HIDDEN + column, mask=there, other=0.0)
    tl.store(out + token * HIDDEN + column, values, mask=there)


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens and any table of this width."""
    pdl = "pdl" in gpu.facts and not interpreted
    signature = {"token_ids": "*i64"} | dict.fromkeys(("table", "out"), f"*{POINTER_NAMES[problem.dtype]}")
    constants = {"HIDDEN": problem.hidden, "COLUMNS": COLUMNS, "PDL": pdl}
    options = {"launch_pdl": True} if pdl else {}
    return CompileRequest(
        copy_rows, signature, constants, gpu, ("table", "out"), num_warps=4, options=options
    )


def run(launcher: Launcher, token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `out` [tokens, hidden]."""
    assert table.is_contiguous() and table.shape[1] == launcher.request.constexprs["HIDDEN"], table.shape
    grid = (token_ids.shape[0], -(-table.shape[1] // COLUMNS), 1)
    launcher(grid, token_ids=token_ids, table=table, out=out)


# ---- 4. the reference


def reference(problem: Problem, token_ids: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """out."""
    return {"out": table[token_ids]}


# ---- 5. cases and inputs

CASES = (Problem(2880), Problem(5120), Problem(64))


def inputs(
    problem: Problem, rows: int, generator: torch.Generator, *, vocab: int = 300, **kind: Any
) -> dict[str, Any]:
    """Ids, the first and the last among them, and a table. `kind`: dtype and device."""
    device = kind["device"]
    token_ids = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    token_ids[:1], token_ids[1:2] = vocab - 1, 0
    table = torch.randn(vocab, problem.hidden, generator=generator, device=device).to(kind["dtype"])
    return {"token_ids": token_ids, "table": table}
