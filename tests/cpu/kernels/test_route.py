"""Routing without a GPU: the kernel under Triton's interpreter against its reference, the reference
against the layer's own routing, and the launches compiled for GPUs that are not here. On a GPU:
tests/gpu/test_route.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import moe_route
from firebox.layers.moe import MoeBlock
from tests.support.interpreted_route import WEIGHT_LIMIT, beyond
from tests.support.interpreter import check_launches, interpreted
from tests.support.route import ROUTINGS, random_logits


@pytest.fixture(scope="module")
def found() -> Any:
    """Of each routing: what the kernel made of 5 tokens under the interpreter."""
    return interpreted("interpreted_route")


def test_the_kernel_chooses_what_the_reference_chooses_under_the_interpreter(found: Any) -> None:
    assert list(found) == list(ROUTINGS)
    assert not beyond(found)
    # inputs on a grid have ties, which are decided, and hardly anything that nearly ties
    assert all(case["decided"] == 5 for case in found.values())


def test_a_negative_logit_keeps_its_weight_where_groups_are_padded(found: Any) -> None:
    """A group of 20 fills 32 lanes. The 12 behind it count on through the next group's numbers, and a 0
    there was once taken for the logit of the expert so numbered."""
    assert found["odd groups"]["lowest"] < 0 and found["odd groups"]["error"] < WEIGHT_LIMIT


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_reference_is_the_layers_own_routing(name: str) -> None:
    """Where nothing ties: torch.topk does not say which of two equals it takes."""
    p = ROUTINGS[name]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, p.experts, generator=generator)
    _, bias, gate = random_logits(p, 64, generator)
    layer = SimpleNamespace(
        problem=SimpleNamespace(
            biases=False,
            scoring=p.scoring,
            top_k=p.top_k,
            routed_scale=p.routed_scale,
            expert_groups=p.expert_groups,
            renormalise=p.renormalise,
        ),
        router=torch.eye(p.experts),
        correction_bias=bias,
        kept_groups=p.kept_groups,
    )
    wanted_ids, wanted = MoeBlock._route(layer, logits)
    ids, weights = moe_route.reference(p, logits, bias, gate)
    assert torch.equal(ids[:, : p.top_k], wanted_ids)
    torch.testing.assert_close(weights[:, : p.top_k], wanted, rtol=1e-6, atol=0)
    assert (ids[:, p.top_k :] == torch.arange(p.experts, p.experts + p.shared)).all()
    last = torch.ones(64) if gate is None else gate.sigmoid()
    assert all(torch.equal(column, last) for column in weights[:, p.top_k :].T)


def test_equal_choices_go_to_the_lower_number() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, -0.0, 1.0]])
    ids, weights = moe_route.reference(moe_route.Problem(6, 4, "softmax_top_k"), logits)
    assert ids.tolist() == [[1, 3, 0, 5]] and weights[0, 0] == weights[0, 1]
    ids, _ = moe_route.reference(moe_route.Problem(6, 5, "softmax"), logits)
    assert ids.tolist() == [[1, 3, 0, 5, 2]]  # zeros of both signs are equal


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (moe_route.Problem(8, 4, "tanh"), "tanh"),
        (moe_route.Problem(2048, 8, "softmax"), "2048"),
        (moe_route.Problem(30, 4, "sigmoid", expert_groups=4, kept_groups=2), "30 experts in 4 groups"),
        (moe_route.Problem(32, 9, "sigmoid", expert_groups=4, kept_groups=1), "cannot choose 9"),
        (moe_route.Problem(32, 4, "softmax_top_k", expert_groups=4, kept_groups=2), "groups"),
    ],
)
def test_what_cannot_be_routed_is_refused_with_the_reason(problem: moe_route.Problem, why: str) -> None:
    refused = moe_route.accepts(problem, find_gpu("gb10"))
    assert refused is not None and why in refused


def test_every_launch_fits_and_is_native_where_it_is_for() -> None:
    requests = {}
    for name in ("gb10", "h200"):
        gpu = find_gpu(name)
        for model, problem in ROUTINGS.items():
            assert moe_route.accepts(problem, gpu) is None
            requests[f"{name} route {model}"] = moe_route.request(problem, gpu)
    check_launches(requests)
