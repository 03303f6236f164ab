"""The end of a model on a CPU: for each row, logits = head · (rms_norm(x) · norm_weight).

x [rows, hidden] float32, head [vocab, hidden] float32 or bf16 bits, logits [rows, vocab] float32.
Measured: EPYC, one thread, 2026-11-21, see docs/log/2026-11-21-first-light.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numba import prange

from firebox.hardware.base import Gpu
from firebox.kernels import _blocks
from firebox.kernels._cpu import jit, matmul, pack, rms_norm

# ---- 1. the problem

OP = _blocks.HEAD
Problem = _blocks.HeadProblem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """CPU, float32."""
    if gpu.kind != "cpu":
        return "is made for a CPU"
    if problem.dtype != torch.float32:
        return f"computes in float32, not {problem.dtype}"
    return None


# ---- 2. the device code


def _head(
    x: np.ndarray, norm_weight: np.ndarray, head: np.ndarray, eps: float, chunks: int, logits: np.ndarray
) -> None:
    h = np.empty(x.shape, np.float32)
    rms_norm(x, norm_weight, eps, h)
    vocab = head.shape[0]
    for c in prange(chunks):
        matmul(h, head, c * vocab // chunks, (c + 1) * vocab // chunks, logits)


_serial = jit(_head)
_parallel = jit(_head, parallel=True)

# ---- 3. bind


def bind(
    problem: Problem, weights: Mapping[str, torch.Tensor], threads: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A launcher `run(x) -> logits`. `weights`: norm [hidden], head [vocab, hidden]."""
    norm, head = weights["norm"].float().contiguous().numpy().copy(), pack(weights["head"])
    kernel, chunks = (_parallel, 4 * threads) if threads > 1 else (_serial, 1)
    eps = np.float32(problem.eps)

    def run(x: torch.Tensor) -> torch.Tensor:
        logits = x.new_empty(x.shape[0], problem.vocab)
        kernel(x.numpy(), norm, head, eps, chunks, logits.numpy())
        return logits

    return run


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula in float64."""
    w = {name: tensor.double() for name, tensor in inputs["weights"].items()}
    x = inputs["x"].double()
    h = w["norm"] * x / (x.pow(2).mean(-1, keepdim=True) + problem.eps).sqrt()
    return (h @ w["head"].T).float()


# ---- 5. inputs, cases, tolerance

# (problem, rows)
CASES = tuple(
    (problem, rows)
    for problem in (Problem(256, 3072, 1e-5), Problem(24, 101, 1e-6))
    for rows in (1, 2, 5, 16)
)
# float32 sums of a few hundred terms against float64, relative to the reference's RMS
TOLERANCE = 2e-6


def inputs(case: tuple[Problem, int], seed: int = 0) -> dict[str, Any]:
    """Random hidden states and weights."""
    problem, rows = case
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "norm": 1 + torch.randn(problem.hidden, generator=generator) * 0.1,
        "head": torch.randn(problem.vocab, problem.hidden, generator=generator) * problem.hidden**-0.5,
    }
    return {"x": torch.randn(rows, problem.hidden, generator=generator), "weights": weights}
