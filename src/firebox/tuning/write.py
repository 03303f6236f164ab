"""Files in tuned/: entries of several problems, joined with what a file holds, and replaced at once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from firebox.kernels import _triton, _tuned
from firebox.tuning.base import Tunable
from firebox.tuning.entries import Entry, stored


def folder_of(out: Path, gpu_name: str) -> Path:
    """Where the files of a GPU lie under `out`."""
    return out / _tuned.folder(gpu_name)


def merge(
    path: Path, tunable: Tunable, entries: Iterable[Entry], more: Mapping[int, Any] | None = None
) -> None:
    """Writes the entries to `path`, in place of the same problems' entries that were found in the same way or
    predicted: a prediction never replaces a measurement. `more`: tokens → further facts of an entry."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    new: dict[str, dict[str, Any]] = {}
    for entry in entries:
        facts = (more or {}).get(entry.task.tokens, {})
        new.setdefault(entry.task.key, {})[str(entry.task.tokens)] = stored(entry, tunable, **facts)
    for key, found in new.items():
        kept = document.get(key, {})
        measured = any(entry.get("how", "measured") == "measured" for entry in kept.values())
        if measured and all(entry["how"] == "predicted" for entry in found.values()):
            continue
        document[key] = dict(sorted(found.items(), key=lambda pair: int(pair[0])))
    document[_tuned.ABOUT] = about()
    _replace(path, document)


def about() -> dict[str, str]:
    """What the numbers were found with."""
    return {"triton": _triton.VERSION, "date": datetime.now(UTC).date().isoformat(), "commit": commit()}


def commit() -> str:
    """Of the source tree this runs from; "unknown" where it is none, or git is not there."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    """Whoever reads sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
