"""What `make test-gpu-sanitize` looks at, without a GPU: every kernel is launched by a small test, the tool's
filter names every kernel, its summaries are read as they are written, and nothing found is not taken for
nothing wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels._experts import FORMATS, Problem
from firebox.kernels.compile import compile_all
from firebox.layers.expert_paths import FEW, SORTED, default_path, requests
from tests.support import sanitized, sanitizer_canary
from tests.support.sanitized import kernel_files
from tools import sanitize

ROOT = Path(__file__).resolve().parents[3]
MARK = "=" * 9


# ---- which tests


def selected() -> dict[str, list[str]]:
    """Test → the kernels it says it launches, as tools/sanitize.py selects them."""
    command = [sys.executable, *sanitize.TESTS, "--collect-only", "-p", "tests.support.sanitized"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith(sanitized.LINE)]
    return json.loads(line.removeprefix(sanitized.LINE))  # type: ignore[no-any-return]


def test_every_kernel_is_launched_by_a_small_test() -> None:
    """That a test launches what it says, tests/gpu/conftest.py observes."""
    tests = selected()
    assert len(tests) > 50
    said = {name for kernels in tests.values() for name in kernels}
    assert said == kernel_files(), said ^ kernel_files()


def test_a_launch_is_known_by_its_file() -> None:
    gpu, problem, found = find_gpu("h200"), Problem(512, 256, 8, 2, "int4_group"), dict[str, set[str]]()
    for name in (FEW, SORTED):
        launched = requests(problem, 9, default_path(problem, name, 16, gpu), gpu)
        found[name] = {sanitized.file_of(request) for request in launched.values()}
    assert found[FEW] == {"moe_gate_up_few", "moe_down_few", "moe_combine"}
    assert found[SORTED] == {"moe_sort", "moe_arrange", "moe_gate_up", "moe_down", "moe_combine"}


# ---- which launches


def test_the_filter_names_what_is_launched() -> None:
    chosen = set(sanitize.kernel_names())
    gpu = find_gpu("h200")
    for format in FORMATS:
        problem = Problem(512, 256, 8, 2, format)
        for name in (FEW, SORTED):
            launched = requests(problem, 9, default_path(problem, name, 16, gpu), gpu).values()
            assert {request.kernel.__name__ for request in launched} <= chosen
    for file in kernel_files():
        functions = vars(importlib.import_module(f"firebox.kernels.{file}"))
        assert any(name in chosen for name in functions), f"{file} has no kernel in the filter"
    assert {"canary_writes_behind", "canary_races"} <= chosen


def test_the_command_looks_at_our_kernels_of_this_process_alone() -> None:
    found = sanitize.command(Path("/x/compute-sanitizer"), "memcheck", ["-m", "pytest"])
    assert found[:5] == ["/x/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "77"]
    assert found[-3:] == [sys.executable, "-m", "pytest"]
    kernels = found[found.index("--kernel-name") + 1]
    assert kernels.startswith("regex=^(") and kernels.endswith(")$") and "," not in kernels
    assert found[found.index("--target-processes") + 1] == "application-only"
    assert sanitize.ENVIRONMENT["memcheck"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_the_canaries_compile_and_the_race_is_in_shared_memory() -> None:
    from firebox.kernels.compile import CompileRequest

    kinds = {"x": "*i32", "out": "*i32", "size": "i32"}
    found = []
    for kernel in (sanitizer_canary.canary_writes_behind, sanitizer_canary.canary_races):
        signature = {name: kinds[name] for name in kernel.arg_names if name in kinds}
        found.append(CompileRequest(kernel, signature, {"LANES": 128}, find_gpu("h200")))
    writes, races = compile_all(found)
    assert writes.error is None and races.error is None, (writes.error, races.error)
    assert races.shared_bytes > 0


# ---- what is said of them


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (f"{MARK} COMPUTE-SANITIZER\n12 passed in 3.20s\n{MARK} ERROR SUMMARY: 0 errors\n", 0),
        (f"{MARK} Invalid __global__ write of size 4 bytes\n{MARK} ERROR SUMMARY: 1 error\n", 1),
        (f"{MARK} ERROR SUMMARY: 128 errors\n{MARK} ERROR SUMMARY: 28 errors were not printed.\n", 128),
        (f"{MARK} RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
        (f"{MARK} RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        (f"{MARK} Target application terminated before first instrumented API call\n", None),
        ("", None),
    ],
)
def test_summaries_are_read(output: str, count: int | None) -> None:
    assert sanitize.faults(output) == count


def test_pytest_s_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert sanitize.counted(report) == (0, 0)
    report.write_text(
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="20"/></testsuites>'
    )
    assert sanitize.counted(report) == (17, 3)


@pytest.mark.parametrize(
    "changes",
    [{"faults": None}, {"faults": 1}, {"tests": 0}, {"failed": 1}, {"exit": 77}, {"exit": 1}],
)
def test_only_a_clean_run_is_good(changes: dict[str, Any]) -> None:
    clean = {"name": "memcheck", "tests": 82, "failed": 0, "faults": 0, "exit": 0, "seconds": 61.0}
    assert sanitize.Outcome(**clean).good
    assert sanitize.Outcome(**clean).line() == "memcheck: 82 tests, 0 failed, 0 errors, 61 s"
    assert not sanitize.Outcome(**clean | changes).good


# ---- all of it, with a program in the place of the tool


def tool(folder: Path, canary_exit: int, tests_exit: int) -> Path:
    """Runs nothing of what it is given but writes pytest's report, and ends as asked."""
    binary = folder / "compute-sanitizer"
    binary.write_text(
        f"""#!/bin/sh
case "$*" in
  *sanitizer_canary*) faults={int(canary_exit == 77)}; status={canary_exit} ;;
  *) faults={int(tests_exit == 77)}; status={tests_exit}
     for argument; do case "$argument" in --junitxml=*)
       echo '<testsuite tests="5" errors="0" failures="0" skipped="0"/>' > "${{argument#--junitxml=}}" ;;
     esac; done ;;
esac
echo "{MARK} ERROR SUMMARY: $faults errors"
exit $status
"""
    )
    binary.chmod(0o755)
    return binary


@pytest.mark.parametrize(
    ("canary_exit", "tests_exit", "status", "said"),
    [
        (77, 0, 0, "memcheck: 5 tests, 0 failed, 0 errors"),
        (77, 77, 1, "memcheck: 5 tests, 0 failed, 1 errors"),
        (0, 0, 1, "memcheck does not find the fault of tests.support.sanitizer_canary"),
    ],
)
def test_a_tool_that_sees_nothing_is_not_believed(
    canary_exit: int, tests_exit: int, status: int, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    binary = tool(tmp_path, canary_exit, tests_exit)
    plain = sanitize.Outcome("without a tool", 5, 0, 0, 0, 1.0)
    tested = sanitize.tested
    monkeypatch.setattr(sanitize, "tested", lambda name, *rest: tested(name, *rest) if rest[0] else plain)
    assert sanitize.main(["--binary", str(binary), "--tools", "memcheck"]) == status
    assert said in capsys.readouterr().out


def test_tests_that_fail_without_a_tool_are_not_run_under_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def tested(name: str, *rest: Any) -> sanitize.Outcome:
        asked.append(name)
        return sanitize.Outcome(name, 5, 1, 0, 1, 1.0)

    monkeypatch.setattr(sanitize, "tested", tested)
    assert sanitize.main(["--binary", str(tool(tmp_path, 77, 0))]) == 1
    assert asked == ["without a tool"]


def test_the_binary_is_found_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert sanitize.find_binary(None, [str(tmp_path)]) is None
    folder = tmp_path / "nvidia" / "cu13" / "bin"  # as nvidia_cuda_sanitizer_api 13.5.25 has it
    folder.mkdir(parents=True)
    wheel = tool(folder, 0, 0)
    assert sanitize.find_binary(None, ["/elsewhere", str(tmp_path)]) == wheel
    assert sanitize.find_binary(str(tmp_path / "none"), [str(tmp_path)]) is None
    other = tool(tmp_path, 0, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.find_binary(None, []) == other


def test_without_the_tool_the_call_was_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_binary", lambda asked: None)
    assert sanitize.main([]) == 2
    assert "pip install -e '.[sanitize]'" in capsys.readouterr().out


def test_a_binary_without_its_mode_is_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = tool(tmp_path, 77, 0)
    binary.chmod(0o644)
    assert sanitize.main(["--binary", str(binary)]) == 2
    assert f"{binary} is not executable" in capsys.readouterr().out
