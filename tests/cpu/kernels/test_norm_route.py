"""kernels/moe_norm_route.py without a GPU: under Triton's interpreter against norm and routing by formula,
and in a layer; and compiled for GPUs that are not here. On a GPU: tests/gpu/test_norm_route.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels import _linear, _tuned, _veto, moe_route
from firebox.kernels import moe_norm_route as kernel
from firebox.kernels._rows import Outputs
from firebox.layers import dense_gpu, norm_gpu, route_gpu
from firebox.layers._in_one import ONE
from tests.support.interpreter import check_launches, interpreted
from tests.support.norm_route import MODELS, Found
from tests.support.small import Difference

H200 = find_gpu("h200")
SMALL = kernel.of_sizes(256, 32, 4, "softmax")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted("interpreted_norm_route")


def test_equals_the_formula(found: dict[str, Any]) -> None:
    """Twice in the same memory: the second run begins with the counter that the first one left."""
    assert len(found["cases"]) == 2 * len(kernel.CASES)
    for name, (rows, *others) in found["cases"].items():
        case = Found(Difference(*rows), *others)
        assert case.right, (name, case)


def test_a_layer_takes_one_launch_where_it_was_measured(found: dict[str, Any]) -> None:
    layer = found["layer"]
    three, experts = ["normalise_rows", "linear_rows", "route"], ["gate_up_few", "down_few"]
    assert layer["three"] == layer["two tokens"] == three + experts
    assert layer["one"] == ["norm_route", *experts]
    assert layer["error"] < 1e-3 and layer["again"]


def test_a_trial_finds_what_is_wrong_and_three_launches_stand_in(found: dict[str, Any]) -> None:
    layer = found["layer"]
    assert [passed for _, _, passed in layer["trial"]] == [True, True] and layer["of two"] == []
    assert [passed for _, _, passed in layer["wrong"]] == [True, False]
    assert layer["wrong"][1][1] == pytest.approx(0.1, abs=1e-3)
    assert layer["vetoed"] == layer["three"]


def test_every_launch_fits_without_spills() -> None:
    launches = {}
    for gpu in (find_gpu("gb10"), H200):
        for name, problem in MODELS.items():
            assert kernel.accepts(problem, gpu) is None
            config = kernel.default(problem, gpu)
            assert config in set(kernel.search_space(problem, gpu)), (name, config)
            assert 32 <= -(-problem.route.experts // config.rows) <= 128, (name, config)
            launches[f"{gpu.name} {name}"] = kernel.request(problem, config, gpu)
    check_launches(launches, spill_bytes=0)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (replace(SMALL, norm=replace(SMALL.norm, delta=True)), "residual branch"),
        (replace(SMALL, norm=replace(SMALL.norm, outputs=Outputs(fp8=True))), "rows alone"),
        (kernel.of_sizes(256, 32, 4, "softmax", shared=1, shared_gate=True), "gate"),
        (kernel.of_sizes(32_768, 32, 4, "softmax"), "16384"),
        (kernel.of_sizes(256, 2048, 4, "softmax"), "1,024"),
    ],
)
def test_what_it_cannot_do_it_says(problem: kernel.Problem, said: str) -> None:
    reason = kernel.accepts(problem, H200)
    assert reason is not None and said in reason, reason
    assert kernel.accepts(SMALL, H200) is None


# ---- which steps take it


def of_layer(problem: kernel.Problem) -> route_gpu.Problem:
    route = problem.route
    router = _linear.Problem(route.experts, problem.norm.width, "bf16", bias=problem.bias, out_dtype="f32")
    return route_gpu.Problem(norm_gpu.Problem(problem.norm, (router,)), problem)


GPT_OSS = of_layer(MODELS["gpt-oss"])


def test_only_one_token_and_only_where_it_was_measured() -> None:
    assert route_gpu.config_of(GPT_OSS, H200, 1) is not None
    kimi = of_layer(MODELS["kimi-k2"])
    for problem, gpu_name, tokens in ((GPT_OSS, "h200", 2), (GPT_OSS, "gb10", 1), (kimi, "h200", 1)):
        gpu = find_gpu(gpu_name)
        made = route_gpu.made(problem, tokens, gpu)
        assert route_gpu.config_of(problem, gpu, tokens) is None
        assert made.compiles == () and made.why == "not measured to be faster"


def test_every_entry_is_of_a_router_that_was_measured() -> None:
    """And a tile that is tried there."""
    problems = {route_gpu.key(of_layer(problem)): problem for problem in MODELS.values()}
    assert len(problems) == len(MODELS), "keys tell routers apart"
    for key, entries in _tuned._file(H200.name, route_gpu.TUNED_FILE).items():
        assert set(entries) == {1} and key in problems, key
        tile = kernel.Config(**entries[1]["config"]) if entries[1]["path"] == ONE else None
        assert tile is None or tile in set(kernel.search_space(problems[key], H200)), tile


def test_keys_tell_routers_apart() -> None:
    base = moe_route.Problem(256, 8, "sigmoid")
    others = (
        replace(base, top_k=4), replace(base, scoring="softmax"), replace(base, shared=1),
        replace(base, expert_groups=8, kept_groups=4), replace(base, expert_groups=4, kept_groups=2),
    )  # fmt: skip
    routers = [replace(SMALL, route=route) for route in (base, *others)]
    routers += [replace(SMALL, bias=True), replace(SMALL, norm=replace(SMALL.norm, dtype="f16")), SMALL]
    assert len({route_gpu.key(of_layer(router)) for router in routers}) == len(routers)


def test_not_where_a_reader_takes_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a router that multiplies FP8, as none does, the norm has more to write."""
    reader = _linear.Problem(128, 2880, "fp8_channel", normed=True)
    problem = replace(GPT_OSS, norm=replace(GPT_OSS.norm, linears=(reader,)))
    assert route_gpu.config_of(problem, H200, 1) is not None, "one token reads rows"
    monkeypatch.setattr(dense_gpu, "rounds_at", lambda problem, tokens, gpu: True)
    try:
        _tuned.use()  # forgets what was looked up
        assert route_gpu.config_of(problem, H200, 1) is None
    finally:
        monkeypatch.undo()
        _tuned.use()
    assert route_gpu.config_of(problem, H200, 1) is not None


def test_a_tile_with_wrong_results_leaves_the_step_to_three_launches() -> None:
    config = route_gpu.config_of(GPT_OSS, H200, 1)
    assert config is not None and len(route_gpu.made(GPT_OSS, 1, H200).compiles) == 1
    try:
        _veto.veto(route_gpu.choice_of(GPT_OSS, config), "a tile that was off")
        assert route_gpu.config_of(GPT_OSS, H200, 1) is None
        made = route_gpu.made(GPT_OSS, 1, H200)
        assert made.compiles == () and "a tile that was off" in made.why
    finally:
        _veto.lift()
    assert route_gpu.config_of(GPT_OSS, H200, 1) == config
