"""Runs the routing kernel under Triton's interpreter, on the CPU, and prints as JSON for each case: tokens
whose experts are decided, how many of them are wrong, the largest relative error of a weight, the lowest
logit that was chosen. A process of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_route
"""

from __future__ import annotations

import json

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import moe_route
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.route import ROUTINGS, decided, random_logits

GPU = find_gpu("gb10")
GUARD = -7
WEIGHT_LIMIT = 1e-6  # exponentials and a division in float32, in another order than torch's


def beyond(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The cases with other experts, or with a weight whose error is not below its limit."""
    return {name: c for name, c in found.items() if c["wrong"] or not c["error"] < WEIGHT_LIMIT}


def outputs(
    problem: moe_route.Problem, tokens: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filled with what must not survive, and one guard row behind."""
    shape = (tokens + 1, problem.choices)
    ids = torch.full(shape, GUARD, dtype=torch.int32, device=device)
    weights = torch.full(shape, float("nan"), device=device)
    weights[-1] = GUARD
    return ids, weights


def compare(
    ids: torch.Tensor,
    weights: torch.Tensor,
    wanted: tuple[torch.Tensor, torch.Tensor],
    sure: torch.Tensor,
) -> dict[str, float]:
    """What main prints of one case, less the lowest logit; `ids` and `weights` with their guard rows."""
    assert (ids[-1] == GUARD).all() and (weights[-1] == GUARD).all(), "the row behind was written"
    ids, weights = ids[:-1], weights[:-1]
    wrong = ~((ids == wanted[0]).all(-1)) & sure
    error = ((weights - wanted[1]) / wanted[1].abs().clamp(min=1e-12)).abs()[sure]
    worst = float(error.nan_to_num(torch.inf).max()) if len(error) else 0.0
    return {"decided": int(sure.sum()), "wrong": int(wrong.sum()), "error": worst}


def route(problem: moe_route.Problem, tokens: int, generator: torch.Generator) -> dict[str, float]:
    logits, bias, gate = random_logits(problem, tokens, generator)
    ids, weights = outputs(problem, tokens)
    launcher = Launcher(moe_route.request(problem, GPU, interpreted=True))
    moe_route.run(launcher, logits, bias, gate, ids[:-1], weights[:-1])
    wanted = moe_route.reference(problem, logits, bias, gate)
    lowest = logits.gather(-1, wanted[0][:, : problem.top_k]).min()
    return compare(ids, weights, wanted, decided(problem, logits, bias)) | {"lowest": float(lowest)}


def main() -> None:
    quick_interpreter.begin()
    generator = torch.Generator().manual_seed(0)
    found = {name: route(problem, 5, generator) for name, problem in ROUTINGS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
