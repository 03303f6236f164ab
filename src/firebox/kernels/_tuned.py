"""Configurations found by measuring, as data: tuned/<gpu>/experts.json. Kernels read it; who measures writes
it.

    {"fp8_channel hidden=5120 inter=384 experts=160 top_k=8":
        {"16": {"path": "few", "gate_up": {…Config…}, "down": {…Config…}},
         "256": {"path": "sorted", "gate_up": …, "down": …}, …}, …}

A number of tokens takes the entry of the nearest measured number, by ratio.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

from firebox.kernels._experts import Problem


def key(problem: Problem) -> str:
    """How the file calls a problem."""
    sizes = ("hidden", "inter", "experts", "top_k")
    return " ".join([problem.format, *(f"{size}={getattr(problem, size)}" for size in sizes)])


def nearest(gpu_name: str, problem: Problem, tokens: int, path: str | None = None) -> dict[str, Any] | None:
    """The measured entry for so many tokens, of one path if one is named; None where nothing was measured."""
    entries = _file(gpu_name).get(key(problem), {})
    fitting = {int(n): entry for n, entry in entries.items() if path in (None, entry["path"])}
    if not fitting:
        return None
    return fitting[min(fitting, key=lambda n: abs(math.log(n / tokens)))]


@functools.cache
def _file(gpu_name: str) -> dict[str, dict[str, Any]]:
    path = resources.files("firebox") / "tuned" / gpu_name.replace("-", "_") / "experts.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
