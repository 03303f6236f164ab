"""compile.py: what it reads back of kernels compiled for GPUs that are not here, that a compile that fails
costs one result, and that the cache returns what was computed for this very kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
import triton.language as tl

from firebox.find import load
from firebox.hardware.base import find_gpu
from firebox.kernels import _triton
from firebox.kernels import compile as room
from firebox.kernels.compile import Compiled, CompileRequest, compile_all, is_native
from tests.support.triton_kernels import dot_request, gemm_request, narrow, total

GB10, H200, RTX_4090, A100 = (find_gpu(name) for name in ("gb10", "h200", "rtx-4090", "a100"))
TILE = (64, 128, 128)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Compiled]]:
    """The kernels that several tests look at, compiled once."""
    requests = {
        "bf16 121": gemm_request("bf16", GB10, TILE, 3),
        "bf16 121 4 stages": gemm_request("bf16", GB10, TILE, 4),
        "bf16 90": gemm_request("bf16", H200, TILE, 3),
        "bf16 90 narrow": gemm_request("bf16", H200, (16, 64, 128), 4),
        "fp8 121": gemm_request("fp8", GB10, TILE, 3),
        "fp8 90": gemm_request("fp8", H200, TILE, 3),
        "fp8 90 narrow": gemm_request("fp8", H200, (16, 64, 128), 3),
        "mxf4 121": dot_request("mxf4", GB10, TILE),
        "nvf4 121": dot_request("nvf4", GB10, TILE),
        "mxf4 90": dot_request("mxf4", H200, TILE),
        "nvf4 89": dot_request("nvf4", RTX_4090, TILE),
        "spills": gemm_request("bf16", GB10, (128, 128, 64), 2, num_warps=1),
        "no dot": total_request(),
        "refused": fp8_request(A100),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("compile")))
        yield dict(zip(requests, compile_all(list(requests.values())), strict=True))


def total_request(size: int = 1024, **further: Any) -> CompileRequest:
    return CompileRequest(total, {"source": "*fp32", "target": "*fp32"}, {"N": size}, GB10, **further)


def fp8_request(gpu: Any) -> CompileRequest:
    return CompileRequest(narrow, {"source": "*fp32", "target": "*fp8e4nv"}, {"N": 256}, gpu)


# ---- what is read back


@pytest.mark.parametrize(
    ("name", "tile", "bytes_each", "buffers"),
    [
        ("bf16 121", TILE, 2, 2),  # operands go through registers: one buffer fewer than stages
        ("bf16 121 4 stages", TILE, 2, 3),
        ("bf16 90", TILE, 2, 3),  # wgmma reads shared memory while the next tiles arrive
        ("bf16 90 narrow", (16, 64, 128), 2, 3),  # too few rows for wgmma
        ("fp8 121", TILE, 1, 2),
        ("fp8 90", TILE, 1, 3),
    ],
)
def test_shared_bytes(read, name: str, tile: tuple[int, int, int], bytes_each: int, buffers: int) -> None:
    rows, cols, inner = tile
    assert read[name].shared_bytes == buffers * (rows + cols) * inner * bytes_each


def test_the_same_kernel_fits_one_gpu_and_not_the_other(read) -> None:
    assert read["bf16 121"].shared_bytes == 98_304 and read["bf16 121"].fits
    assert read["bf16 90"].shared_bytes == 147_456 and read["bf16 90"].fits
    too_big = read["bf16 121 4 stages"]
    assert (too_big.shared_bytes, too_big.limit_bytes, too_big.fits) == (147_456, 101_376, False)
    assert too_big.error is None and too_big.registers > 0  # it compiles all the same


@pytest.mark.parametrize(
    ("name", "instruction", "native"),
    [
        ("bf16 121", "mma.bf16", True),
        ("fp8 121", "mma.fp8", True),
        ("mxf4 121", "mma.mxf4", True),
        ("nvf4 121", "mma.nvf4", True),
        ("bf16 90", "wgmma.bf16", True),
        ("fp8 90", "wgmma.fp8", True),
        ("fp8 90 narrow", "mma.f16", False),
        ("mxf4 90", "wgmma.bf16", False),
        ("nvf4 89", "mma.bf16", False),
        ("no dot", "none", True),
    ],
)
def test_instruction(read, name: str, instruction: str, native: bool) -> None:
    result = read[name]
    assert (result.instruction, result.native, result.error) == (instruction, native, None)
    assert result.machine_code and result.instructions == (() if instruction == "none" else (instruction,))


def test_registers_and_spills(read) -> None:
    """512 accumulators a thread cannot be held in the 255 registers there are."""
    assert read["spills"].spill_bytes > 0 and read["spills"].stack_bytes > 0
    assert read["spills"].registers > 250
    for name in ("fp8 121", "no dot"):
        assert (read[name].spill_bytes, read[name].stack_bytes) == (0, 0)
    assert 128 < read["fp8 121"].registers <= 255 and 0 < read["no dot"].registers < 64


def test_versions_and_target_are_named(read) -> None:
    result = read["bf16 121"]
    assert (result.kernel, result.target, result.triton) == ("gemm", 121, triton.__version__)
    assert [part.isdigit() for part in result.ptxas.split(".")] == [True] * 3


def test_pipelining_shows_in_the_features(read) -> None:
    assert "cp.async" in read["bf16 121"].features and "cp.async" not in read["no dot"].features


# ---- the limit


def test_the_environment_lowers_the_limit_but_never_raises_it(read, monkeypatch) -> None:
    request = total_request()
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "1")
    (lowered,) = compile_all([request])
    assert (lowered.limit_bytes, lowered.fits) == (1, False) and lowered.shared_bytes > 1
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "999999")
    (same,) = compile_all([request])
    assert (same.limit_bytes, same.fits) == (101_376, True)
    assert same.cached and same.shared_bytes == lowered.shared_bytes  # the limit is no part of the compile


# ---- failures are results


@triton.jit
def wrong(source, N: tl.constexpr):
    """Does not compile."""
    tl.store(source + tl.arange(0, N), tl.no_such_function())


def test_a_refused_type_says_why(read) -> None:
    refused = read["refused"]
    assert "fp8e4nv not supported" in refused.error
    assert (refused.fits, refused.native) == (False, False)
    assert (refused.shared_bytes, refused.instruction) == (0, "none")


def test_a_compile_error_costs_one_result_and_is_remembered() -> None:
    requests = [
        CompileRequest(wrong, {"source": "*fp32"}, {"N": 64}, GB10),
        total_request(),
        total_request(options={"num_ctas": 3}),
    ]
    first = compile_all(requests, workers=2)
    assert "no_such_function" in first[0].error
    assert first[1].error is None and first[1].registers > 0
    assert first[2].error
    again = compile_all(requests)
    assert [result.cached for result in again] == [True] * 3
    assert [result.error for result in again] == [result.error for result in first]


def test_a_compiler_that_dies_or_hangs_costs_one_result_and_is_tried_again(
    tmp_path: Path, tmp_path_factory, monkeypatch
) -> None:
    """The real worker, with a compiler that aborts for one kernel and sleeps for another."""
    compiler = load("kernels", "compile")
    honest, sleeper = compiler._compile_one, tmp_path_factory.mktemp("sleeper")

    def broken(request: CompileRequest, folder: Path, **how: bool) -> dict[str, Any]:
        if request.constexprs["N"] == 64:
            (sleeper / "orphan").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
            os.write(2, b"LLVM ERROR: cannot select\n")
            os.abort()
        if request.constexprs["N"] == 128:
            with tempfile.NamedTemporaryFile(delete=False), subprocess.Popen(["sleep", "60"]) as assembler:
                (sleeper / "pid").write_text(str(assembler.pid))
        return honest(request, folder, **how)

    monkeypatch.setattr(compiler, "_compile_one", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    died, hung, fine = compile_all([total_request(64), total_request(128), total_request(256)], limit_s=6)
    assert time.monotonic() - began < 25
    assert "SIGABRT" in died.error and "cannot select" in died.error
    assert hung.error == "took longer than 6 s" and fine.error is None
    assert not list(tmp_path.glob("tmp*"))  # nor is a file of its left behind
    for name in ("pid", "orphan"):  # an assembler ends with the process that had started it
        assert not runs((sleeper / name).read_text())
    monkeypatch.setattr(compiler, "_compile_one", honest)
    retried = compile_all([total_request(64), total_request(128), total_request(256)])
    assert [result.cached for result in retried] == [False, False, True]
    assert [result.error for result in retried] == [None] * 3


def runs(pid: str) -> bool:
    """Is there such a process, and is it more than an entry that nobody has collected yet?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arguments_must_be_the_kernels() -> None:
    with pytest.raises(AssertionError, match=r"total takes .*'N'"):
        compile_all([CompileRequest(total, {"source": "*fp32"}, {"N": 64}, GB10)])
    with pytest.raises(AssertionError, match="N"):
        compile_all([total_request(aligned=("N",))])
    with pytest.raises(AssertionError, match="cannot be <object"):
        compile_all([replace(total_request(), constexprs={"N": object()})])


# ---- the cache

SOURCE = """
import triton
import triton.language as tl

SCALE: tl.constexpr = tl.constexpr({scale})

@triton.jit
def helper(x):
    return x {operator} 2.0

@triton.jit
def kernel(p, N: tl.constexpr):
    at = p + tl.arange(0, N)
    tl.store(at, helper(tl.load(at)) * SCALE)
"""


def module(folder: Path, operator: str = "*", scale: int = 3) -> ModuleType:
    """A module with a kernel, a function that it calls and a constant that it reads, from a fresh file."""
    folder.mkdir()
    path = folder / "made.py"
    path.write_text(SOURCE.format(operator=operator, scale=scale))
    made = ModuleType("made")
    made.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), made.__dict__)
    return made


def made_request(made: ModuleType, size: int = 64, **further: Any) -> CompileRequest:
    return CompileRequest(made.kernel, {"p": "*fp32"}, {"N": size}, GB10, **further)


def test_equal_requests_hit_and_changed_ones_miss(tmp_path: Path) -> None:
    request = made_request(module(tmp_path / "a"))
    changed = {
        "the same source in another file": (made_request(module(tmp_path / "b")), True),
        "a called function": (made_request(module(tmp_path / "c", operator="+")), False),
        "a constant it reads": (made_request(module(tmp_path / "d", scale=4)), False),
        "a constexpr": (replace(request, constexprs={"N": 128}), False),
        "a type": (replace(request, signature={"p": "*bf16"}), False),
        "the alignment": (replace(request, aligned=("p",)), False),
        "warps": (replace(request, num_warps=8), False),
        "stages": (replace(request, num_stages=5), False),
        "an option": (replace(request, options={"maxnreg": 64}), False),
        "the target": (replace(request, gpu=H200), False),
        "another GPU of the same target": (replace(request, gpu=replace(GB10, name="cousin")), True),
        "what it declares": (replace(request, declares=("bf16",)), True),
    }
    (first,) = compile_all([request])
    assert not first.cached
    assert compile_all([request]) == [replace(first, cached=True)]
    hits = compile_all([request for request, _ in changed.values()])
    assert {why: hit.cached for why, hit in zip(changed, hits, strict=True)} == {
        why: expected for why, (_, expected) in changed.items()
    }
    assert hits[-1].native is False  # judged anew


def test_a_result_without_its_binary_does_not_count_where_binaries_are_kept(tmp_path, monkeypatch) -> None:
    """What only read back a kernel left nothing for a Launcher; nor did a folder that is another one now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
    request = total_request(256)

    def cached(keep: bool) -> bool:
        (found,) = compile_all([request], keep_binaries=keep)
        return found.cached

    assert [cached(False), cached(False), cached(True), cached(True)] == [False, True, False, True]
    assert list((tmp_path / "first").rglob("*.cubin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "second"))
    assert [cached(True), cached(True)] == [False, True]
    assert list((tmp_path / "second").rglob("*.cubin"))


def test_triton_and_the_reader_are_part_of_the_key(monkeypatch) -> None:
    request = total_request()
    compile_all([request])
    monkeypatch.setattr(_triton, "VERSION", "3.99.0")
    assert not compile_all([request])[0].cached
    monkeypatch.setattr(room, "_readers", lambda: "another read-back")
    assert not compile_all([request])[0].cached


def test_an_overridden_architecture_is_part_of_the_key(monkeypatch) -> None:
    compile_all([total_request()])
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm120")
    assert not compile_all([total_request()])[0].cached


def test_equal_requests_compile_once(monkeypatch) -> None:
    calls, honest = [], room.run_all

    def counted(works: Any, *rest: Any) -> Any:
        calls.append(len(works))
        return honest(works, *rest)

    monkeypatch.setattr(room, "run_all", counted)
    results = compile_all([total_request(), total_request(512), total_request()])
    assert calls == [2] and results[0] == results[2] != results[1]


@pytest.mark.parametrize("damage", ["empty", "cut", "one byte", "not text"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, caplog) -> None:
    (first,) = compile_all([total_request()])
    (path,) = (tmp_path / "triton").glob("*.json")
    whole = path.read_bytes()
    at = whole.index(b'"registers": ') + len(b'"registers": ')
    damaged = {
        "empty": b"",
        "cut": whole[:-9],
        "one byte": whole[:at] + b"9" + whole[at + 1 :],
        "not text": b"\xff",
    }[damage]
    assert damaged != whole
    path.write_bytes(damaged)
    (again,) = compile_all([total_request()])
    assert (again.cached, again.registers) == (False, first.registers)
    assert "damaged" in caplog.text and path.name in caplog.text
    assert compile_all([total_request()])[0].cached


def test_nothing_else_is_left_behind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    compile_all([total_request(), CompileRequest(wrong, {"source": "*fp32"}, {"N": 64}, GB10)])
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted(path.suffix for path in (tmp_path / "triton").iterdir()) == [".json", ".json"]


def test_five_hundred_warm_results_take_well_under_a_second() -> None:
    """The first is compiled; the others are stored as if they had been."""
    requests = [total_request(options={"maxnreg": 32 + number}) for number in range(500)]
    compile_all(requests[:1])
    cache = room.ResultCache(room.read().cache_dir / "triton")
    document = cache.read(room.request_key(requests[0]))
    for request in requests[1:]:
        cache.write(room.request_key(request), document)
    seconds = []
    for _ in range(3):  # the best: a busy machine is not the cache's fault
        began = time.perf_counter()
        results = compile_all(requests)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
    assert all(result.cached for result in results) and len(results) == 500


# ---- start-up


def test_the_room_imports_triton_only_when_it_compiles() -> None:
    code = (
        "import sys\nfrom firebox.kernels.compile import compile_all\nimport firebox.llm\n"
        "print('triton' in sys.modules, compile_all([]), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]", "False"]


def test_native_is_exactly_what_is_declared() -> None:
    assert is_native(("wgmma.fp8", "mma.bf16"), ("bf16", "fp8"))
    assert not is_native(("mma.fp8", "mma.f16"), ("fp8",))
    assert not is_native(("mma.fp8",), ("bf16", "fp8"))
    assert not is_native((), ("bf16",)) and not is_native(("mma.bf16",), ())
    assert is_native(("tcgen05.f16",), ("bf16",)) and is_native(("tcgen05.f16",), ("f16",))
    assert not is_native(("mma.f16",), ("bf16",))
