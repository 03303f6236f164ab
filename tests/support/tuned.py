"""A folder of tuned configurations for one test, read by the code that reads the package's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firebox.hardware.base import Gpu
from firebox.kernels import _attention_choice, _tuned
from firebox.layers import dense_gpu


class TunedFolder:
    """Instead of src/firebox/tuned; empty at first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, gpu: Gpu, file: str, entries: Mapping[str, Any]) -> None:
        """`entries`: key → tokens → entry."""
        folder = self._folder / "tuned" / _tuned.folder(gpu.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(entries), encoding="utf-8")
        forget()


def forget() -> None:
    """What was read of files before."""
    for cached in (_tuned._file, dense_gpu._path_of, dense_gpu._fitted, _attention_choice.measured):
        cached.cache_clear()


@pytest.fixture
def tuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TunedFolder]:
    """Nothing is measured but what the test writes."""
    monkeypatch.setattr(_tuned, "resources", SimpleNamespace(files=lambda package: tmp_path))
    forget()
    yield TunedFolder(tmp_path)
    forget()
