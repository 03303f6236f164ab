"""The kernels of dense linear layers without a GPU: under Triton's interpreter against their references, and
compiled for GPUs that are not here. On a GPU: tests/gpu/test_linear.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import _tuned, _whole_rows, linear, linear_few, linear_one
from firebox.kernels._experts import INT4_ZERO
from firebox.kernels._linear import FORMATS, GROUPS, Problem
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.layers import dense_gpu
from firebox.layers.dense_gpu import requests
from tests.support.interpreted_linear import beyond

ROOT = FilePath(__file__).resolve().parents[3]
KINDS = [(format, group) for format in FORMATS for group in GROUPS.get(format, (0,))]


@pytest.mark.parametrize(("format", "group"), KINDS)
def test_kernels_equal_their_references_under_the_interpreter(format: str, group: int) -> None:
    """Odd numbers of rows and columns, one slice and several, heads and none, bias and residual, written over
    as well. FP8 activations are compared as the kernel quantised them, so the interpreter's truncation does
    not show."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_linear", format, str(group)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 22 + (8 if format in linear_one.FORMATS else 0)
    assert not beyond(format, errors)


def launches(problem: Problem, gpu: Gpu, all_tokens: tuple[int, ...]) -> dict[str, CompileRequest]:
    return {
        f"{gpu.name} {problem} {tokens} {op}": request
        for tokens in all_tokens
        for op, request in requests(problem, tokens, gpu).items()
    }


def test_every_launch_fits_and_is_native_where_it_is_for() -> None:
    """GLM-4.7's o_proj under TP 4 in every format, and gpt-oss's qkv, on GPUs with 99 KiB and a large one."""
    wanted: dict[str, CompileRequest] = {}
    for format, group in KINDS:
        if (format, group) not in ((INT4_ZERO, 32), ("int4_group", 64), ("fp8_tensor", 0)):
            glm = Problem(5120, 3072, format, group, residual=True)
            wanted |= launches(glm, find_gpu("gb10"), (1, 16, 64, 100, 4096))
    for format, group in (("fp8_channel", 0), ("fp8_block", 0), (INT4_ZERO, 128)):
        glm = Problem(5120, 3072, format, group, residual=True)
        wanted |= launches(glm, find_gpu("h200"), (1, 64, 4096)) | launches(glm, find_gpu("rtx-5090"), (100,))
    gpt_oss = Problem(5120, 2880, "bf16", bias=True)
    wanted |= launches(gpt_oss, find_gpu("h200"), (1, 64)) | launches(gpt_oss, find_gpu("gb10"), (1, 64))
    for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error, compiled.shared_bytes, compiled.limit_bytes)
        assert compiled.native, (name, compiled.instructions)
        assert compiled.spill_bytes <= 64, (name, compiled.spill_bytes)


def test_one_token_s_tiles_fit_without_spills() -> None:
    """The default, with a norm too, and the largest of the search space."""
    wanted: dict[str, CompileRequest] = {}
    for gpu in map(find_gpu, ("gb10", "h200", "rtx-4090")):
        for p in (
            Problem(2048, 4096, "bf16", residual=True),
            Problem(5120, 2880, "bf16", bias=True),
            Problem(4096, 12_288, "fp8_channel", residual=True),
            Problem(160, 5120, "fp8_block", out_dtype="f32"),
        ):
            tiles = list(linear_one.search_space(p, gpu))
            default = linear_one.default(p, gpu)
            assert default in tiles
            largest = max(tiles, key=lambda tile: tile.rows * _whole_rows.padded(p.columns) // tile.warps)
            for config, eps in ((default, None), (largest, None), (default, 1e-6)):
                wanted[f"{gpu.name} {p} {config} {eps}"] = linear_one.request(p, config, gpu, eps=eps)
    for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error)
        assert compiled.spill_bytes == 0, (name, compiled.spill_bytes, compiled.registers)
        assert compiled.native and compiled.shared_bytes <= 8192, name


def test_one_token_takes_its_kernel_where_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no two tokens do, though they are nearest to it."""
    p, gpu = Problem(2048, 4096, "bf16", residual=True), find_gpu("h200")
    entries = {1: {"path": "one", "config": {"rows": 4, "warps": 4}}, 8: {"path": "few", "config": {}}}
    monkeypatch.setattr(_tuned, "_file", lambda *names: {dense_gpu.key(p): entries})
    assert dense_gpu.path_of(p, 1, gpu) == dense_gpu.Path("one", linear_one.Config(4, 4), "measured")
    assert dense_gpu.path_of(p, 2, gpu).name == "few"
    assert dense_gpu.scratch(p, 1, dense_gpu.path_of(p, 1, gpu)) == (0, 0)


def test_fp8_products_of_many_tokens_are_fp8_on_sm_121() -> None:
    found = launches(Problem(3584, 5120, "fp8_channel"), find_gpu("gb10"), (100, 4096))
    compiled = compile_all([request for name, request in found.items() if name.endswith("linear")])
    assert [result.instruction for result in compiled] == ["mma.fp8", "mma.fp8"]


@pytest.mark.parametrize(("format", "group"), KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(80, 2944), (5120, 3072), (37_888, 5120), (64, 128)])
@pytest.mark.parametrize("name", ["gb10", "h200"])
def test_slices_cover_every_column_once(name: str, rows: int, columns: int, format: str, group: int) -> None:
    """Of every tile of the search space, and of the default: the last slice begins within the matrix and ends
    at or behind its end, and what it does not fill is masked."""
    p, gpu = Problem(rows, columns, format, group), find_gpu(name)
    for tokens in (1, 16, 64):
        for config in (linear_few.default(p, tokens, gpu), *linear_few.search_space(p, tokens, gpu)):
            steps, slices = linear_few.division(p, config)
            width = config.head + steps * config.depth
            assert (slices - 1) * width < columns <= slices * width, config
            constants = linear_few.request(p, tokens, config, gpu).constexprs
            last = columns - (slices - 1) * width
            assert last >= config.head or constants["HEAD_MASKED"], config
            assert last <= config.head or (last - config.head) % config.depth == 0 or constants["MASKED"]
            assert 128 % config.rows == 0  # a head's rows lie in one row of blocks


@pytest.mark.parametrize(("format", "group"), [(f, g) for f, g in KINDS if f != "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(80, 2944), (4096, 12_288), (5120, 3072), (2048, 512)])
@pytest.mark.parametrize("name", ["gb10", "h200"])
def test_slices_of_many_tokens_are_for_tiles_that_leave_the_gpu_empty(
    name: str, rows: int, columns: int, format: str, group: int
) -> None:
    """They cover every column once; a tile without them stands beside each."""
    p, gpu = Problem(rows, columns, format, group), find_gpu(name)
    for tokens in (16, 64, 256, 512, 4096):
        space = list(linear.search_space(p, tokens, gpu))
        assert len(set(space)) == len(space)
        sliced = [config for config in space if config.slices > 1]
        assert len(sliced) <= 48
        for config in sliced:
            (steps, slices), tiles = linear.division(p, config), linear.tiles_of(p, tokens, config)
            width = steps * config.depth
            assert (slices - 1) * width < columns <= slices * width, config
            assert slices == config.slices and steps >= linear.FEWEST_STEPS, config
            assert tiles < gpu.sms and tiles * slices <= linear.MOST_WAVES * gpu.sms, config
            assert replace(config, slices=1) in space
            assert linear.scratch(p, tokens, config) == (slices * tokens * rows, tiles)
            assert linear.scratch(p, tokens, replace(config, slices=1)) == (0, 0)
    assert all(config.slices == 1 for config in linear.search_space(p, 4096, gpu)) or rows < 4096
    assert linear.division(p, linear.Config(slices=10**6)) == (1, -(-columns // 128))


def test_few_rows_of_many_columns_are_sliced() -> None:
    """GLM-4.5-Air's o_proj of 256 tokens: 64 tiles for 132 multiprocessors."""
    p, gpu = Problem(4096, 12_288, "fp8_channel", residual=True), find_gpu("h200")
    tile = linear.Config(128, 128, 128, 4, 3, tma=True)
    slices = [c.slices for c in linear.search_space(p, 256, gpu) if replace(c, slices=1) == tile]
    assert slices == [1, 2, 3, 4, 6]


def test_unquantised_weights_have_tiles_in_slices_alone() -> None:
    """gpt-oss's o_proj of 64 tokens, which a library leaves at a third of the memory's rate; of 4,096 the
    library has tiles enough."""
    p, gpu = Problem(2880, 4096, "bf16", bias=True, residual=True), find_gpu("h200")
    space = list(linear.search_space(p, 64, gpu))
    assert space and all(config.slices > 1 and config.tma for config in space)
    assert not list(linear.search_space(p, 4096, gpu))
    tile = linear.Config(64, 64, 128, 4, 3, tma=True, slices=3)
    assert tile in space
    (compiled,) = compile_all([linear.request(p, tile, gpu)])
    assert compiled.fits and compiled.native and compiled.spill_bytes == 0
    assert compiled.instructions == ("wgmma.bf16",), compiled.instructions


def test_adding_up_takes_no_registers_that_the_product_does_not() -> None:
    """One slice's compile has no trace of the others, and where there are several next to nothing spills."""
    sizes = ((128, 128, 4), (128, 256, 8), (64, 64, 4))
    wanted = []
    for name, stages in (("h200", 3), ("gb10", 2)):
        p, gpu = Problem(4096, 12_288, "fp8_channel", bias=True, residual=True), find_gpu(name)
        for rows, wide, warps in sizes:
            config = linear.Config(rows, wide, 128, warps, stages, tma=True)
            alone = linear.request(p, config, gpu)
            assert not {"partial", "counters"} & set(alone.signature) and alone.constexprs["SLICES"] == 1
            wanted.append(linear.request(p, replace(config, slices=4), gpu))
    for request, compiled in zip(wanted, compile_all(wanted), strict=True):
        assert compiled.fits and compiled.native, (request.constexprs, compiled)
        assert compiled.spill_bytes <= 16, (request.constexprs, compiled.registers, compiled.spill_bytes)


def test_the_default_fills_the_gpu() -> None:
    """Few rows are cut into slices, many are not; slices keep four steps at least."""
    gpu = find_gpu("h200")
    for rows, columns in ((576, 7168), (3584, 5120), (201_088, 2880)):
        p = Problem(rows, columns, "bf16")
        config = linear_few.default(p, 1, gpu)
        steps, slices = linear_few.division(p, config)
        programs = -(-rows // config.rows) * slices
        assert programs >= 0.8 * linear_few.RESIDENT * gpu.sms or columns // config.depth // slices == 4, (
            rows,
            slices,
        )
        assert slices == 1 or steps >= 3
        assert (slices == 1) == (rows == 201_088), (rows, slices)


def test_what_no_kernel_runs_is_said() -> None:
    gpu = find_gpu("h200")
    good = Problem(512, 512, "int4_group", 128)
    assert linear_few.accepts(good, gpu) is None and linear.accepts(good, gpu) is None
    assert linear_few.accepts(good, replace(gpu, kind="cpu")) == "is made for NVIDIA GPUs"
    assert linear_few.accepts(replace(good, format="q4_k"), gpu) == "knows no q4_k weights"
    assert "groups of 0" in str(linear_few.accepts(replace(good, group=0), gpu))
    assert "multiple of 128" in str(linear_few.accepts(replace(good, columns=448), gpu))
    assert "no FP8 type" in str(linear_few.accepts(Problem(512, 512, "fp8_channel"), find_gpu("a100")))
    assert "f32" in str(linear_few.accepts(replace(good, out_dtype="f16"), gpu))
    assert linear.accepts(Problem(512, 512, "q4_k"), gpu) == "knows no q4_k weights"
