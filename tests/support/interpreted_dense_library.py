"""Runs layers whose FP8 product is torch's, behind quantise_fp8 under Triton's interpreter, on the CPU, and
prints their relative errors as JSON. A process of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_dense_library

"layers": case → [error against float32 on the activations as the kernel rounded them, against what they were
before]. "trials": what engine/trials.py finds at so many tokens, sound and with a product that is a tenth too
large.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from firebox.engine.trials import LinearTrial, Setup
from firebox.hardware.base import find_gpu
from firebox.kernels import _linear, _tuned
from firebox.kernels._linear import Problem
from firebox.layers import _dense_library, dense_gpu
from firebox.layers.dense_gpu import CUBLAS, LinearKernels, Workspace
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.linear import random_weights

GPU = find_gpu("h200")
NAN = float("nan")
BROKEN = 1.1


def errors(p: Problem, tokens: int, *, in_place: bool) -> list[float]:
    """Of a run with a NaN-filled workspace and a guarded row behind the output."""
    generator = torch.Generator().manual_seed(tokens)
    weights, space = random_weights(p, generator), Workspace([p], 300, GPU, "cpu")
    for tensor in (space.x_scale, space.y):
        tensor.fill_(NAN)
    x = torch.randn(tokens, p.columns, generator=generator).bfloat16()
    out = torch.full((tokens + 1, p.rows), NAN, dtype=torch.bfloat16)
    out[-1] = 7.0
    residual = torch.randn(tokens, p.rows, generator=generator).bfloat16() if p.residual else None
    kept = None if residual is None else residual.clone()
    if in_place:
        out[:-1] = residual
    LinearKernels(p, weights, GPU, space)(x, out[:-1], out[:-1] if in_place else residual)
    assert (out[-1] == 7.0).all(), "a row behind the output was written"
    assert in_place or residual is None or torch.equal(residual, kept), "the residual was written"
    rounded = space.x[: x.numel()].view(x.shape).float() * space.x_scale[:tokens, None]
    return [relative_error(out[:-1], _linear.reference(p, given, weights, kept)) for given in (rounded, x)]


def layers() -> dict[str, list[float]]:
    found = {}
    for rows, columns, tokens in ((48, 80, 1), (112, 272, 17), (256, 512, 300)):
        for bias, residual, in_place in (
            (False, False, False),
            (True, False, False),
            (False, True, False),
            (True, True, True),
        ):
            p = Problem(rows, columns, "fp8_channel", bias=bias, residual=residual)
            case = f"{rows} × {columns} {tokens} {bias=} {residual=} {in_place=}"
            found[case] = errors(p, tokens, in_place=in_place)
    return found


def trials() -> dict[str, Any]:
    """[launch, tokens, error, limit, the choice's path] of each."""
    p = Problem(128, 256, "fp8_channel", bias=True, residual=True)

    def tried() -> list[Any]:
        trial = LinearTrial(p, Setup(GPU, torch.device("cpu"), 70))
        return [[r.launch, r.tokens, r.error, r.limit, r.choice[2]] for n in (1, 70) for r in trial(n)]

    found = {"sound": tried()}
    product = _dense_library.row_wise

    def wrong(x: torch.Tensor, x_scale: torch.Tensor, *others: Any) -> None:
        product(x, x_scale * BROKEN, *others)

    _dense_library.row_wise = wrong
    return found | {"broken": tried()}


def main() -> None:
    quick_interpreter.begin()

    class File(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return {1: {"path": CUBLAS, "config": None, "us": 1.0}}

    _tuned._file = lambda gpu_name, name="experts": File()
    assert dense_gpu.path_of(Problem(48, 80, "fp8_channel"), 5, GPU).name == CUBLAS
    print(json.dumps({"layers": layers(), "trials": trials()}))


if __name__ == "__main__":
    main()
