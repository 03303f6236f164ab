"""Runs a module of tests.support under Triton's interpreter, in a process of its own, because Triton decides
when it is imported; and compiles launches for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firebox.kernels.compile import CompileRequest, compile_all

ROOT = Path(__file__).resolve().parents[2]


def interpreted(module: str, *arguments: str) -> Any:
    """What `module` prints as its last line, read as JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_launches(requests: Mapping[str, CompileRequest], spill_bytes: int = 16) -> None:
    """Every one compiles, fits its GPU's shared memory, uses the tensor instruction it declares and spills no
    more than a few registers."""
    for name, compiled in zip(requests, compile_all(list(requests.values())), strict=True):
        assert compiled.fits, (name, compiled.error, compiled.shared_bytes, compiled.limit_bytes)
        assert compiled.native, (name, compiled.instructions)
        assert compiled.spill_bytes <= spill_bytes, (name, compiled.spill_bytes)
