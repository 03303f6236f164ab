"""Runs the routing kernels under Triton's interpreter, on the CPU, and prints as JSON for each case: tokens
whose experts are decided, how many of them are wrong, the largest relative error of a weight. A process of
its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_route
"""

from __future__ import annotations

import dataclasses
import json

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import moe_route, moe_router
from firebox.kernels.launch import INTERPRETED, Launcher
from tests.support.route import CLOSE_PRODUCTS, ROUTINGS, decided, random_logits

GPU = find_gpu("gb10")
GUARD = -7


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
    """What main prints of one case; `ids` and `weights` with their guard rows."""
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
    return compare(ids, weights, wanted, decided(problem, logits, bias))


def router(problem: moe_router.Problem, tokens: int, generator: torch.Generator) -> dict[str, float]:
    p = problem
    config = dataclasses.replace(moe_router.default(p, tokens, GPU), depth=64, warps=4)
    _, bias, _ = random_logits(p.route, tokens, generator)
    x = torch.randn(tokens, p.hidden, generator=generator).half()
    w = torch.randn(p.rows, p.hidden, generator=generator) * 3 * p.hidden**-0.5
    w = w if p.weight_dtype == "f32" else w.half()
    router_bias = torch.randn(p.route.experts, generator=generator) if p.biases else None
    partial, counters = moe_router.scratch(p, config, tokens, "cpu")
    partial.fill_(float("nan"))
    ids, weights = outputs(p.route, tokens)
    launcher = Launcher(moe_router.request(p, config, GPU, interpreted=True))
    moe_router.run(launcher, x, w, router_bias, bias, partial, counters, ids[:-1], weights[:-1])
    assert not counters.any(), "counters are not zero again"
    wanted = moe_router.reference(p, x, w, router_bias, bias)
    logits = x.float() @ w.float()[: p.route.experts].T
    sure = decided(p.route, logits if router_bias is None else logits + router_bias, bias, CLOSE_PRODUCTS)
    return compare(ids, weights, wanted, sure)


def main() -> None:
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    generator, found = torch.Generator().manual_seed(0), {}
    for name, problem in ROUTINGS.items():
        found[f"route {name}"] = route(problem, 5, generator)
    for name, dtype, biases in (
        ("odd groups", "f32", False),
        ("odd", "f16", False),
        ("gpt-oss", "f16", True),
        ("qwen3.5", "f32", False),
    ):
        # 16 columns are not there in the last split
        problem = moe_router.Problem(176, ROUTINGS[name], biases, "f16", dtype)
        for tokens in (1, 9, 17):
            found[f"router {name} {tokens}"] = router(problem, tokens, generator)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
