"""Routing on a real GPU: every router we know, every number of tokens that finds another path. Needs torch,
Triton and pytest, nothing of the engine."""

from __future__ import annotations

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import moe_route
from firebox.kernels.launch import Launcher
from tests.support.interpreted_route import compare, outputs
from tests.support.route import ROUTINGS, decided, random_logits

pytestmark = pytest.mark.gpu

# Exponentials by ex2.approx (2 ulp), a division by div.full (2 ulp), sums in another order.
WEIGHT_LIMIT = 2e-6


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


@pytest.mark.parametrize("name", ROUTINGS)
def test_choices_and_weights(name: str, gpu: Gpu) -> None:
    problem, generator = ROUTINGS[name], torch.Generator("cuda").manual_seed(0)
    launcher = Launcher(moe_route.request(problem, gpu))
    for tokens in (1, 2, 7, 16, 33, 4097):
        logits, bias, gate = random_logits(problem, tokens, generator, "cuda")
        ids, weights = outputs(problem, tokens, "cuda")
        moe_route.run(launcher, logits, bias, gate, ids[:-1], weights[:-1])
        wanted = moe_route.reference(problem, logits, bias, gate)
        found = compare(ids, weights, wanted, decided(problem, logits, bias))
        assert found["wrong"] == 0 and found["error"] < WEIGHT_LIMIT, (tokens, found)
        assert found["decided"] >= 0.9 * tokens, found


def test_no_tokens_and_not_a_number(gpu: Gpu) -> None:
    problem = ROUTINGS["qwen3-30b"]
    launcher = Launcher(moe_route.request(problem, gpu))
    ids, weights = outputs(problem, 2, "cuda")
    moe_route.run(launcher, torch.empty(0, 128, device="cuda"), None, None, ids[:0], weights[:0])
    assert (ids == -7).all()
    logits = torch.full((2, 128), float("nan"), device="cuda")
    logits[1, 5:] = -torch.inf
    moe_route.run(launcher, logits, None, None, ids[:-1], weights[:-1])
    assert ids[0].tolist() == list(range(8)) and ids[1].tolist() == list(range(8))
