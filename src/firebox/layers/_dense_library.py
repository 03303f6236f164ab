"""Products of a dense linear layer that torch gives to a library, cuBLAS or CUTLASS: y = x · Wᵀ (+ bias)
(+ residual), rounded once for the product with its bias and once more for what does not fit into the call.

    bf16          torch.mm, torch.addmm
    fp8_channel   torch._scaled_mm with a scale for each token and one for each row of W

The FP8 product is asked for sums without steps in between (`use_fast_accum`): Hopper's tensor cores keep
fewer bits of a sum than float32 has, and kernels/linear.py leaves them the whole sum too.

Where row-wise scales are implemented: torch ≥ 2.5 on Hopper (CUTLASS, cuBLAS from 12.9 on); on 12.x it
depends on the build, and torch 2.10 was seen to refuse (pytorch/pytorch issue 192707). So only a measurement
chooses this product.
"""

from __future__ import annotations

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import quantise_fp8
from firebox.kernels._linear import Problem, Weights

ROW_WISE = "fp8_channel"
UNIT = 16  # of rows and columns of an FP8 product


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """Why torch has no such product, or None."""
    p = problem
    if p.format == "bf16":
        return None
    if p.format != ROW_WISE:
        return f"multiplies no {p.format} weights"
    if p.rows % UNIT or p.columns % UNIT:
        return f"needs rows and columns that are multiples of {UNIT}, not {p.rows} and {p.columns}"
    if (p.dtype, p.out_dtype) != ("bf16", "bf16"):
        return f"makes bf16 of bf16 in {p.format}, not {p.out_dtype} of {p.dtype}"
    return quantise_fp8.accepts(quantise_fp8.Problem(p.columns, 0, p.dtype), gpu)


def plain(
    x: torch.Tensor,
    weights: Weights,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Unquantised: `x` [tokens, columns], w [rows, columns] → `out` [tokens, rows], which may be `residual`.
    `bias` [rows] in x's type."""
    matrix = weights.w.T
    if out.dtype == torch.float32:
        torch.mm(x, matrix, out_dtype=torch.float32, out=out)
        added = [weights.bias, residual]
    elif residual is not None:
        torch.addmm(residual, x, matrix, out=out)
        added = [bias]
    elif bias is not None:
        torch.addmm(bias, x, matrix, out=out)
        added = []
    else:
        torch.mm(x, matrix, out=out)
        added = []
    for term in added:
        if term is not None:
            out.add_(term)


def row_wise(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: Weights,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """FP8: `x` [tokens, columns] E4M3 with `x_scale` [tokens] float32, `bias` [rows] bf16 → `out` [tokens,
    rows] bf16. Where `out` is `residual`, the product lies in `y` in between, bf16 and as large at least."""
    assert weights.row_scale is not None, "weights without a scale for each row"
    in_place = residual is not None and residual.data_ptr() == out.data_ptr()
    assert not in_place or y.numel() >= out.numel(), (y.numel(), out.shape)
    product = y[: out.numel()].view(out.shape) if in_place else out
    torch._scaled_mm(
        x,
        weights.w.T,
        scale_a=x_scale[:, None],
        scale_b=weights.row_scale[None, :],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=product,
    )
    if residual is not None:
        torch.add(product, residual, out=out)
