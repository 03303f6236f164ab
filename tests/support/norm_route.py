"""Runs kernels/moe_norm_route.py on one of its cases, on a GPU or under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import moe_norm_route as kernel
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_norm_route import Config, Problem
from tests.support.small import Difference, difference

# As the models' layers have them on one GPU: where formats differ, a shared expert is computed apart.
MODELS = {
    "gpt-oss-20b": kernel.of_sizes(2880, 32, 4, "softmax_top_k", bias=True),
    "gpt-oss": kernel.of_sizes(2880, 128, 4, "softmax_top_k", bias=True),
    "qwen3": kernel.of_sizes(2048, 128, 8, "softmax"),
    "glm-4.5-air": kernel.of_sizes(4096, 128, 8, "sigmoid", shared=1),
    "glm-4.7": kernel.of_sizes(5120, 160, 8, "sigmoid", routed_scale=2.5, shared=1),
    "kimi-k2": kernel.of_sizes(7168, 384, 8, "sigmoid", routed_scale=2.827),
    "qwen3.5": kernel.of_sizes(4096, 512, 10, "softmax"),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
GUARD = -7
# Of what the written rows make: sums of products in another order, exponentials by ex2.approx, a division.
WEIGHT_LIMIT = 3e-5


class Found(NamedTuple):
    """`rows`: of h. `wrong`: choices that are others; `weights`: the largest relative error of one, for the
    rows as they are; `counter` afterwards. The worst of two runs in the same memory."""

    rows: Difference
    wrong: int
    weights: float
    counter: int

    @property
    def right(self) -> bool:
        """Is everything as it should be?"""
        return self.rows.explained and not self.wrong and self.weights < WEIGHT_LIMIT and not self.counter


def compare(problem: Problem, gpu: Gpu, seed: int, device: str, config: Config | None = None) -> Found:
    """Into NaN and −7, with guards behind. Raises AssertionError if something outside was written."""
    config = config or kernel.default(problem, gpu)
    launcher = Launcher(kernel.request(problem, config, gpu, interpreted=device == "cpu"))
    generator, dtype = torch.Generator(device).manual_seed(seed), DTYPES[problem.norm.dtype]
    logits = torch.full((problem.route.experts + 1,), GUARD, dtype=torch.float32, device=device)
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    runs = []
    for _ in range(2):
        made = kernel.inputs(problem, generator, device=device, dtype=dtype)
        runs.append(_run(launcher, problem, made, logits, counter))
        assert logits[-1] == GUARD, "a logit of no expert was written"
    first, second = runs
    rows = max(first.rows, second.rows, key=lambda rows: (not rows.explained, rows))
    return Found(rows, *(max(pair) for pair in zip(first[1:], second[1:], strict=True)))


def _run(
    launcher: Launcher, problem: Problem, made: dict[str, Any], logits: torch.Tensor, counter: torch.Tensor
) -> Found:
    h, expert_ids, _ = kernel.reference(problem, **made)
    out = torch.full_like(h, torch.nan)
    ids = torch.full_like(expert_ids, GUARD, dtype=torch.int32)
    weights = torch.full(ids.shape, torch.nan, device=h.device)
    around = [torch.cat((rows, torch.full_like(rows, GUARD))) for rows in (out, ids, weights)]
    out, ids, weights = (rows[:1] for rows in around)
    kernel.run(
        launcher, problem, **made, logits=logits, counter=counter, out=out, expert_ids=ids,
        routing_weights=weights,
    )  # fmt: skip
    assert all(bool((rows[1] == GUARD).all()) for rows in around), "behind an output was written"
    wanted = kernel.routed(problem, out, made["router"], made["correction_bias"])[1]
    error = ((weights - wanted) / wanted.abs().clamp(min=1e-12)).abs().nan_to_num(torch.inf)
    wrong = int((ids != expert_ids).sum())
    return Found(difference(out, h), wrong, float(error.max()), int(counter))


def of_inputs(problem: Problem, seed: int, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    return kernel.inputs(problem, generator, device=device, dtype=DTYPES[problem.norm.dtype])


def in_type(problem: Problem, dtype: str) -> Problem:
    """The same in "bf16" or "f16"."""
    return replace(problem, norm=replace(problem.norm, dtype=dtype))
