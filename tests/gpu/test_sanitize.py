"""Every kernel at sizes that compute-sanitizer can follow (tools/sanitize.py): each format and path once, odd
widths, parts of tiles left over. What the results are worth is tested here too, within the bounds of the
other files; a test names the files of kernels/ that it launches, and conftest.py holds it to that."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import (
    attention_decode,
    attention_extend,
    attention_rope_decode,
    gated_delta_chunk,
    gated_delta_decode,
    linear,
    linear_few,
    linear_one,
    logprobs,
    moe_down_one,
    moe_gate_up_one,
    moe_norm_route,
    moe_route,
    quantise_groups,
    sample,
)  # fmt: skip
from firebox.kernels._attention import FP8
from firebox.kernels._attention import Problem as AttentionProblem
from firebox.kernels._attention_cases import Case, attention, make
from firebox.kernels._block_scaled import GROUPS, KINDS
from firebox.kernels._experts import FORMATS, FOUR_BIT, INTEGERS
from firebox.kernels._experts import FP8 as FP8_FORMATS
from firebox.kernels._gated_delta import reference
from firebox.kernels._linear import Problem as LinearProblem
from firebox.kernels.launch import Launcher
from firebox.layers.dense_gpu import FEW, MANY, ONE, Path
from firebox.layers.expert_paths import FEW as FEW_EXPERTS
from firebox.layers.expert_paths import ONE as ONE_EXPERTS
from firebox.layers.expert_paths import SCALED, SORTED, default_path
from firebox.layers.expert_paths import Path as ExpertPath
from tests.gpu import (
    test_attention,
    test_experts,
    test_gated_delta,
    test_linear,
    test_norm_route,
    test_rope_decode,
    test_sample,
)
from tests.support.attention_run import error, run
from tests.support.gated_delta import random_inputs, random_layer
from tests.support.interpreted_route import compare, outputs
from tests.support.route import ROUTINGS, decided
from tests.support.route import random_logits as random_routes
from tests.support.sampling import mixed_parameters, random_logits
from tests.support.small import KERNELS, cases, faults, run_case

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


# ---- experts


def expert_layer(format: str, gpu: Gpu, experts: int = 6, **changes: int) -> test_experts.Layer:
    """Widths of which no usual step is a divisor."""
    unit = 128 if format == "fp8_block" or changes else 64
    p = test_experts.problem(format, hidden=5 * unit, inter=3 * unit, experts=experts, **changes)
    return test_experts.Layer(p, gpu, 80)


@pytest.mark.sanitize("moe_gate_up_few", "moe_down_few", "moe_combine")
@pytest.mark.parametrize("format", FORMATS)
def test_few_tokens_of_experts(format: str, gpu: Gpu) -> None:
    """One token, columns, pairs, and experts that more chose than a tile holds."""
    for experts, all_tokens in ((6, (1, 6, 33)), (32, (9,))):
        layer = expert_layer(format, gpu, experts)
        for tokens in all_tokens:
            path = default_path(layer.problem, FEW_EXPERTS, tokens, gpu)
            assert layer.error(tokens, path) < test_experts.FEW_LIMIT[format], tokens


def sorted_experts(format: str, gpu: Gpu, **changes: int) -> None:
    layer = expert_layer(format, gpu, **changes)
    for block, tokens in ((16, 7), (64, 75)):
        path = default_path(layer.problem, SORTED, block, gpu)
        assert layer.error(tokens, path) < test_experts.SORTED_LIMIT[format], (block, tokens)


@pytest.mark.sanitize("moe_gate_up_one", "moe_down_one")
@pytest.mark.parametrize("format", FORMATS)
def test_one_token_of_experts(format: str, gpu: Gpu) -> None:
    layer = expert_layer(format, gpu)
    tiles = (module.default(layer.problem, 1, gpu) for module in (moe_gate_up_one, moe_down_one))
    assert layer.error(1, ExpertPath(ONE_EXPERTS, *tiles, "test")) < test_experts.FEW_LIMIT[format]


@pytest.mark.sanitize("moe_sort", "moe_gate_up", "moe_down", "moe_combine")
def test_sorted_experts_in_bf16(gpu: Gpu) -> None:
    sorted_experts("bf16", gpu)


@pytest.mark.sanitize("moe_sort", "quantise_fp8", "moe_gate_up", "moe_down", "moe_combine")
@pytest.mark.parametrize("format", FP8_FORMATS)
def test_sorted_experts_in_fp8(format: str, gpu: Gpu) -> None:
    sorted_experts(format, gpu)


@pytest.mark.sanitize("moe_sort", "moe_arrange", "moe_gate_up", "moe_down", "moe_combine")
@pytest.mark.parametrize("format", FOUR_BIT)
def test_sorted_experts_in_4_bits(format: str, gpu: Gpu) -> None:
    sorted_experts(format, gpu)


@pytest.mark.sanitize("moe_sort", "moe_gate_up", "moe_down", "moe_combine")
@pytest.mark.parametrize("format", INTEGERS)
def test_sorted_experts_in_groups_of_128(format: str, gpu: Gpu) -> None:
    sorted_experts(format, gpu, int4_columns=128)


@pytest.mark.sanitize("quantise_groups", "moe_gate_up_scaled", "moe_down_scaled", "moe_combine")
@pytest.mark.parametrize("format", KINDS)
def test_block_scaled_experts(format: str, gpu: Gpu) -> None:
    layer = expert_layer(format, gpu)
    path = default_path(layer.problem, SCALED, 32, gpu)
    assert layer.error(37, path) < test_experts.SCALED_LIMIT[format]


@pytest.mark.sanitize("quantise_groups")
@pytest.mark.parametrize("kind", GROUPS)
def test_rounding_by_groups(kind: str, gpu: Gpu) -> None:
    x = torch.randn(5, 384, device="cuda").bfloat16()
    _, meant = test_experts._rounded(kind, x, gpu)
    p = quantise_groups.Problem(384, kind)
    wanted = quantise_groups.dequantised(p, quantise_groups.reference(p, x))
    assert test_experts.relative_error(meant, wanted) < 2e-2  # a code at a tie here and there


@pytest.mark.sanitize("moe_route")
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str, gpu: Gpu) -> None:
    problem, generator = ROUTINGS[name], torch.Generator("cuda").manual_seed(0)
    logits, bias, gate = random_routes(problem, 5, generator, "cuda")
    ids, weights = outputs(problem, 5, "cuda")
    moe_route.run(Launcher(moe_route.request(problem, gpu)), logits, bias, gate, ids[:-1], weights[:-1])
    wanted = moe_route.reference(problem, logits, bias, gate)
    assert compare(ids, weights, wanted, decided(problem, logits, bias))["wrong"] == 0


@pytest.mark.sanitize("moe_norm_route")
def test_norm_router_and_choice_in_one_launch(gpu: Gpu) -> None:
    for case in moe_norm_route.CASES:
        test_norm_route.check(case, gpu)


# ---- linear layers


def linear_layer(format: str, group: int, gpu: Gpu) -> test_linear.Layer:
    unit = 128 if format == "fp8_block" else max(group, 16)
    problem = LinearProblem(200, -(-400 // unit) * unit, format, group, bias=True, residual=True)
    return test_linear.Layer(problem, gpu, 80)


@pytest.mark.sanitize("linear_one")
@pytest.mark.parametrize("format", linear_one.FORMATS)
def test_one_token_of_a_linear_layer(format: str, gpu: Gpu) -> None:
    """With a norm before it too, and without."""
    layer = linear_layer(format, 0, gpu)
    config = linear_one.default(layer.problem, gpu)
    layer.check(1, Path(ONE, config, "test"))
    alone = LinearProblem(200, layer.problem.columns, format, bias=True)
    test_linear.check_normed(test_linear.Layer(alone, gpu, 1), config)


@pytest.mark.sanitize("attention_rope_decode", "attention_decode")
def test_rotation_and_attention_in_one_launch(gpu: Gpu) -> None:
    """Keys divided and not: the second launch is attention_decode.py's."""
    for case in attention_rope_decode.CASES:
        test_rope_decode.check(case, gpu)


@pytest.mark.sanitize("linear_few")
@pytest.mark.parametrize(("format", "group"), test_linear.KINDS)
def test_few_tokens_of_a_linear_layer(format: str, group: int, gpu: Gpu) -> None:
    layer = linear_layer(format, group, gpu)
    for tokens in (1, 9, 64):
        layer.check(tokens, Path(FEW, linear_few.default(layer.problem, tokens, gpu), "test"))


@pytest.mark.sanitize("linear")
@pytest.mark.parametrize(("format", "group"), [kind for kind in test_linear.KINDS if kind[0] != "bf16"])
def test_many_tokens_of_a_linear_layer(format: str, group: int, gpu: Gpu) -> None:
    layer = linear_layer(format, group, gpu)
    tile = linear.default(layer.problem, 70, gpu)
    for slices in (1, 2):
        layer.check(70, Path(MANY, replace(tile, slices=slices), "test"))


# ---- attention


@pytest.mark.sanitize  # without the backend nobody observes its launches
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize("kernel", [attention_decode, attention_extend])
def test_attention_in_every_case(kernel: ModuleType, kv_dtype: torch.dtype, gpu: Gpu) -> None:
    for number, each in enumerate(kernel.CASES):
        case = each.of(BF16, kv_dtype)
        made = make(case, 0, "cuda")
        found = error(run(kernel, case, gpu, made), attention(case.problem, made))
        assert found < case.tolerance, (number, found)


@pytest.mark.sanitize("attention_decode", "attention_extend")
@pytest.mark.parametrize("layer", test_attention.LAYERS)
def test_attention_through_its_backend(layer: str) -> None:
    """Grouped heads, an FP8 cache, a window with sinks, latents (MLA), a tree of drafts."""
    problem: AttentionProblem = test_attention.LAYERS[layer]
    case = Case(problem, ((1, 150), (33, 40), (2, 9)), window_tokens=20 if problem.window else 0)
    made = make(case, 0, "cuda")
    _, launch = test_attention.planned(made, case)
    assert error(launch(), attention(problem, made)) < case.tolerance


# ---- the small ones


def small(op: str, gpu: Gpu) -> None:
    problems: list[Any] = [problem for _, problem in cases(op, "bf16")]
    for problem in (problems[0], problems[-1]):
        for tokens in (1, 5):
            assert not faults(run_case(op, problem, tokens, "cuda", gpu)), (problem, tokens)


@pytest.mark.sanitize("rms_norm")
def test_rms_norm(gpu: Gpu) -> None:
    small("rms_norm", gpu)


@pytest.mark.sanitize("silu_mul")
def test_silu_mul(gpu: Gpu) -> None:
    small("silu_mul", gpu)


@pytest.mark.sanitize("sigmoid_mul")
def test_sigmoid_mul(gpu: Gpu) -> None:
    small("sigmoid_mul", gpu)


@pytest.mark.sanitize("embed")
def test_embed(gpu: Gpu) -> None:
    small("embed", gpu)


@pytest.mark.sanitize("rope_write")
def test_rope_write(gpu: Gpu) -> None:
    small("rope_write", gpu)


@pytest.mark.sanitize("latent_write")
def test_latent_write(gpu: Gpu) -> None:
    small("latent_write", gpu)


def test_every_small_kernel_has_its_test() -> None:
    assert {f"test_{op}" for op in KERNELS} <= set(globals())


# ---- sampling


@pytest.mark.sanitize("sample")
@pytest.mark.parametrize("filters", [False, True])
def test_sampling(filters: bool, gpu: Gpu) -> None:
    """A vocabulary that is no whole number of chunks."""
    generator, rows = torch.Generator().manual_seed(3), 5
    problem = sample.Problem(5003, bias=filters, filters=filters)
    logits, parameters = random_logits(rows, 5003, generator), mixed_parameters(rows, generator)
    added = torch.randn(rows, 5003, generator=generator) if filters else None
    wanted, sure = test_sample.judged(problem, logits, added, parameters)
    given = None if added is None else added.cuda()
    found = test_sample.Sampler(problem, gpu, rows)(logits.cuda(), test_sample.on("cuda", parameters), given)
    assert torch.equal(found[sure], wanted[sure]) and int(sure.sum()) >= rows - 1


@pytest.mark.sanitize("logprobs")
@pytest.mark.parametrize("top", [0, 5])
def test_logprobs(top: int, gpu: Gpu) -> None:
    generator, problem, rows = torch.Generator("cuda").manual_seed(0), logprobs.Problem(5003, top), 3
    config = logprobs.default(problem, gpu)
    logits = random_logits(rows, 5003, generator, "cuda")
    token_ids = torch.randint(5003, (rows,), generator=generator, device="cuda")
    values = torch.full((rows,), float("nan"), device="cuda")
    ranks = torch.full((rows,), -7, dtype=torch.int32, device="cuda")
    ids = torch.full((rows, top), -7, dtype=torch.int32, device="cuda")
    of_ids = torch.full((rows, top), float("nan"), device="cuda")
    space = logprobs.scratch(problem, config, rows, "cuda")
    launcher = Launcher(logprobs.request(problem, config, gpu))
    logprobs.run(launcher, logits, token_ids, space, values, ranks, ids, of_ids)
    wanted = logprobs.reference(problem, logits, token_ids)
    assert torch.equal(ranks, wanted[1].int()) and torch.equal(ids, wanted[2].int())
    torch.testing.assert_close(values.double(), wanted[0], rtol=0, atol=1e-5)


# ---- the gated delta net


@pytest.mark.sanitize("gated_delta_decode")
def test_gated_delta_decode(gpu: Gpu) -> None:
    p = test_gated_delta.SMALL
    config = gated_delta_decode.default(p, gpu)
    test_gated_delta.check_decode(p, gpu, config, [1, 0, 2, 3, 8, 4, 0], [3, 3, 0, 1, 6, 9, 2])


@pytest.mark.sanitize("gated_delta_chunk")
def test_gated_delta_chunks(gpu: Gpu) -> None:
    p, generator = test_gated_delta.SMALL, torch.Generator("cuda").manual_seed(2)
    lengths, slots = [5, 0, 64, 65], [3, 3, 0, 1]
    layer = random_layer(p, 5, generator, "cuda")
    inputs = random_inputs(p, lengths, slots, generator, "cuda")
    wanted = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    y = test_gated_delta.run_chunks(p, gpu, layer, inputs, gated_delta_chunk.default(p, gpu))
    errors = (test_gated_delta.relative_error(f, w) for f, w in ((y, wanted[0]), (layer.state, wanted[2])))
    assert max(errors) < test_gated_delta.CHUNK_LIMIT
