"""Which kernels the tests under compute-sanitizer launch. As a plugin of pytest, -p tests.support.sanitized,
it prints every test that was collected and selected with the kernels that its marker names, as JSON."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from firebox.find import names

LINE = "sanitized: "


def kernel_files() -> set[str]:
    """Files of kernels/ with an OP that runs on a GPU."""
    found = (name for name in names("kernels") if not name.startswith("cpu_"))
    return {name for name in found if hasattr(importlib.import_module(f"firebox.kernels.{name}"), "OP")}


def file_of(request: Any) -> str:
    """The file of src/firebox/kernels whose kernel a CompileRequest is for."""
    return str(request.kernel.fn.__module__).rpartition(".")[2]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Last, so that tests that are not selected are gone."""
    named = {
        item.nodeid: [name for marker in item.iter_markers("sanitize") for name in marker.args]
        for item in session.items
    }
    print(LINE + json.dumps(named))
