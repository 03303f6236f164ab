"""Runs quantise_groups and quantise_fp8 under Triton's interpreter, on the CPU, and prints for each kind what
the first made of a few rows as JSON, and under "fp8" the cases in which the second was not right. A process
of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_groups
"""

from __future__ import annotations

import json
from typing import Any

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import quantise_fp8, quantise_groups
from firebox.kernels._block_scaled import GROUPS, Rounded
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.small import difference

GPU = find_gpu("gb10")
NAN = float("nan")
COLUMNS = 96  # three groups of 32 or six of 16: not a power of two


def right(kind: str, found: dict[str, Any]) -> bool:
    """Bit by bit: scales, and codes at every border between two. E4M3 codes but for what the interpreter does
    to them: where rounding should carry into the exponent it does not, and ties go up."""
    codes = set(found["code_steps"]) <= ({-8, 0, 1} if kind == "mxf8" else {0})
    exact = found["scale_steps"] == [0] and found["rows_equal"] and codes
    return exact and found["finite_is_finite"] and found["zeros"]


def rows() -> torch.Tensor:
    """[rows, 96] float16: sizes from 10⁻⁴ to 10⁴, borders between codes, zeros, numbers that are not
    finite."""
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(12, COLUMNS, generator=generator) * torch.logspace(-4, 3, 12).unsqueeze(1)
    borders = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.2, 0.3, 0.7, 1.2, 1.3, 2.6, 3.4, 5.1]
    )
    both = torch.cat((borders, -borders)).repeat(3).unsqueeze(0)
    found = torch.cat((plain, both, both * 75, torch.zeros(1, COLUMNS), plain[:3])).half()
    found[-3, 40], found[-2, 3], found[-1, 95] = float("nan"), float("inf"), float("-inf")
    found[4, 16:48] = 0.0  # a group of zeros among others
    return found


def made(kind: str, x: torch.Tensor) -> Rounded:
    """What the kernel writes into memory that is NaN, with guards behind."""
    p = quantise_groups.Problem(COLUMNS, kind, "f16")
    room = quantise_groups.empty(p, x.shape[0] + 1, "cpu")
    parts = [part for part in (room.q, room.scales, room.row_scale) if part is not None]
    for part in parts:
        part.view(torch.uint8).fill_(0xEE)
    to = Rounded(*(None if part is None else part[:-1] for part in (room.q, room.scales, room.row_scale)))
    quantise_groups.run(Launcher(quantise_groups.request(p, GPU, interpreted=True)), x, to)
    assert all((part[-1].view(-1).view(torch.uint8) == 0xEE).all() for part in parts), "a row too many"
    assert (to.scales.view(torch.uint8)[:, COLUMNS // GROUPS[kind] :] == 0xEE).all(), "padding was written"
    return to


def judged(kind: str, x: torch.Tensor) -> dict[str, Any]:
    """Against the reference, row by row."""
    p = quantise_groups.Problem(COLUMNS, kind, "f16")
    to, finite = made(kind, x), x.isfinite().all(1)
    wanted, groups = quantise_groups.reference(p, x), COLUMNS // p.group
    scales = to.scales[:, :groups]
    codes = quantise_groups.quantised(p, x, scales, to.row_scale)
    steps = scales.view(torch.uint8).int() - wanted.scales.view(torch.uint8).int()
    meant = quantise_groups.dequantised(p, to)
    of_q = to.q.view(torch.uint8)[finite].int() - codes.view(torch.uint8)[finite].int()
    rows_equal = wanted.row_scale is None or torch.equal(to.row_scale[finite], wanted.row_scale[finite])
    return {
        "scale_steps": steps[finite].unique().tolist(),
        "code_steps": of_q.unique().tolist(),
        "rows_equal": rows_equal,
        "error": float((meant[finite] - x[finite].float()).norm() / x[finite].float().norm()),
        "nan_groups": meant[~finite].unflatten(1, (-1, p.group)).isnan().all(-1).int().tolist(),
        "finite_is_finite": bool(meant[finite].isfinite().all()),
        "zeros": bool((meant[finite][x[finite] == 0] == 0).all()),
    }


def fp8_right(group: int, tokens: int) -> bool:
    """Are quantise_fp8's scales the reference's, and its codes but for what the interpreter does to them? Of
    rows of all sizes and one of zeros, into NaN."""
    p = quantise_fp8.Problem(384, group, "f16")
    x = torch.randn(tokens, p.columns, generator=torch.Generator().manual_seed(tokens))
    x = (x * torch.logspace(-4, 4, tokens).unsqueeze(1)).half()
    x[1:2] = 0.0
    wanted, wanted_scales = quantise_fp8.reference(p, x)
    q = torch.full((tokens + 1, p.columns), NAN)
    scales = torch.full((tokens + 1, *wanted_scales.shape[1:]), NAN)
    q[-1], scales[-1] = 7.0, 7.0
    q = q.to(wanted.dtype)
    launcher = Launcher(quantise_fp8.request(p, GPU, interpreted=True))
    quantise_fp8.run(launcher, x, q[:-1], scales[:-1])
    assert (q[-1].float() == 7.0).all() and (scales[-1] == 7.0).all(), "a row behind was written"
    return difference(q[:-1], wanted).explained and torch.equal(scales[:-1], wanted_scales)


def main() -> None:
    quick_interpreter.begin()
    found: dict[str, Any] = {kind: judged(kind, rows()) for kind in GROUPS}
    for kind in GROUPS:
        made(kind, rows()[:0])  # which writes nothing
    cases = [(group, tokens) for group in (0, 128) for tokens in (0, 1, 7)]
    print(json.dumps(found | {"fp8": [case for case in cases if not fp8_right(*case)]}))


if __name__ == "__main__":
    main()
