"""Norm, router and choice of one token in one launch, on a GPU: every case, every tile at sizes of models,
the same as the three launches in whose place it stands, and many in a row."""

from __future__ import annotations

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _linear, linear_few, moe_route, rms_norm
from firebox.kernels import moe_norm_route as kernel
from firebox.kernels.compile import compile_all
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_norm_route import Config, Problem
from firebox.layers import dense_gpu
from tests.support.norm_route import MODELS, WEIGHT_LIMIT, compare, in_type, of_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need an NVIDIA GPU"
    return found


def check(problem: Problem, gpu: Gpu, seed: int = 0, config: Config | None = None) -> None:
    found = compare(problem, gpu, seed, "cuda", config)
    assert found.rows.explained, (config, found)
    assert found.wrong == 0 and found.weights < WEIGHT_LIMIT and found.counter == 0, (config, found)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("number", range(len(kernel.CASES)))
def test_equals_the_formula(gpu: Gpu, number: int, dtype: str) -> None:
    problem = in_type(kernel.CASES[number], dtype)
    for seed in (0, 1):
        check(problem, gpu, seed)
    for config in (Config(1, 2), Config(8, 4), Config(16, 8)):  # rows behind the last expert too
        check(problem, gpu, 2, config)


@pytest.mark.parametrize("name", MODELS)
def test_every_tile_that_a_sweep_tries(gpu: Gpu, name: str) -> None:
    problem = MODELS[name]
    tiles = list(kernel.search_space(problem, gpu))
    compiled = compile_all([kernel.request(problem, tile, gpu) for tile in tiles])
    fitting = [tile for tile, made in zip(tiles, compiled, strict=True) if made.fits]
    assert len(fitting) > len(tiles) // 2
    for config in fitting:
        check(problem, gpu, 3, config)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_three_launches(gpu: Gpu, name: str) -> None:
    """Rows may differ where the order of the norm's sum does, and weights where rows do."""
    p = MODELS[name]
    made = of_inputs(p, 5, "cuda")
    router = _linear.Problem(p.route.experts, p.norm.width, "bf16", bias=p.bias, out_dtype="f32")
    path = dense_gpu.Path(dense_gpu.FEW, linear_few.default(router, 1, gpu), "test")
    space = dense_gpu.Workspace([], 1, gpu, "cuda")
    space.hold(*dense_gpu.scratch(router, 1, path))
    layer = dense_gpu.LinearKernels(router, made["router"], gpu, space, {1: path})
    rows, logits = torch.empty_like(made["x"]), torch.empty(1, p.route.experts, device="cuda")
    ids = torch.empty(1, p.route.choices, dtype=torch.int32, device="cuda")
    weights = torch.empty(1, p.route.choices, device="cuda")
    rms_norm.run(Launcher(rms_norm.request(p.norm, gpu)), made["x"], made["gain"], out=rows)
    layer(rows, logits)
    correction = made["correction_bias"]
    moe_route.run(Launcher(moe_route.request(p.route, gpu)), logits, correction, None, ids, weights)
    one_rows, one_ids, one_weights = (torch.empty_like(tensor) for tensor in (rows, ids, weights))
    kernel.run(
        Launcher(kernel.request(p, kernel.default(p, gpu), gpu)), p, **made, logits=logits.flatten(),
        counter=torch.zeros(1, dtype=torch.int32, device="cuda"), out=one_rows, expert_ids=one_ids,
        routing_weights=one_weights,
    )  # fmt: skip
    assert torch.equal(one_ids, ids)
    assert (one_rows != rows).float().mean() < 2e-3
    torch.testing.assert_close(one_weights, weights, rtol=1e-2, atol=0)


def test_many_launches_in_a_row_count_right(gpu: Gpu) -> None:
    """As in a captured step, where each begins before the last one has ended."""
    p, steps = MODELS["kimi-k2"], 200
    launcher = Launcher(kernel.request(p, kernel.default(p, gpu), gpu))
    made = [of_inputs(p, seed, "cuda") for seed in range(3)]
    logits = torch.full((p.route.experts,), torch.nan, device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    outs = torch.full((steps, 1, p.norm.width), torch.nan, device="cuda").bfloat16()
    ids = torch.full((steps, 1, 16), -7, dtype=torch.int32, device="cuda")  # 16: rows stay aligned
    weights = torch.full((steps, 1, 16), torch.nan, device="cuda")
    torch.cuda.synchronize()
    for step in range(steps):
        kernel.run(
            launcher, p, **made[step % 3], logits=logits, counter=counter, out=outs[step],
            expert_ids=ids[step], routing_weights=weights[step],
        )  # fmt: skip
    torch.cuda.synchronize()
    assert int(counter) == 0
    for seed in range(3):
        wanted = kernel.reference(p, **made[seed])[1]
        assert (ids[seed::3, 0, : p.route.choices] == wanted).all()
        assert (outs[seed::3] == outs[seed]).all()
        assert (weights[seed::3, 0, : p.route.choices] == weights[seed, 0, : p.route.choices]).all()
