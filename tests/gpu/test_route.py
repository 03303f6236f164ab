"""Routing on a real GPU: every router we know, every number of tokens that finds another path. Needs torch,
Triton and pytest, nothing of the engine."""

from __future__ import annotations

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import moe_route, moe_router
from firebox.kernels.launch import Launcher
from tests.support.interpreted_route import compare, outputs
from tests.support.route import CLOSE_PRODUCTS, ROUTINGS, decided, random_logits

pytestmark = pytest.mark.gpu

# Exponentials by ex2.approx (2 ulp), a division by div.full (2 ulp), sums in another order.
WEIGHT_LIMIT = 2e-6
# and logits of a bf16 product with truncating sums in the tensor cores, up to 4,096 columns
PRODUCT_LIMIT = 2e-5
CLOSE_SUMS = 2 * CLOSE_PRODUCTS


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


@pytest.mark.parametrize(
    ("name", "hidden", "dtype"),
    [
        ("glm-4.7", 5120, "f32"),
        ("qwen3.5", 4096, "bf16"),
        ("kimi-k2", 7168, "bf16"),
        ("gpt-oss", 2880, "bf16"),
        ("deepseek-v3", 1000, "f32"),
        ("odd groups", 264, "bf16"),
    ],
)
def test_product_and_choice_in_one_launch(name: str, hidden: int, dtype: str, gpu: Gpu) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    p = moe_router.Problem(hidden, ROUTINGS[name], name == "gpt-oss", "bf16", dtype)
    w = torch.randn(p.rows, hidden, generator=generator, device="cuda") * 3 * hidden**-0.5
    w = w if dtype == "f32" else w.bfloat16()
    router_bias = torch.randn(p.route.experts, generator=generator, device="cuda") if p.biases else None
    all_decided = all_tokens = 0
    for tokens in (1, 2, 3, 8, 9, 16, 17, 63, 64):
        config = moe_router.default(p, tokens, gpu)
        launcher = Launcher(moe_router.request(p, config, gpu))
        _, bias, _ = random_logits(p.route, tokens, generator, "cuda")
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
        partial, counters = moe_router.scratch(p, config, tokens, "cuda")
        logits = (x.double() @ w.double()[: p.route.experts].T).float()
        logits = logits if router_bias is None else logits + router_bias
        sure, again = decided(p.route, logits, bias, CLOSE_SUMS), []
        for _ in range(2):
            partial.fill_(float("nan"))
            ids, weights = outputs(p.route, tokens, "cuda")
            moe_router.run(launcher, x, w, router_bias, bias, partial, counters, ids[:-1], weights[:-1])
            assert not counters.any(), "counters are not zero again"
            again.append((ids, weights))
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)), "not the same at every run"
        wanted = moe_router.reference(p, x, w, router_bias, bias)
        found = compare(ids, weights, wanted, sure)
        assert found["wrong"] == 0 and found["error"] < PRODUCT_LIMIT, (tokens, found)
        all_decided, all_tokens = all_decided + found["decided"], all_tokens + tokens
    assert all_decided > 0.5 * all_tokens, (all_decided, all_tokens)


def test_a_token_is_routed_alone_as_in_a_batch(gpu: Gpu) -> None:
    p = moe_router.Problem(4096, ROUTINGS["qwen3.5"])
    generator = torch.Generator("cuda").manual_seed(3)
    w = torch.randn(p.rows, p.hidden, generator=generator, device="cuda").bfloat16() / 20
    x = torch.randn(64, p.hidden, generator=generator, device="cuda").bfloat16()
    found = {}
    for tokens in (1, 5, 64):
        config = moe_router.default(p, tokens, gpu)
        partial, counters = moe_router.scratch(p, config, tokens, "cuda")
        ids, weights = outputs(p.route, tokens, "cuda")
        launcher = Launcher(moe_router.request(p, config, gpu))
        moe_router.run(launcher, x[:tokens], w, None, None, partial, counters, ids[:-1], weights[:-1])
        found[tokens] = ids[0], weights[0]
    for tokens in (5, 64):  # the logits are the same to the bit; the softmax is summed up in another layout
        assert torch.equal(found[1][0], found[tokens][0]), tokens
        torch.testing.assert_close(found[1][1], found[tokens][1], rtol=1e-6, atol=0)


def test_in_a_captured_graph(gpu: Gpu) -> None:
    """Two routers behind each other on one scratch, replayed with other inputs."""
    p = moe_router.Problem(2880, ROUTINGS["gpt-oss"])
    generator = torch.Generator("cuda").manual_seed(4)
    w = [torch.randn(p.rows, p.hidden, generator=generator, device="cuda").bfloat16() / 20 for _ in range(2)]
    x = torch.zeros(16, p.hidden, dtype=torch.bfloat16, device="cuda")
    config = moe_router.default(p, 16, gpu)
    partial, counters = moe_router.scratch(p, config, 16, "cuda")
    launcher = Launcher(moe_router.request(p, config, gpu))
    made = [outputs(p.route, 16, "cuda") for _ in w]

    def both() -> None:
        for matrix, (ids, weights) in zip(w, made, strict=True):
            moe_router.run(launcher, x, matrix, None, None, partial, counters, ids[:-1], weights[:-1])

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for _ in range(20):
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
        graph.replay()
        for matrix, (ids, weights) in zip(w, made, strict=True):
            sure = decided(p.route, (x.double() @ matrix.double().T).float(), None, CLOSE_SUMS)
            found = compare(ids, weights, moe_router.reference(p, x, matrix), sure)
            assert found["wrong"] == 0 and found["error"] < PRODUCT_LIMIT, found
