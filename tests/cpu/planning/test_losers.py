"""What a choice beat, and why: the launch plan, its JSON and the ledger say it of every range of tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from firebox.engine.ledger import launch_rows
from firebox.hardware.base import find_gpu
from firebox.kernels import _linear, _tuned, _veto
from firebox.kernels._experts import Problem
from firebox.kernels.plan import Chosen, Operation, chosen, planned
from firebox.layers import dense_gpu, expert_paths
from firebox.layers.launches import Launch, Layers, rows
from tests.support.planning import planned as fit_of

GB10, H200 = find_gpu("gb10"), find_gpu("h200")
QKV = _linear.Problem(3584, 5120, "fp8_channel", normed=True)
GLM = Problem(5120, 384, 160, 8, "fp8_channel")
NVFP4 = Problem(5120, 384, 160, 8, "nvfp4")
FEW = {"rows": 16, "tokens": 8, "depth": 64}
MANY = {"rows": 64, "tokens": 16, "depth": 64}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test makes of tuned files and vetoes does not outlive it."""
    yield
    _veto.lift()
    _tuned.use()


def filed(monkeypatch: pytest.MonkeyPatch, of_file: dict[str, dict[str, dict[int, Any]]]) -> None:
    """From now on every GPU has these files."""
    _tuned.use()
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": of_file.get(name, {}))
    for cached in (expert_paths.settled_path, dense_gpu._path_of):
        cached.cache_clear()


def of(problem: Any, gpu: Any, source: Any, max_tokens: int = 8192) -> list[Chosen]:
    return chosen(Operation("o", problem.format, source, problem), gpu, max_tokens)


def said(choices: list[Chosen]) -> list[tuple[int, int, str, dict[str, str]]]:
    return [(c.first, c.last, c.path, dict(c.losers)) for c in choices]


def test_by_rule_for_want_of_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    filed(monkeypatch, {})
    rule, library = "rule: few up to 64 tokens, for want of a measurement", "only a measurement chooses it"
    assert said(of(QKV, GB10, dense_gpu)) == [
        (1, 1, "few", {"one": library, "many": rule, "cublas": library}),
        (2, 64, "few", {"one": "takes one token", "many": rule, "cublas": library}),
        (65, 8192, "many", {"one": "takes one token", "few": "takes up to 64 tokens", "cublas": library}),
    ]
    rule, scaled = "rule: few up to 16 tokens, for want of a measurement", "knows no fp8_channel weights"
    one, most = "takes one token", "takes up to 128 tokens"
    assert said(of(GLM, GB10, expert_paths)) == [
        (1, 1, "few", {"one": library, "sorted": rule, "block-scaled": scaled}),
        (2, 16, "few", {"one": one, "sorted": rule, "block-scaled": scaled}),
        (17, 128, "sorted", {"one": one, "few": rule, "block-scaled": scaled}),
        (129, 8192, "sorted", {"one": one, "few": most, "block-scaled": scaled}),
    ]


def test_by_a_tuned_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons do not depend on tiles: entries of one path are one choice."""
    entries = {n: {"path": "few", "gate_up": FEW, "down": FEW, "how": "predicted"} for n in (1, 2, 4)}
    entries |= {n: {"path": "sorted", "gate_up": MANY, "down": MANY} for n in (64, 512)}
    filed(monkeypatch, {"experts": {_tuned.key(GLM): entries}})
    found = of(GLM, GB10, expert_paths)
    few, many, one = "experts.json names few", "experts.json names sorted", "takes one token"
    scaled = "knows no fp8_channel weights"
    assert said(found) == [
        (1, 1, "few", {"one": few, "sorted": few, "block-scaled": scaled}),
        (2, 16, "few", {"one": one, "sorted": few, "block-scaled": scaled}),
        (17, 128, "sorted", {"one": one, "few": many, "block-scaled": scaled}),
        (129, 8192, "sorted", {"one": one, "few": "takes up to 128 tokens", "block-scaled": scaled}),
    ]
    assert [c.why for c in found[1:3]] == ["predicted, weight-only: multiplied as f16", "measured"]


def test_by_a_kernels_own_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    filed(monkeypatch, {})
    (block_scaled,) = {dict(c.losers)["block-scaled"] for c in of(NVFP4, H200, expert_paths)}
    assert block_scaled == "h200 has no mma.nvf4"
    nibbles = expert_paths.stored_as(NVFP4, GB10)
    first = expert_paths._block_scaled.native_from(nibbles, GB10)
    rule = f"rule: few up to 16 tokens, block-scaled from {first}, for want of a measurement"
    *_, before, last = of(nibbles, GB10, expert_paths)
    assert (before.last + 1, dict(before.losers)["block-scaled"]) == (first, rule)
    assert (last.path, dict(last.losers)["sorted"]) == ("block-scaled", rule)
    int4 = _linear.Problem(3584, 5120, "int4_group", group=32)
    for choice in of(int4, GB10, dense_gpu):
        assert dict(choice.losers)["cublas"] == "multiplies no int4_group weights"
        assert dict(choice.losers)["one"].endswith("not int4_group")


def test_a_veto_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    filed(monkeypatch, {})
    before = dense_gpu.path_of(QKV, 8, GB10)
    _veto.veto(dense_gpu.choice_of(QKV, before), "few failed its test")
    (eight,) = (c for c in of(QKV, GB10, dense_gpu, 64) if c.first <= 8 <= c.last)
    assert (eight.path, dict(eight.losers)["few"]) == ("many", "few failed its test")


@pytest.mark.parametrize(
    ("card", "gpu", "tp"),
    [
        ("glm-4.7-fp8", "gb10", 4),
        ("qwen3.5-397b-a17b-nvfp4", "gb10", 4),
        ("gpt-oss-120b", "h200", 1),
        ("qwen3-30b-a3b", "h200", 1),
    ],
)
def test_every_number_of_tokens_has_its_losers(card: str, gpu: str, tp: int) -> None:
    """Without gaps, the winner not among them, each with a reason; a few lines an operation."""
    found = fit_of(card, gpu, tp)
    by_operation: dict[tuple[Layers, Operation], list[Chosen]] = {}
    for layers, choice in found.choices:
        by_operation.setdefault((layers, choice.operation), []).append(choice)
    names = {operation.name for _, operation in by_operation}
    assert names >= {"qkv", "o", "experts", "head", "rope_attention", "norm_route"}
    for choices in by_operation.values():
        assert (choices[0].first, choices[-1].last) == (1, found.max_tokens)
        assert all(a.last + 1 == b.first for a, b in itertools.pairwise(choices)) and len(choices) < 9
        for choice in choices:
            losers = dict(choice.losers)
            assert choice.path not in losers and all(losers.values())
    for _, row in rows(found.layers, found.gpu, found.max_tokens):
        if row.operation.source in (dense_gpu, expert_paths) and type(row.operation) is Operation:
            assert len(row.losers) == 3 and row.path not in dict(row.losers)


def test_one_launch_for_two_has_its_reason() -> None:
    """On an H200 gpt-oss's norm, router and choice are one launch for one token."""
    found = fit_of("gpt-oss-120b", "h200", 1)
    routes = [c for _, c in found.choices if c.operation.name == "norm_route"]
    assert said(routes) == [
        (1, 1, "one", {"apart": "was measured to be slower"}),
        (2, 8192, "apart", {"one": "takes one token"}),
    ]


def test_a_row_that_two_choices_share_says_from_where_a_reason_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are rounded the same for linear.py and for a library."""
    line = dataclasses.replace(QKV, normed=False)
    entries = {100: {"path": "many", "config": {}}, 1000: {"path": "cublas"}}
    filed(monkeypatch, {"linear": {dense_gpu.key(line): entries}})
    (row,) = (
        row
        for row in planned(Operation("o", line.format, dense_gpu, line), H200, 8192)
        if row.op == "quantise_fp8"
    )
    assert (row.first, row.last, row.path) == (1, 8192, "many")
    assert dict(row.losers) == {
        "one": "linear.json names many; from 2 tokens: takes one token",
        "few": "linear.json names many; from 65 tokens: takes up to 64 tokens",
        "cublas": "linear.json names many; from 317 tokens: taken",
    }


def test_the_ledger_and_the_document_have_them() -> None:
    found = fit_of("glm-4.7-fp8", "gb10", 4)
    launches = [Launch(layers, row, None, 0) for layers, row in rows(found.layers, found.gpu, 64)]
    experts = [launch for launch in launches if launch.planned.op == "moe_gate_up"]
    for launch in experts:
        reasons = launch.document()["losers"]
        assert reasons == dict(launch.planned.losers)
        assert reasons["block-scaled"] == "knows no fp8_channel weights"
    written = {row.tokens[0]: row.losers for row in launch_rows(experts, 64)}
    assert written == {launch.planned.first: dict(launch.planned.losers) for launch in experts}


# ---- weights that are stored narrower than they are multiplied


@pytest.mark.parametrize(
    ("card", "gpu", "path", "operation", "weight_only"),
    [
        ("glm-4.7-fp8", "gb10", "few", "qkv", True),
        ("glm-4.7-fp8", "gb10", "many", "qkv", False),
        ("glm-4.7-fp8", "gb10", "few", "experts", True),
        ("glm-4.7-fp8", "gb10", "sorted", "experts", False),
        ("glm-4.7-fp8", "gb10", "few", "router", False),
        ("glm-4.7-nvfp4", "gb10", "block-scaled", "experts", False),
        ("glm-4.7-nvfp4", "gb10", "sorted", "experts", True),
        ("kimi-k2.5-int4", "rtx-pro-6000", "few", "experts", True),
        ("kimi-k2.5-int4", "rtx-pro-6000", "sorted", "experts", True),
    ],
)
def test_weight_only_is_said(card: str, gpu: str, path: str, operation: str, weight_only: bool) -> None:
    """Of the launches that multiply weights, and of the choice."""
    found = fit_of(card, gpu, 4)
    made = [
        Launch(layers, row, None, 0)
        for layers, row in rows(found.layers, found.gpu, 8192)
        if row.operation.name == operation and row.path == path
    ]
    products = [launch for launch in made if launch.planned.request and launch.planned.request.declares]
    assert products and {launch.weight_only for launch in products} == {weight_only}
    assert {launch.document()["weight_only"] for launch in products} == {weight_only}
    assert not any(launch.weight_only for launch in made if launch not in products)
    assert {"weight-only" in launch.planned.why for launch in products} == {weight_only}


def test_dense_4_bit_weights_are_weight_only_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    filed(monkeypatch, {})
    int4 = _linear.Problem(3584, 5120, "int4_group", group=32)
    found = of(int4, GB10, dense_gpu)
    assert {c.path for c in found} == {"few", "many"}
    assert {c.why for c in found} == {"default, weight-only: multiplied as bf16"}
