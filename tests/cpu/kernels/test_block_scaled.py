"""Block-scaled products without a GPU: what rounds activations, under Triton's interpreter; both halves of
the layer, compiled for GPUs that are not here and read back; and which number of tokens takes them. Their
results under the interpreter: test_expert_kernels.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import _block_scaled, moe_down_scaled, moe_gate_up_scaled, quantise_groups
from firebox.kernels._block_scaled import GROUPS, KINDS, NEVER, native_from
from firebox.kernels._experts import Problem
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.layers.expert_paths import FEW, SCALED, SORTED, path_of, requests, stock_path, stored_as
from tests.support import interpreted_groups

ROOT = FilePath(__file__).resolve().parents[3]
GLM = Problem(5120, 384, 160, 8, "nvfp4_nibbles")
OSS = Problem(2880, 2880, 128, 4, "mxfp4_nibbles", "clamped_swiglu", biases=True)
# Of N(0, 1): half a step of E2M1 or E4M3 under a group's own scale. Measured 0.095, 0.115, 0.027.
ERRORS = {"nvf4": 0.1, "mxf4": 0.12, "mxf8": 0.03}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_groups"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", GROUPS)
def test_rounding_is_the_references(kind: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted_groups.right(kind, interpreted[kind]), interpreted[kind]


def test_rounding_to_fp8_is_the_references(interpreted: dict[str, Any]) -> None:
    assert interpreted["fp8"] == []


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_not_finite_stays_where_it_is(kind: str, interpreted: dict[str, dict[str, Any]]) -> None:
    """In its group of 32; in nvf4, whose groups have no NaN scale to spare, in its row."""
    alone = [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert interpreted[kind]["nan_groups"] == ([[1] * 6] * 3 if kind == "nvf4" else alone)


@pytest.mark.parametrize("kind", GROUPS)
def test_the_reference_loses_what_a_code_must(kind: str) -> None:
    """No more than half a step; and each row by itself, whatever its size."""
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    p = quantise_groups.Problem(2048, kind)
    errors = []
    for size in (1e-20, 1.0, 1e20):
        meant = quantise_groups.dequantised(p, quantise_groups.reference(p, x * size)) / size
        errors.append(float((meant - x).norm() / x.norm()))
    assert ERRORS[kind] * 0.85 < errors[1] < ERRORS[kind]
    assert max(errors) < 1.05 * min(errors)


@pytest.mark.parametrize("kind", ["mxf4", "mxf8"])
def test_nothing_saturates_under_a_power_of_two(kind: str) -> None:
    """The largest of a group is at most the type's, and more than half of it."""
    most = 6.0 if kind == "mxf4" else 448.0
    largest = torch.cat((most * torch.logspace(-3, 3, 200), torch.tensor([most, most * 2, most / 2])))
    x = torch.zeros(len(largest), 32)
    x[:, 5] = largest
    scales = quantise_groups.reference(quantise_groups.Problem(32, kind), x).scales
    share = largest / torch.exp2(scales[:, 0].float() - 127) / most
    assert (share <= 1).all() and (share > 0.5).all() and share[-3:].tolist() == [1.0, 1.0, 1.0]


def scaled(problem: Problem, kind: str, gpu_name: str, tile: int) -> dict[str, CompileRequest]:
    gpu, found = find_gpu(gpu_name), {}
    for module in (moe_gate_up_scaled, moe_down_scaled):
        config = module.default(problem, tile, gpu)
        found[f"{gpu_name} {kind} {tile} {module.OP}"] = module.request(problem, config, gpu, kind=kind)
    for columns in {problem.hidden, problem.inter}:
        rows = quantise_groups.Problem(columns, kind)
        found[f"{gpu_name} {kind} quantise {columns}"] = quantise_groups.request(rows, gpu)
    return found


def test_every_launch_fits_and_multiplies_natively() -> None:
    """GLM-4.7's experts under TP 4 and gpt-oss's, at both tiles that a step can ask for."""
    wanted: dict[str, CompileRequest] = {}
    for gpu in ("gb10", "rtx-5090"):
        for tile in (32, 64):
            wanted |= scaled(GLM, "nvf4", gpu, tile)
            for kind in KINDS[OSS.format]:
                wanted |= scaled(OSS, kind, gpu, tile)
    for (name, request), compiled in zip(wanted.items(), compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error, compiled.shared_bytes, compiled.limit_bytes)
        expected = "none" if "quantise" in name else f"mma.{name.split()[1]}"
        assert (compiled.instruction, compiled.native) == (expected, True), (name, compiled.instructions)
        assert compiled.target == request.gpu.triton_target
        assert compiled.spill_bytes <= 32, (name, compiled.spill_bytes)


@pytest.mark.parametrize(("gpu_name", "option"), [("gb10", "sm120"), ("rtx-5090", "sm120"), ("h200", None)])
def test_triton_3_6_is_told_which_family_lowers(gpu_name: str, option: str | None) -> None:
    """Without it 3.6 and 3.7 emulate on 12.1; 3.9, with which the floor runs, does not need it."""
    products = [request for request in scaled(OSS, "mxf8", gpu_name, 64).values() if request.declares]
    assert [request.options.get("arch") for request in products] == [option, option]


def test_every_tile_of_the_search_space_is_native() -> None:
    """A few of each half's; what does not fit is dropped by who measures."""
    gpu, found = find_gpu("gb10"), []
    for module in (moe_gate_up_scaled, moe_down_scaled):
        space = list(module.search_space(GLM, 64, gpu))
        assert len(space) == len(set(space)) > 10
        found += [module.request(GLM, config, gpu) for config in space[::6]]
    for compiled in compile_all(found):
        assert compiled.error is None and compiled.instructions == ("mma.nvf4",)


def test_without_the_instruction_a_product_says_so() -> None:
    """Compiled for a GPU that has none: it runs, emulated, and is not called native."""
    found = compile_all([r for r in scaled(OSS, "mxf4", "h200", 64).values() if r.declares])
    assert [result.error for result in found] == [None, None]
    assert not any(result.native for result in found)


@pytest.mark.parametrize("problem", [GLM, OSS], ids=lambda p: p.format)
def test_few_tokens_are_weight_only_and_many_are_not(problem: Problem) -> None:
    gpu = find_gpu("gb10")
    first = native_from(problem, gpu)
    names = [stock_path(problem, tokens, gpu).name for tokens in (1, 16, 17, first - 1, first, 8192)]
    assert names == [FEW, FEW, SORTED, SORTED, SCALED, SCALED]
    for tokens in (4, 300):
        path = stock_path(problem, tokens, gpu)
        assert "weight-only" in path.why
        made = requests(problem, tokens, path, gpu)
        assert {r.declares for r in made.values() if r.declares} == {("bf16",)}
    many = stock_path(problem, 8192, gpu)
    assert _block_scaled.kind_of(problem) in many.why
    assert list(requests(problem, 8192, many, gpu)) == [
        *("moe_count", "moe_place", "quantise_x", "moe_gate_up", "quantise_h", "moe_down", "moe_combine")
    ]


def test_where_products_begin_to_take_longer_than_reading() -> None:
    """GB10: 0.5625 bytes a weight at 273 GB/s take as long as 2 · 61.3 bf16 operations at half of 119
    TFLOP/s; 160 experts of which 8 are chosen have 61.3 choices each at 1,226 tokens. A GPU whose numbers
    nobody knows keeps to weight-only."""
    gb10 = find_gpu("gb10")
    choices = (0.5 + 1 / 16) / 273e9 * 119e12 * 0.5 / 2
    assert native_from(GLM, gb10) == round(choices * 160 / 8) == 1226
    assert native_from(Problem(256, 128, 8, 8, "nvfp4_nibbles"), gb10) == 65, "few tokens have their own path"
    assert native_from(GLM, dataclasses.replace(gb10, bf16_tflop_s=None)) == NEVER
    assert native_from(GLM, find_gpu("h200")) == NEVER


@pytest.mark.parametrize(
    ("gpu_name", "stored"),
    [("gb10", "_nibbles"), ("rtx-5090", "_nibbles"), ("h200", ""), ("l40s", ""), ("b200", "")],
)
def test_weights_lie_as_the_tensor_cores_read_them(gpu_name: str, stored: str) -> None:
    """Nibbles where both paths read them; elsewhere the words that decode fastest, and no such path."""
    gpu = find_gpu(gpu_name)
    for format in ("mxfp4", "nvfp4"):
        p = stored_as(Problem(256, 256, 8, 2, format), gpu)
        assert (p.format, p.panels) == (format + stored, not stored)
        assert path_of(p, 8192, gpu).name == (SCALED if stored else SORTED)
        assert (moe_gate_up_scaled.accepts(p, gpu) is None) is bool(stored)
    plain = [Problem(256, 256, 8, 2, format) for format in ("int4_group", "bf16")]
    assert [stored_as(p, gpu) for p in plain] == [dataclasses.replace(plain[0], panels=True), plain[1]]


def test_what_has_no_such_product_is_refused() -> None:
    gb10, h200 = find_gpu("gb10"), find_gpu("h200")
    assert moe_gate_up_scaled.accepts(GLM, gb10) is moe_down_scaled.accepts(GLM, gb10) is None
    assert moe_gate_up_scaled.accepts(GLM, h200) == "h200 has no mma.nvf4"
    plain = Problem(5120, 384, 160, 8, "nvfp4")
    assert moe_down_scaled.accepts(plain, gb10) == "knows no nvfp4 weights"
