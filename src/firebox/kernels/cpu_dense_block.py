"""One dense gated MLP layer on a CPU, residual to residual, in one call: for every token t of the step

    h = rms_norm(x_t) · norm_weight
    out_t = x_t + down · (silu(gate · h) · (up · h))

x, out [tokens, hidden] float32; gate_up [2 · inter, hidden] (gate rows, then up rows), down [hidden, inter],
float32 or bf16 bits. Measured: EPYC, one thread, 2026-11-21, see docs/log/2026-11-21-first-light.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numba import prange

from firebox.hardware.base import Gpu
from firebox.kernels import _blocks
from firebox.kernels._cpu import jit, matmul, pack, rms_norm, silu_mul

# ---- 1. the problem

OP = _blocks.DENSE_BLOCK
Problem = _blocks.DenseProblem


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """CPU, float32."""
    if gpu.kind != "cpu":
        return "is made for a CPU"
    if problem.dtype != torch.float32:
        return f"computes in float32, not {problem.dtype}"
    return None


# ---- 2. the device code


def _dense_block(
    x: np.ndarray,
    norm_weight: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    eps: float,
    chunks: int,
    out: np.ndarray,
) -> None:
    tokens, hidden = x.shape
    inter = down.shape[1]
    h = np.empty((tokens, hidden), np.float32)
    rms_norm(x, norm_weight, eps, h)
    both = np.empty((tokens, 2 * inter), np.float32)
    for c in prange(chunks):
        matmul(h, gate_up, c * 2 * inter // chunks, (c + 1) * 2 * inter // chunks, both)
    activated = np.empty((tokens, inter), np.float32)
    silu_mul(both, activated)
    for c in prange(chunks):
        matmul(activated, down, c * hidden // chunks, (c + 1) * hidden // chunks, out)
    for t in range(tokens):
        for i in range(hidden):
            out[t, i] += x[t, i]


_serial = jit(_dense_block)
_parallel = jit(_dense_block, parallel=True)

# ---- 3. bind


def bind(
    problem: Problem, weights: Mapping[str, torch.Tensor], threads: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A launcher `run(x) -> out`. `weights`: norm [hidden], gate_up, down as in the docstring."""
    norm = weights["norm"].float().contiguous().numpy().copy()
    gate_up, down = pack(weights["gate_up"]), pack(weights["down"])
    kernel, chunks = (_parallel, 4 * threads) if threads > 1 else (_serial, 1)
    eps = np.float32(problem.eps)

    def run(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel(x.numpy(), norm, gate_up, down, eps, chunks, out.numpy())
        return out

    return run


# ---- 4. the reference


def reference(problem: Problem, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The formula in float64."""
    w = {name: tensor.double() for name, tensor in inputs["weights"].items()}
    x = inputs["x"].double()
    h = w["norm"] * x / (x.pow(2).mean(-1, keepdim=True) + problem.eps).sqrt()
    gate, up = (h @ w["gate_up"].T).chunk(2, dim=-1)
    return (x + (torch.nn.functional.silu(gate) * up) @ w["down"].T).float()


# ---- 5. inputs, cases, tolerance

# (problem, tokens)
CASES = tuple(
    (problem, tokens)
    for problem in (Problem(256, 768, 1e-5), Problem(24, 37, 1e-6))
    for tokens in (1, 3, 4, 16, 65)
)
# float32 sums of a few hundred terms against float64, relative to the reference's RMS
TOLERANCE = 2e-6


def inputs(case: tuple[Problem, int], seed: int = 0) -> dict[str, Any]:
    """Random hidden states and weights."""
    problem, tokens = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "norm": 1 + normal(problem.hidden, scale=0.1),
        "gate_up": normal(2 * problem.inter, problem.hidden, scale=problem.hidden**-0.5),
        "down": normal(problem.hidden, problem.inter, scale=problem.inter**-0.5),
    }
    return {"x": normal(tokens, problem.hidden), "weights": weights}
