"""Configurations found by measuring, as data: tuned/<gpu>/experts.json, linear.json and attention.json.
Kernels read them; who measures writes them.

    {"fp8_channel hidden=5120 inter=384 experts=160 top_k=8":
        {"16": {"path": "few", "gate_up": {…Config…}, "down": {…Config…}},
         "256": {"path": "sorted", "gate_up": …, "down": …}, …}, …}
    {"fp8_channel rows=3584 columns=5120":
        {"16": {"path": "few", "config": {…Config…}}, "512": {"path": "many", "config": …}, …}, …}
    {"decode bfloat16 kv=bfloat16 heads=24 …":  (attention/triton_paged.py, `key`)
        {"8": {"path": "decode", "config": {…Config…}}, …}, …}

A number of tokens takes the entry of the nearest measured number, by ratio.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from importlib import resources
from typing import Any

from firebox.kernels._experts import Problem


def key(problem: Problem) -> str:
    """How the file calls a problem."""
    sizes = ("hidden", "inter", "experts", "top_k")
    of_32 = not problem.format.startswith("int4") or problem.group == 32
    further = [] if of_32 else [f"group={problem.group}"]
    return " ".join([problem.format, *(f"{size}={getattr(problem, size)}" for size in sizes), *further])


def nearest(gpu_name: str, problem: Problem, tokens: int, path: str | None = None) -> dict[str, Any] | None:
    """The measured entry of experts.json for so many tokens, of one path if one is named; None where nothing
    was measured."""
    return _nearest(_file(gpu_name).get(key(problem), {}), tokens, lambda found: path in (None, found))


def measured(
    gpu_name: str, file: str, key: str, tokens: int, but: str | None = None
) -> dict[str, Any] | None:
    """The same of another `file`, under `key`; of any path but one."""
    return _nearest(_file(gpu_name, file).get(key, {}), tokens, lambda found: found != but)


def _nearest(entries: dict[str, Any], tokens: int, wanted: Callable[[str], bool]) -> dict[str, Any] | None:
    fitting = {int(n): entry for n, entry in entries.items() if wanted(entry["path"])}
    if not fitting:
        return None
    found: dict[str, Any] = fitting[min(fitting, key=lambda n: abs(math.log(n / tokens)))]
    return found


@functools.cache
def _file(gpu_name: str, name: str = "experts") -> dict[str, dict[str, Any]]:
    path = resources.files("firebox") / "tuned" / gpu_name.replace("-", "_") / f"{name}.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
