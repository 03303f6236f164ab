"""NVIDIA's compute-sanitizer over the GPU tests that carry the marker `sanitize`; `make test-gpu-sanitize`
runs it.

    python tools/sanitize.py [--tools memcheck,racecheck] [--binary PATH] [-- FURTHER ARGUMENTS OF PYTEST]

memcheck finds accesses outside allocations and misaligned ones, racecheck threads of a block that meet in
shared memory without a barrier. The binary comes with the extra `sanitize` (pip install -e '.[sanitize]'),
or is the one of a CUDA toolkit in PATH.

Before each tool looks at the tests it must find a fault that is there (tests/support/sanitizer_canary.py): a
filter that matches nothing, or a tool that does not know the driver, would call everything right. And the
tests run once without a tool, which compiles their kernels.

Only our kernels are looked at: torch's are many, and 20 to 50 times slower under a tool. Under memcheck torch
does without its caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING): it cuts tensors out of blocks of
megabytes, and what is written behind a tensor lies inside the block, where memcheck sees no fault. Padding
behind each allocation keeps the next one from hiding it. A fault ends its kernel, not the process, so that
one run finds them all.

Exit 1: a fault, a failed test, or a tool that does not see the canary; 2: there is no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "src" / "firebox" / "kernels"
CANARY = "tests.support.sanitizer_canary"
TESTS = ("-m", "pytest", "tests/gpu", "-m", "gpu and sanitize", "-p", "no:cacheprovider", "-q")
FOUND_EXIT = 77  # of the tool, where the program itself ended with 0
PADDING_BYTES = 1024
WORKERS = 8  # of the run without a tool
TEST_LIMIT_S = 900  # a test's, under a tool
OF_TOOL = {
    "memcheck": ("--padding", str(PADDING_BYTES), "--report-api-errors", "no"),
    "racecheck": (),
}
ENVIRONMENT = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE)
JIT = re.compile(r"^@triton\.jit.*\ndef ([a-z]\w*)", re.MULTILINE)  # what begins with _ is called by kernels
OP = re.compile(r"^OP = ", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """Of one run. `faults`: None where the tool gave no summary; `output`: what it printed."""

    name: str
    tests: int
    failed: int
    faults: int | None
    exit: int
    seconds: float
    output: str = ""

    @property
    def good(self) -> bool:
        return self.exit == 0 and self.tests > 0 and self.failed == 0 and self.faults == 0

    def line(self) -> str:
        faults = "no summary" if self.faults is None else f"{self.faults} errors"
        return f"{self.name}: {self.tests} tests, {self.failed} failed, {faults}, {self.seconds:.0f} s"


def find_binary(asked: str | None, search: Sequence[str] | None = None) -> Path | None:
    """compute-sanitizer: the one asked for, that of PATH, or that of the wheel below a folder of `search`
    (sys.path by default)."""
    if asked:
        return Path(asked) if Path(asked).is_file() else None
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    folders = (Path(entry) / "nvidia" for entry in (sys.path if search is None else search))
    wheels = (path for folder in folders for path in sorted(folder.glob("*/bin/compute-sanitizer")))
    return next(wheels, None)


def kernel_names() -> list[str]:
    """The functions that are launched, of every file that has an OP; and the canary's."""
    files = (path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.py")))
    of_kernels = [name for text in files if OP.search(text) for name in JIT.findall(text)]
    canary = ROOT / Path(*CANARY.split(".")).with_suffix(".py")
    return sorted({*of_kernels, *JIT.findall(canary.read_text(encoding="utf-8"))})


def command(binary: Path, tool: str, program: Sequence[str]) -> list[str]:
    """The tool around a Python program."""
    return [
        str(binary), "--tool", tool, "--error-exitcode", str(FOUND_EXIT),
        "--target-processes", "application-only",  # not ptxas and the like
        "--launch-timeout", "0",  # the first launch may come late: tests are collected before it
        "--check-exit-code", "no",  # pytest's is no fault of a kernel, and is looked at here
        "--destroy-on-device-error", "kernel", "--kernel-name", f"regex=^({'|'.join(kernel_names())})$",
        *OF_TOOL[tool], sys.executable, *program,
    ]  # fmt: skip


def faults(output: str) -> int | None:
    """What a tool's summary says; None without one. A second line says how many of them were not printed."""
    return max((int(one or other) for one, other in SUMMARY.findall(output)), default=None)


def counted(report: Path) -> tuple[int, int]:
    """Tests that ran and those of them that failed, of pytest's JUnit report; (0, 0) without one."""
    if not report.is_file():
        return 0, 0
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    return total("tests") - total("skipped"), total("failures") + total("errors")


def run(name: str, arguments: Sequence[str], further: dict[str, str]) -> tuple[int, str, float]:
    """Exit status, output and seconds; what is printed is passed on as it comes."""
    began, lines = time.monotonic(), []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTEST_TIMEOUT": str(TEST_LIMIT_S), **further}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        print(f"[{name}] {line}", end="", flush=True)
    return process.wait(), "".join(lines), time.monotonic() - began


def tested(name: str, binary: Path | None, further: Sequence[str]) -> Outcome:
    """The marked tests under the tool `name`, or without one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        program = [*TESTS, f"--junitxml={report}", *further]
        arguments = command(binary, name, program) if binary else [sys.executable, *program]
        exit, output, seconds = run(name, arguments, ENVIRONMENT.get(name, {}))
        return Outcome(name, *counted(report), faults(output) if binary else 0, exit, seconds, output)


def canary_seen(binary: Path, tool: str) -> bool:
    """Does the tool find the fault that is there?"""
    program = ["-m", CANARY, tool]
    exit, output, _ = run(f"{tool} canary", command(binary, tool, program), ENVIRONMENT[tool])
    return exit == FOUND_EXIT and bool(faults(output))


def outcomes(binary: Path, tools: Sequence[str], further: Sequence[str]) -> Iterator[Outcome]:
    """Without a tool, then under each."""
    parallel = ("-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()
    first = tested("without a tool", None, [*parallel, *further])
    yield first
    if not first.good:
        return
    for tool in tools:
        if canary_seen(binary, tool):
            yield tested(tool, binary, further)
        else:
            yield Outcome(f"{tool} does not find the fault of {CANARY}", 0, 0, None, 1, 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a tool, and what it found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--binary", help="compute-sanitizer, where it is neither in PATH nor installed")
    parser.add_argument("further", nargs="*", help="of pytest, behind --")
    given = parser.parse_args(arguments)
    tools = given.tools.split(",")
    if unknown := set(tools) - set(OF_TOOL):
        parser.error(f"no tool is called {', '.join(sorted(unknown))}; there are: {', '.join(OF_TOOL)}")
    binary = find_binary(given.binary)
    if binary is None:
        print("error: there is no compute-sanitizer" + (f" at {given.binary}" if given.binary else ""))
        print("hint: pip install -e '.[sanitize]', or --binary PATH")
        return 2
    if not os.access(binary, os.X_OK):
        print(f"error: {binary} is not executable\nhint: unpack the wheel with pip, which keeps its modes")
        return 2
    found = list(outcomes(binary, tools, given.further))
    print("\n".join(outcome.line() for outcome in found))
    return 0 if len(found) == len(tools) + 1 and all(outcome.good for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
