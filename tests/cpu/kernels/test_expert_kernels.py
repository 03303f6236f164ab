"""The expert kernels without a GPU: under Triton's interpreter against their references, and compiled for
GPUs that are not here. On a GPU: tests/gpu/test_experts.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import (
    moe_down,
    moe_down_few,
    moe_down_one,
    moe_gate_up,
    moe_gate_up_few,
    moe_gate_up_one,
)
from firebox.kernels._experts import FORMATS, FOUR_BIT, FP8, INTEGERS, MXFP4, Problem, dequantised, word_bits
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.layers.expert_paths import SORTED, Path, default_path, path_of, requests, stored_as
from tests.support.experts import WIDE, random_weights
from tests.support.interpreted_experts import beyond

ROOT = FilePath(__file__).resolve().parents[3]
SCATTERED = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (11, 10, 14, 13))  # sign and magnitude of a code
NIBBLES = ((3, 2, 1, 0), (7, 6, 5, 4), (11, 10, 9, 8), (15, 14, 13, 12))
# Block-scaled kinds that a format may be multiplied in.
KINDS = {"nvfp4_nibbles": 1, "mxfp4_nibbles": 2}


@pytest.mark.parametrize(
    ("format", "group"),
    [*((format, 32) for format in FORMATS), *((format, group) for format in INTEGERS for group in (64, 128))],
)
def test_kernels_equal_their_references_under_the_interpreter(format: str, group: int) -> None:
    errors = interpreted(format, str(group))
    # gate_up and down; for one and three the whole tile, and apart; the sorted and the block-scaled ones. Of
    # 66 tokens, which not every format has, the usual tile alone
    variants = ("spread", ": one ", " tiles", " shared", " rescaled", " narrow", " alone")
    as_they_are = [case for case in errors if not any(variant in case for variant in variants)]
    assert len(as_they_are) == 2 * (4 + (format in WIDE)) + 2 * 2 + 2 * 3 + 2 * 2 * KINDS.get(format, 0)
    assert any(" alone" in case for case in errors) == (format in WIDE)
    in_a_row = 2 * 4 + 2 + 2 * (format not in FOUR_BIT) + 4 * (format in FP8)
    usual = [case for case in errors if " alone" not in case]
    assert sum(" tiles" in case for case in usual) == in_a_row
    assert sum(" shared" in case for case in usual) == 2 * (2 + (format in WIDE))
    halves = 2 if format == "fp8_block" else format in FP8
    assert sum(" rescaled" in case and " tiles" not in case for case in usual) == 2 * halves
    assert sum(" narrow" in case for case in errors) == 3
    of_one_token = [case for case in errors if ": one " in case]
    assert len(of_one_token) == 2 * 2 * 2
    # each of these two halves at least once with columns for groups
    halves = 2 * 4 if format in FOUR_BIT else 0
    assert len({case.rpartition(" spread")[0] for case in errors if "spread" in case}) >= halves
    assert not beyond(format, errors)


@pytest.mark.parametrize(
    ("format", "group", "panels"),
    [
        ("nvfp4", 16, "panels"),
        ("int4_zero", 32, "panels"),
        ("mxfp4", 32, "padded"),
        ("int4_group", 64, "padded"),
    ],
)
def test_weights_in_panels_give_the_same(format: str, group: int, panels: str) -> None:
    errors = interpreted(format, str(group), panels)
    variants = ("spread", " tiles", " shared", " rescaled", " narrow", " columns", " alone")
    as_they_are = [case for case in errors if not any(variant in case for variant in variants)]
    assert len(as_they_are) == 2 * (4 + (format in WIDE)) + 2 * 2 + 2 * 3 + 2 * 2 * 2
    assert any("spread" in case for case in errors) or group == 64, "a step of 64 columns is one group"
    assert not beyond(format, errors)


def interpreted(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_experts", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["errors"]
    return errors


def launches(gpu_name: str, problem: Problem, all_tokens: tuple[int, ...]) -> dict[str, CompileRequest]:
    gpu, found = find_gpu(gpu_name), {}
    for tokens in all_tokens:
        path = path_of(problem, tokens, gpu)
        for op, request in requests(problem, tokens, path, gpu).items():
            found[f"{gpu_name} {problem.format} {tokens} {op}"] = request
    return found


def test_every_launch_fits_and_is_native_where_it_is_for() -> None:
    """GLM-4.7's experts under TP 4 and gpt-oss's, on GPUs with 99 KiB and on a large one."""
    glm = {format: Problem(5120, 384, 160, 8, format, int4_columns=128) for format in FORMATS}
    gpt_oss = Problem(2880, 2880, 128, 4, "mxfp4", "clamped_swiglu", biases=True)
    wanted = launches("gb10", gpt_oss, (4, 500))
    for format in ("bf16", "fp8_channel", "fp8_block", "int4_group", "int4_zero", "nvfp4"):
        wanted |= launches("gb10", glm[format], (4, 500))
    wanted |= launches("h200", glm["fp8_channel"], (1, 16, 4096)) | launches(
        "rtx-5090", glm["fp8_channel"], (4096,)
    )
    for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error, compiled.shared_bytes, compiled.limit_bytes)
        assert compiled.native, (name, compiled.instructions)
        assert compiled.spill_bytes <= 64, (name, compiled.spill_bytes)


def test_every_kind_of_a_second_half_of_few_tokens_compiles() -> None:
    """The whole width at once, tiles in a row, groups as columns, for one token, few and more: a branch that
    only some of them take is compiled by nobody else, and the interpreter knows no types."""
    gpu, wanted = find_gpu("gb10"), {}
    for format in ("fp8_block", "mxfp4", "int4_group"):
        p = Problem(512, 256, 24, 3, format, panels=format in FOUR_BIT)
        usual = moe_down_few.Config(64, 8, 128, 4, 3, apart=True)
        kinds = {
            "whole": (replace(usual, depth=0, stages=1, apart=False), (1, 2)),
            "in a row": (replace(usual, tiles=2), (2, 7, 16, 40)),
            "columns": (replace(usual, tokens=2), (1, 2, 7, 16, 40) if p.group else ()),
        }
        for kind, (tile, all_tokens) in kinds.items():
            for tokens in all_tokens:
                wanted[format, kind, tokens] = moe_down_few.request(p, tokens, tile, gpu)
    for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error)


@pytest.mark.parametrize(
    ("format", "normed", "beside"),
    [
        ("bf16", False, False),
        ("fp8_block", False, True),
        ("fp8_block", True, False),
        ("int4_group", False, True),
    ],
)
def test_choices_are_counted_beside_what_rounds_or_arranges_them(
    format: str, normed: bool, beside: bool
) -> None:
    """Only there is it known that the launch before has waited (kernels/moe_sort.py)."""
    gpu = find_gpu("h200")
    p = stored_as(Problem(512, 256, 24, 3, format, normed=normed), gpu)
    found = requests(p, 500, default_path(p, SORTED, 16, gpu), gpu)
    assert found["moe_count"].constexprs["BESIDE"] is beside
    assert ("quantise_fp8" in found or "moe_arrange" in found) is beside


def test_fp8_products_are_fp8_on_sm_121_where_many_tokens_meet() -> None:
    found = launches("gb10", Problem(5120, 384, 160, 8, "fp8_channel"), (500,))
    compiled = compile_all(
        [request for name, request in found.items() if "gate_up" in name or "down" in name]
    )
    assert [result.instruction for result in compiled] == ["mma.fp8", "mma.fp8"]


def test_what_the_next_launch_reads_is_the_last_to_leave_the_l2_where_it_fits() -> None:
    """Qwen3.5's experts under TP 4: at 64 tokens h takes 0.3 MB and the products 5.2; at 4,096 21 and 336."""
    p = Problem(4096, 256, 512, 10, "bf16")
    found = launches("h200", p, (64, 4096)) | launches("gb10", p, (16,))
    halves = {name: request for name, request in found.items() if name.endswith(("moe_gate_up", "moe_down"))}
    assert len(halves) == 6
    for name, compiled in zip(halves, compile_all(list(halves.values())), strict=True):
        assert ("evict_last" in compiled.features) == (" 4096 " not in name), (name, compiled.features)


def test_a_small_block_s_second_half_begins_when_its_first_is_done() -> None:
    """Where launches overlap."""
    p = Problem(4096, 512, 128, 8, "fp8_block")
    for gpu_name, block, counted in (
        ("h200", 16, True), ("h200", 32, True), ("h200", 64, False), ("gb10", 16, True), ("l40s", 16, False),
    ):  # fmt: skip
        gpu = find_gpu(gpu_name)
        found = requests(p, 300, default_path(p, SORTED, block, gpu), gpu)
        for op in ("moe_place", "moe_gate_up", "moe_down"):
            assert ("ready" in found[op].signature) == counted, (gpu_name, block, op)


def test_fewer_registers_let_another_program_onto_the_multiprocessor() -> None:
    """gpt-oss's many tokens on an H200: three programs of 4 warps, two of 8 with twice the rows, which move
    two thirds of the bytes; what spills, spills outside the loop."""
    p, gpu = (
        Problem(2880, 2880, 128, 4, "mxfp4", "clamped_swiglu", biases=True, panels=True),
        find_gpu("h200"),
    )
    wanted = {
        (module, config): module.request(p, config, gpu, block=64)
        for module in (moe_gate_up, moe_down)
        for config in module.search_space(p, 64, gpu)
        if config.registers and (config.depth, config.stages) == (128, 3)
    }
    assert {(config.rows, config.warps, config.registers) for _, config in wanted} == {
        (128, 4, 168),
        (256, 8, 128),
    }
    for (module, config), compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.error is None and compiled.native, compiled
        assert compiled.registers <= config.registers and compiled.spill_bytes <= 160, (module.OP, compiled)
        programs = gpu.registers_per_sm // (config.registers * 32 * config.warps)
        assert programs == {4: 3, 8: 2}[config.warps]
        assert programs * (compiled.shared_bytes + 1024) <= gpu.smem_per_sm_bytes, (module.OP, compiled)
    assert not any(config.registers for config in moe_down.search_space(p, 16, gpu))


def test_one_token_of_four_bit_experts_spills_nothing_and_moves_no_columns_between_threads() -> None:
    """Beyond the sums of rows: a tile whose columns of x lie otherwise than its words costs 2 KB or more of
    shared memory, and half as many instructions again."""
    layers = {
        "gpt-oss": Problem(2880, 2880, 128, 4, "mxfp4", "clamped_swiglu", biases=True, panels=True),
        "Kimi-K2.5 tp 8": Problem(7168, 256, 384, 8, "int4_group", panels=True),
        "Qwen3.5 tp 4": Problem(4096, 256, 512, 10, "nvfp4"),
        "AWQ": Problem(2048, 768, 128, 8, "int4_zero", int4_columns=128, panels=True),
    }
    wanted = {
        f"{gpu_name} {name} {module.OP}": module.request(problem, module.default(problem, 1, gpu), gpu)
        for gpu_name in ("gb10", "h200")
        for gpu in (find_gpu(gpu_name),)
        for name, problem in layers.items()
        for module in (moe_gate_up_one, moe_down_one)
    }
    for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.error is None and compiled.spill_bytes == 0, (name, compiled)
        assert compiled.shared_bytes <= 128, (name, compiled.shared_bytes)


@pytest.mark.parametrize("format", FORMATS)
def test_the_oracle_means_what_the_format_says(format: str) -> None:
    """One weight by hand: row and column found back through interleaving, words and scales."""
    p = Problem(256, 128, 2, 1, format)
    weights = random_weights(p, 2 * p.inter, p.hidden, torch.Generator().manual_seed(0))
    matrix = dequantised(p, weights, 1, halves=True)
    row, column = p.inter + 13, 77  # the up row 13 stands in run 1, behind the gate's: 2 · 8 + 8 + 5
    stored = 29
    if format in ("bf16", *FP8):
        value = weights.w[1, stored, column].float()
        factor = 1.0
        if weights.row_scale is not None:
            factor = weights.row_scale[1, stored]
        elif weights.scale is not None:
            factor = weights.scale[1, 1, 0]
    else:
        run = p.group // 4
        word = int(weights.w[1, stored, column // p.group * run + column % p.group % run]) & 0xFFFF
        code = column % p.group // run
        assert weights.scale is not None
        scale = weights.scale[1, stored, column // p.group].float()
        if format in INTEGERS:
            stored_code, factor = float(word >> 4 * code & 15), scale
            value = torch.tensor(stored_code - 8)
            if format == "int4_zero":
                of_group = int(weights.scale[1, stored, column // p.group])
                halves = torch.tensor([of_group << 16 & 0xFFFF0000, of_group & 0xFFFF0000])
                factor, minus = halves.to(torch.uint32).view(torch.float32)
                value = torch.tensor(stored_code) + 128 + minus
        else:
            sign, *magnitude = NIBBLES[code] if "nibbles" in format else SCATTERED[code]
            assert (sign, *magnitude) == word_bits(format)[code]
            steps = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
            bits = [word >> bit & 1 for bit in magnitude]
            value = torch.tensor(
                steps[bits[0] * 4 + bits[1] * 2 + bits[2]] * (-1.0 if word >> sign & 1 else 1.0)
            )
            factor = torch.exp2(scale - 127) if format in MXFP4 else scale * weights.row_scale[1, stored]
    torch.testing.assert_close(matrix[row, column], value * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", range(1, 65))
def test_every_number_of_few_tokens_shares_a_compile_that_is_right_for_it(tokens: int) -> None:
    p, gpu = Problem(512, 128, 24, 3, "bf16"), find_gpu("gb10")
    path: Path = path_of(p, min(tokens, 16), gpu)
    request = moe_gate_up_few.request(p, tokens, path.gate_up, gpu)
    assert request.constexprs["PADDED"] >= tokens and request.constexprs["TOP_K_PADDED"] >= p.top_k
    wanted = (
        "one" if tokens == 1 else "columns" if tokens <= 8 else "experts"
    )  # 9 · 3 choices are more than 24 experts
    assert request.constexprs["MODE"] == wanted
    assert moe_gate_up_few.programs(p, tokens) == (24 if wanted == "experts" else tokens * 3)
