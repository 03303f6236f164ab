"""Which launches a model can make: every number of tokens is covered, by the requests that the layers
themselves would make; and what no kernel runs is refused with its reason."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firebox.attention import triton_paged
from firebox.formats import fp8_block, int4_group
from firebox.hardware.base import find_gpu
from firebox.kernels import (
    _attention,
    _linear,
    _tuned,
    attention_decode,
    attention_extend,
    gated_delta_decode,
    moe_down_few,
    moe_gate_up_few,
    moe_route,
    sample,
)
from firebox.kernels._experts import Problem
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.kernels.plan import Operation, Planned, Setting, planned
from firebox.layers import dense_gpu, expert_paths, moe_gpu
from firebox.layers.expert_paths import FEW_UNMEASURED, path_of, requests
from firebox.layers.experts import Workspace
from firebox.layers.launches import Layers, layers_of, rows, workspace_bytes
from firebox.planning._parts import open_source
from tests.support.gated_delta import QWEN_TP4
from tests.support.planning import FP8_BLOCK, opened, source_of

GB10, L40S = find_gpu("gb10"), find_gpu("l40s")
INTEGERS = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = INTEGERS | {"quant_method": "gptq"}
OSS = Problem(2880, 2880, 32, 4, "mxfp4", "clamped_swiglu", 7.0, 1.702, True, "bf16", residual=True)
GLM = Problem(5120, 384, 161, 9, "fp8_channel", residual=True, shared=1)
FP8 = _linear.Problem(3584, 5120, "fp8_channel")
BF16 = _linear.Problem(160, 5120, "bf16", out_dtype="f32")
GQA = _attention.Problem(24, 2, 128, 128, 64)
TOKENS = (*range(1, 70), 127, 128, 129, 511, 512, 1143, 1144, 1145, 1279, 1280, 4096, 8191, 8192)


def operation(problem: Problem) -> Operation:
    return Operation("experts", problem.format, expert_paths, problem)


def model_layers(card: str, tp: int = 1, gpu: str = "gb10", **changes: Any) -> dict[str, Layers]:
    """The first of each kind."""
    found = open_source(source_of(card, **changes), find_gpu(gpu)) if changes else opened(card)
    kinds: dict[str, Layers] = {}
    for layers in layers_of(found.model, Setting(find_gpu(gpu), tp)):
        kinds.setdefault(layers.op, layers)
    return kinds


def moe(card: str, tp: int = 1, gpu: str = "gb10", **changes: Any) -> Layers:
    return model_layers(card, tp, gpu, **changes)["moe_block"]


@pytest.mark.parametrize("problem", [OSS, GLM], ids=lambda p: p.format)
def test_every_number_of_tokens_has_its_experts(problem: Problem) -> None:
    rows = planned(operation(problem), GB10, 8192)
    for tokens in TOKENS:
        here = {row.op: row.request for row in rows if row.first <= tokens <= row.last}
        assert here == requests(problem, tokens, path_of(problem, tokens, GB10), GB10), tokens
    assert max(row.last for row in rows) == 8192 and min(row.first for row in rows) == 1


@pytest.mark.parametrize("problem", [FP8, BF16], ids=lambda p: p.format)
def test_every_number_of_tokens_has_its_product(problem: _linear.Problem) -> None:
    rows = planned(Operation("qkv", problem.format, dense_gpu, problem), GB10, 8192)
    for tokens in TOKENS:
        here = [row for row in rows if row.first <= tokens <= row.last]
        ours = {row.op: row.request for row in here if row.request is not None}
        assert ours == dense_gpu.requests(problem, tokens, GB10), tokens
        assert [row.path for row in here if row.request is None] == ([] if ours else ["cublas"])


def test_every_division_of_a_step_among_requests_has_its_attention() -> None:
    """A step of n tokens may hold requests of 1 to 16 queries, keys divided or not, and longer ones."""
    rows = planned(Operation("attention", "bf16", triton_paged, GQA), GB10, 8192)
    for tokens in (1, 2, 3, 15, 16, 17, 300, 8192):
        here = [row.request for row in rows if row.first <= tokens <= row.last]
        expected = []
        for queries in range(1, min(tokens, 16) + 1):
            config = attention_decode.default(GQA, GB10, queries)
            for split in (False, True):
                expected += attention_decode.requests(GQA, config, GB10, split=split)
        if tokens > 16:
            expected += attention_extend.requests(GQA, attention_extend.default(GQA, GB10), GB10)
        assert all(request in here for request in expected), tokens
        assert all(request in expected for request in here), tokens


@pytest.fixture
def untuned(tmp_path: Path) -> Iterator[None]:
    """What runs without tuned files."""
    _tuned.use(tmp_path)
    yield
    _tuned.use()


@pytest.mark.parametrize("problem", [OSS, GLM], ids=lambda p: p.format)
def test_neighbours_that_share_a_compile_are_one_row(problem: Problem, untuned: None) -> None:
    rows = planned(operation(problem), GB10, 8192)
    for before in rows:
        for after in rows:
            if before.op == after.op and before.last + 1 == after.first:
                assert before.request != after.request, (before.op, before.last)
    kept = [row for row in rows if row.op == "moe_combine"]
    few = (moe_down_few.APART_FROM, FEW_UNMEASURED)  # which also sets counters back
    assert [(row.first, row.last) for row in kept] == [few, (FEW_UNMEASURED + 1, 8192)]


def test_kernels_compile_for_sm_89(untuned: None) -> None:
    """GPUs of 99 KiB without block-scaled instructions, TMA or dependent launches: experts and dense layers
    in FP8 and four bits, each with the instruction that its path is for, and one of each small kernel."""
    experts = {format: dataclasses.replace(GLM, format=format) for format in ("fp8_channel", "int4_group")}
    wanted: dict[tuple[str, str, int], CompileRequest] = {}
    for format, tokens in (("fp8_channel", 4), ("fp8_channel", 500), ("int4_group", 4), ("int4_group", 500)):
        p = expert_paths.stored_as(experts[format], L40S)
        made = requests(p, tokens, path_of(p, tokens, L40S), L40S)
        wanted["moe_gate_up", format, tokens] = made["moe_gate_up"]
    for tokens in (4, 500):
        wanted["linear", "fp8_channel", tokens] = dense_gpu.requests(FP8, tokens, L40S)["linear"]
    vocab = sample.Problem(151_552)
    route = moe_route.Problem(160, 8, "sigmoid", True, 2.5)
    wanted["route", "f32", 1] = moe_route.request(route, L40S)
    wanted["sample", "f32", 1] = sample.request(vocab, sample.default(vocab, L40S), L40S)
    tile = gated_delta_decode.default(QWEN_TP4, L40S)
    wanted["delta", "bf16", 1] = gated_delta_decode.request(QWEN_TP4, tile, L40S)
    found = dict(zip(wanted, compile_all(list(wanted.values())), strict=True))
    for name, compiled in found.items():
        assert compiled.fits and compiled.native, (name, compiled.error, compiled.instructions)
        assert compiled.shared_bytes <= 101_376 and compiled.spill_bytes <= 64, name
    products = {name: compiled.instruction for name, compiled in found.items() if name[1] != "f32"}
    assert products.pop(("delta", "bf16", 1)) == "none"
    for (_, format, tokens), instruction in products.items():
        few = "mma.f16" if format == "fp8_channel" else "mma.bf16"
        many = "mma.fp8" if format == "fp8_channel" else "mma.bf16"
        assert instruction == (few if tokens == 4 else many), (format, tokens)


FEW_TILE = {"rows": 16, "tokens": 8, "depth": 128, "warps": 1, "stages": 3, "tma": False}
SORTED_TILE = {"rows": 256, "tokens": 32, "depth": 128, "warps": 4, "stages": 3, "tma": False}


def measured(monkeypatch: pytest.MonkeyPatch, paths: dict[int, str]) -> list[Planned]:
    """What GLM launches for up to 8 tokens if these paths, by the number of tokens, were measured."""
    tiles = {"few": FEW_TILE, "sorted": SORTED_TILE}
    entries = {n: {"path": p, "gate_up": tiles[p], "down": tiles[p]} for n, p in paths.items()}
    monkeypatch.setattr(_tuned, "_file", lambda *name: {_tuned.key(GLM): entries})
    expert_paths.settled_path.cache_clear()
    try:
        return planned(operation(GLM), GB10, 8)
    finally:
        expert_paths.settled_path.cache_clear()


def test_measured_paths_are_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest measured number by ratio: 3 and 5 take 4's. What is computed alike before and after is two
    rows."""
    found = measured(monkeypatch, {2: "few", 4: "sorted", 8: "few"})
    rows = [row for row in found if row.op == "moe_down"]
    assert [(row.first, row.last, row.path) for row in rows] == [
        (1, 1, "few"),
        (2, 2, "few"),
        (3, 5, "sorted"),
        (6, 8, "few"),
    ]
    few = "measured, weight-only: multiplied as f16"
    assert [row.why for row in rows] == [few, few, "measured", few] and rows[1].request == rows[3].request
    assert rows[2].config["rows"] == 256


def test_a_launch_that_is_not_made_in_between_is_not_listed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {2: "sorted", 4: "few", 8: "sorted"})
    rows = [(row.first, row.last) for row in found if row.op == "moe_combine"]
    assert rows == [(1, 2), (6, 8)]


@pytest.mark.parametrize(
    ("card", "tp", "expected"),
    [
        ("gpt-oss-20b", 1, dataclasses.replace(OSS, format="mxfp4_nibbles")),
        ("glm-4.7-fp8", 4, dataclasses.replace(GLM, normed=True)),
        ("kimi-k2.5-int4", 8, Problem(7168, 256, 384, 8, "int4_group", residual=True, panels=True)),
        ("qwen3.5-397b-a17b-nvfp4", 4, Problem(4096, 256, 512, 10, "nvfp4_nibbles", residual=True)),
        ("qwen3-30b-a3b", 1, Problem(2048, 768, 128, 8, "bf16", residual=True)),
    ],
)
def test_the_experts_problem_is_the_models(card: str, tp: int, expected: Problem) -> None:
    """A shared expert in the routed ones' format is one more."""
    found = moe(card, tp)
    (routed,) = [o.problem for o in found.operations if o.name == "experts"]
    assert (routed, found.refusal) == (expected, None)


def test_one_tokens_experts_let_the_next_launch_begin_late() -> None:
    """Not where the second half loads its whole tile before it waits (Kimi-K2.5 at tp 8, measured)."""
    h200 = find_gpu("h200")
    kimi = Problem(7168, 256, 384, 8, "int4_group", residual=True, panels=True)
    whole = moe_down_few.Config(64, 8, depth=0, warps=2, stages=1)
    tiles = (moe_gate_up_few.default(kimi, 1, h200), whole)

    def few(tokens: int) -> expert_paths.Path:
        halves = (moe_gate_up_few, moe_down_few)
        return expert_paths.Path("few", *(half.default(GLM, tokens, h200) for half in halves), "test")

    for problem, tokens, path, late in (
        (GLM, 1, few(1), True),
        (GLM, 2, few(2), False),
        (kimi, 1, expert_paths.Path("few", *tiles, "test"), False),
    ):
        found = requests(problem, tokens, path, h200)
        halves = (found["moe_gate_up"], found["moe_down"])
        assert [request.constexprs["LATE"] for request in halves] == [late, late], (problem, tokens)


def test_a_quarter_of_glm() -> None:
    """96 query heads, 8 key heads of 128; dense layers of 12,288; 151,552 tokens."""
    kinds = model_layers("glm-4.7-fp8", 4)
    found = {(kind, o.name): o.problem for kind, layers in kinds.items() for o in layers.operations}
    L = _linear.Problem
    assert found["attention_block", "qkv"] == L(28 * 128, 5120, "fp8_channel", bias=True, normed=True)
    assert found["attention_block", "o"] == L(5120, 24 * 128, "fp8_channel", residual=True)
    assert found["attention_block", "attention"] == GQA
    assert found["dense_block", "gate_up"] == L(2 * 3072, 5120, "fp8_channel", normed=True)
    assert found["dense_block", "down"] == L(5120, 3072, "fp8_channel", residual=True)
    assert found["dense_block", "silu_mul"].inter == 3072
    assert found["moe_block", "router"] == BF16
    assert found["head", "head"] == L(37_888, 5120, "bf16", out_dtype="f32")
    assert found["sampling", "sample"] == 151_552, "one rank draws from all of them"
    assert [kinds[kind].layers for kind in ("attention_block", "dense_block", "moe_block")] == [92, 3, 89]


def test_a_shared_expert_in_another_format_is_computed_apart() -> None:
    names = [o.name for o in moe("kimi-k2.5-int4", 8).operations]
    assert names == [
        *("norm_route", "norm", "router", "route"),
        *("shared_gate_up", "shared_silu_mul", "shared_down", "experts"),
    ]


def test_windows_and_sinks_are_problems_of_their_own() -> None:
    found = [
        o.problem
        for layers in layers_of(opened("gpt-oss-20b").model, Setting(GB10, kv_dtype=torch.float8_e4m3fn))
        for o in layers.operations
        if o.name == "attention"
    ]
    assert [(p.window, p.sinks, p.kv_dtype) for p in found] == [
        (True, torch.bfloat16, torch.float8_e4m3fn),
        (False, torch.bfloat16, torch.float8_e4m3fn),
    ]


def test_alike_operations_are_planned_once() -> None:
    """The norms of attention and MoE layers of few tokens are one compile, and a row each."""
    layers = layers_of(opened("glm-4.7-fp8").model, Setting(GB10, 4))
    norms = [(alike.op, row) for alike, row in rows(layers, GB10, 4) if row.op == "rms_norm"]
    assert [op for op, _ in norms] == ["attention_block", "dense_block", "moe_block", "head"]
    assert all(row.request == norms[0][1].request for _, row in norms)


def test_a_norm_writes_codes_where_its_readers_multiply_them() -> None:
    """bf16 for a router at any number of tokens; qkv of many tokens reads codes alone. With experts divided,
    tokens of other GPUs come without codes."""

    def outputs(**setting: int) -> dict[tuple[str, bool], set[tuple[bool, bool]]]:
        layers = layers_of(opened("glm-4.7-fp8").model, Setting(GB10, 4, **setting))
        found: dict[tuple[str, bool], set[tuple[bool, bool]]] = {}
        for alike, row in rows(layers, GB10, 600):
            if row.op == "rms_norm":
                missing = {name for name, value in row.request.constexprs.items() if value is None}
                written = ("out" not in missing, "q" not in missing)
                found.setdefault((alike.op, row.last > 64), set()).add(written)
            assert row.op != "quantise_fp8" or row.operation.name not in ("qkv", "gate_up")
        return found

    plain, both, codes = (True, False), (True, True), (False, True)
    found = outputs()
    assert found["attention_block", False] == {plain} and found["attention_block", True] == {codes}
    assert found["dense_block", True] == {codes} and both in found["moe_block", True]
    assert found["head", True] == {plain}
    assert outputs(ep=4)["moe_block", True] == {plain}


@pytest.mark.parametrize(("card", "tp"), [("glm-4.7-fp8", 4), ("gpt-oss-120b", 1), ("qwen3-30b-a3b", 1)])
def test_gb10_has_a_tile_for_every_launch_that_is_tuned(card: str, tp: int) -> None:
    """Measured or predicted: `fit --strict` has nothing to refuse for want of one."""
    layers = layers_of(opened(card).model, Setting(GB10, tp))
    planned = [row for _, row in rows(layers, GB10, 4096)]
    assert {row.untuned(GB10) for row in planned} == {None}
    assert {row.why.partition(",")[0] for row in planned if row.operation.name == "qkv"} == {"predicted"}


def test_all_expert_layers_are_counted() -> None:
    """46 layers, the first dense; the MTP layer runs in no step."""
    assert moe("glm-4.5-air-fp8").layers == 45


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (lambda: moe("firebox-tiny"), "hidden states are float32; kernels know bfloat16 and float16"),
        (lambda: moe("qwen3-30b-a3b", hidden_size=2064), "has no tile for 2064 columns in bf16"),
        (lambda: moe("glm-4.7-fp8", gpu="a100"), "has no FP8 type on a100"),
        (lambda: moe("qwen3-30b-a3b", quantization_config=INTEGERS | {"group_size": 256}), "not 256"),
        (lambda: moe("qwen3-30b-a3b", quantization_config=GPTQ | {"desc_act": True}), "(desc_act)"),
        (lambda: moe("qwen3-30b-a3b", quantization_config=GPTQ | {"group_size": -1}), "one scale a row"),
        (
            lambda: moe("qwen3-30b-a3b", quantization_config=FP8_BLOCK | {"weight_block_size": [64, 64]}),
            "blocks are 64 × 64; kernels know 128 × 128",
        ),
    ],
)
def test_what_no_kernel_runs_is_refused(found: Any, sentence: str) -> None:
    layers = found()
    assert layers.operations == () and sentence in layers.refusal


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("section", ["awq", "gptq"])
def test_integers_with_zero_points_are_planned(section: str, group: int) -> None:
    config = {"awq": INTEGERS, "gptq": GPTQ}[section] | {"group_size": group}
    found = moe("qwen3-30b-a3b", quantization_config=config)
    (routed,) = [o for o in found.operations if o.name == "experts"]
    assert routed.format == section
    expected = Problem(2048, 768, 128, 8, "int4_zero", residual=True, int4_columns=group, panels=True)
    assert routed.problem == expected
    arranged = {row.op for row in planned(routed, GB10, 512)} >= {"moe_arrange"}
    assert arranged == (group == 32), "groups of 64 and 128 are read as they stand"


def test_int4_of_other_groups_is_refused() -> None:
    p = dataclasses.replace(
        next(b for _, b in opened("qwen3-30b-a3b").model.blocks).problem, dtype=torch.bfloat16
    )
    refusal = moe_gpu.refusal(GB10, p, {int4_group.Format(16)})
    assert refusal == "knows groups of 32, 64, 128 columns, not 16"
    assert moe_gpu.refusal(GB10, p, {int4_group.Format(32, symmetric=False)}) is None
    assert moe_gpu.refusal(GB10, p, {int4_group.Format(32)}) is None
    both = moe_gpu.refusal(GB10, p, {int4_group.Format(32), fp8_block.Format()})
    assert both == "the matrices of an expert are in different formats"


def test_the_workspace_is_the_layers_own() -> None:
    """Against real memory, at a small size: one for all linear layers, as large as the largest needs, and one
    for each kind of experts."""
    small, line = Problem(256, 128, 16, 4, "fp8_channel"), _linear.Problem(512, 256, "fp8_channel")

    def real(value: Any) -> int:
        sizes = collections.Counter[str]()
        for name, part in vars(value).items():
            parts = [part] if isinstance(part, torch.Tensor) else list(vars(part).values()) if part else []
            sizes[name] = sum(one.numel() * one.element_size() for one in parts)
        return sizes.total()

    routed, linears = real(Workspace(small, 100, "cpu")), real(dense_gpu.Workspace([line], 100, GB10, "cpu"))
    assert routed > 100 * 4 * (128 + 2 * 256) and linears > 100 * 256
    product = Operation("qkv", "fp8_channel", dense_gpu, line)
    one = Layers("moe_block", 3, "fp8_channel", (product, operation(small), product))
    no = Layers("moe_block", 1, "awq", refusal="no")
    assert workspace_bytes([one], GB10, 100) == workspace_bytes([one, one, no], GB10, 100) == routed + linears
