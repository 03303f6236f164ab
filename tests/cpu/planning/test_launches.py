"""Which launches the experts of a model can make: every number of tokens is covered, by the requests that the
layer itself would make; and what no kernel runs is refused with its reason."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from firebox.formats import fp8_block, int4_group
from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned
from firebox.kernels._experts import Problem
from firebox.layers.experts import Workspace, path_of, requests
from firebox.planning._parts import open_source
from firebox.planning.launches import Experts, Planned, planned, problems, workspace_bytes
from tests.support.planning import FP8_BLOCK, opened, source_of

GB10 = find_gpu("gb10")
OSS = Problem(2880, 2880, 32, 4, "mxfp4", "clamped_swiglu", 7.0, 1.702, True, "bf16")
GLM = Problem(5120, 384, 160, 8, "fp8_channel")


def experts(card: str, tp: int = 1, gpu: str = "gb10", **changes: Any) -> Experts:
    found = open_source(source_of(card, **changes), find_gpu(gpu)) if changes else opened(card)
    (layers,) = problems(found.parts, found.build.dtype, find_gpu(gpu), tp)
    return layers


@pytest.mark.parametrize("problem", [OSS, GLM], ids=lambda p: p.format)
def test_every_number_of_tokens_has_its_launches(problem: Problem) -> None:
    rows = planned(problem, GB10, 8192)
    for tokens in (*range(1, 70), 127, 128, 511, 512, 1279, 1280, 4096, 8191, 8192):
        here = {row.op: row.request for row in rows if row.first <= tokens <= row.last}
        assert here == requests(problem, tokens, path_of(problem, tokens, GB10), GB10), tokens
    assert max(row.last for row in rows) == 8192 and min(row.first for row in rows) == 1


@pytest.mark.parametrize("problem", [OSS, GLM], ids=lambda p: p.format)
def test_neighbours_that_share_a_compile_are_one_row(problem: Problem) -> None:
    rows = planned(problem, GB10, 8192)
    for before in rows:
        for after in rows:
            if before.op == after.op and before.last + 1 == after.first:
                assert before.request != after.request, (before.op, before.last)
    kept = [row for row in rows if row.op == "moe_combine"]
    assert [(row.first, row.last) for row in kept] == [(17, 8192)], "does not depend on the number of tokens"


FEW_TILE = {"rows": 16, "tokens": 8, "depth": 128, "many": 16, "warps": 1, "stages": 3, "tma": False}
SORTED_TILE = {"rows": 256, "tokens": 32, "depth": 128, "warps": 4, "stages": 3, "tma": False}


def measured(monkeypatch: pytest.MonkeyPatch, paths: dict[str, str]) -> list[Planned]:
    """What GLM launches for up to 8 tokens if these paths, by the number of tokens, were measured."""
    tiles = {"few": FEW_TILE, "sorted": SORTED_TILE}
    entries = {n: {"path": p, "gate_up": tiles[p], "down": tiles[p]} for n, p in paths.items()}
    monkeypatch.setattr(_tuned, "_file", lambda name: {_tuned.key(GLM): entries})
    return planned(GLM, GB10, 8)


def test_measured_paths_are_planned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest measured number by ratio: 3 and 5 take 4's. What is computed alike before and after is two
    rows."""
    found = measured(monkeypatch, {"2": "few", "4": "sorted", "8": "few"})
    rows = [row for row in found if row.op == "moe_down"]
    assert [(row.first, row.last, row.path.name) for row in rows] == [
        (1, 1, "few"),
        (2, 2, "few"),
        (3, 5, "sorted"),
        (6, 8, "few"),
    ]
    assert {row.path.why for row in rows} == {"measured"} and rows[1].request == rows[3].request
    assert rows[2].config["rows"] == 256


def test_a_launch_that_is_not_made_in_between_is_not_listed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"2": "sorted", "4": "few", "8": "sorted"})
    rows = [(row.first, row.last) for row in found if row.op == "moe_combine"]
    assert rows == [(1, 2), (6, 8)]


@pytest.mark.parametrize(
    ("card", "tp", "expected"),
    [
        ("gpt-oss-20b", 1, OSS),
        ("glm-4.7-fp8", 4, GLM),
        ("kimi-k2.5-int4", 8, Problem(7168, 256, 384, 8, "int4_group")),
        ("qwen3.5-397b-a17b-nvfp4", 4, Problem(4096, 256, 512, 10, "nvfp4")),
        ("qwen3-30b-a3b", 1, Problem(2048, 768, 128, 8, "bf16")),
    ],
)
def test_the_problem_is_the_models(card: str, tp: int, expected: Problem) -> None:
    found = experts(card, tp)
    assert (found.problem, found.refusal) == (expected, None)


def test_all_expert_layers_are_counted() -> None:
    """46 layers, the first dense; the MTP layer runs in no step."""
    assert experts("glm-4.5-air-fp8").layers == 45


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (lambda: experts("firebox-tiny"), "hidden states are float32; kernels know bfloat16 and float16"),
        (lambda: experts("qwen3-30b-a3b", 16), "has no tile for 48 columns in bf16"),
        (lambda: experts("glm-4.7-fp8", gpu="a100"), "has no FP8 type on a100"),
        (
            lambda: experts(
                "qwen3-30b-a3b",
                quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128},
            ),
            "knows no awq weights",
        ),
        (
            lambda: experts("qwen3-30b-a3b", quantization_config=FP8_BLOCK | {"weight_block_size": [64, 64]}),
            "blocks are 64 × 64; kernels know 128 × 128",
        ),
    ],
)
def test_what_no_kernel_runs_is_refused(found: Any, sentence: str) -> None:
    layers = found()
    assert layers.problem is None and sentence in layers.refusal


def test_int4_of_other_groups_is_refused() -> None:
    from firebox.planning.launches import _refusal

    for format in (int4_group.Format(64), int4_group.Format(32, symmetric=False)):
        assert "kernels know groups of 32, symmetric" in str(_refusal({format}, torch.bfloat16))
    assert _refusal({int4_group.Format(32)}, torch.bfloat16) is None
    both = _refusal({int4_group.Format(32), fp8_block.Format()}, torch.bfloat16)
    assert both == "the matrices of one expert are in different formats"


def test_the_workspace_is_the_layers_own() -> None:
    """Against real memory, at a small size."""
    small = Problem(256, 128, 16, 4, "fp8_channel")
    space = Workspace(small, 100, "cpu")
    sizes = collections.Counter[str]()
    for name, value in vars(space).items():
        parts = [value] if isinstance(value, torch.Tensor) else list(vars(value).values()) if value else []
        sizes[name] = sum(part.numel() * part.element_size() for part in parts)
    one = Experts(3, "fp8_channel", small)
    assert workspace_bytes([one], 100) == sizes.total() > 100 * 4 * (128 + 2 * 256)
    assert workspace_bytes([one, Experts(1, "awq", None, "no")], 100) == sizes.total()
    assert workspace_bytes([Experts(1, "awq", None, "no")], 100) == 0
