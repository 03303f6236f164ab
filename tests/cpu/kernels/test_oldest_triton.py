"""Every kernel compiles with the oldest Triton that pyproject.toml allows too; all other tests here have the
newest. `make test` installs it in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from firebox.hardware.base import find_gpu
from tests.support.every_kernel import launches
from tests.support.sanitized import file_of, kernel_files

ROOT = Path(__file__).resolve().parents[3]
OLDEST = "3.6.0"
FOLDER = ROOT / ".venv" / f"triton-{OLDEST}"


def test_every_kernel_is_among_them() -> None:
    assert {file_of(request) for request in launches(find_gpu("h200")).values()} == kernel_files()


def test_every_kernel_compiles_with_the_oldest_triton(tmp_path: Path) -> None:
    assert FOLDER.is_dir(), f"`make test` installs Triton {OLDEST} in {FOLDER}; a test run by hand does not"
    path = f"{FOLDER}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.every_kernel"],
        env=os.environ | {"PYTHONPATH": path, "FIREBOX_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["triton"] == OLDEST
    assert {name: error for name, error in found["errors"].items() if error} == {}
