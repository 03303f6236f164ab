"""What cannot fit is not started: cells that are a `firebox serve` are judged by `firebox fit` first.

The command line does it, as a process: it needs neither the GPU nor weights, and a failure of it stays there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Sequence

from firebox.config import Config
from firebox.errors import ConfigError
from firebox.matrix.cells import Cell
from firebox.matrix.spec import FitFor

SHARED = ("dtype", "kv_cache_dtype", "context_length", "max_running_requests", "max_batch_tokens")
FIT_S = 600.0


def infeasible(fit: FitFor | None, cell: Cell) -> str | None:
    """Why this cell cannot run on the GPU that the specification names, with the number; None if it can, or
    if nobody asked. Raises ConfigError where `firebox fit` refuses the question."""
    arguments = None if fit is None else serve_arguments(cell.argv)
    if fit is None or arguments is None:
        return None
    given = flags(arguments)
    model = (given["model"],) if "model" in given else ()
    shared = [f"--{name.replace('_', '-')}={given[name]}" for name in SHARED if name in given]
    return _fit((*model, "--gpu", fit.gpu, "--tp", str(fit.tp), *shared))


def serve_arguments(argv: Sequence[str]) -> tuple[str, ...] | None:
    """What follows `firebox serve` in a command; None if it is something else."""
    for place, part in enumerate(argv[:-1]):
        if argv[place + 1] == "serve" and part.rsplit("/", 1)[-1] == "firebox":
            return tuple(argv[place + 2 :])
    return None


def flags(arguments: Sequence[str]) -> dict[str, str]:
    """`--cuda-graph off model` as {"cuda_graph": "off", "model": "model"}; switches are "true" or "false"."""
    found: dict[str, str] = {}
    left = list(arguments)
    while left:
        part = left.pop(0)
        if not part.startswith("--"):
            found["model"] = part
            continue
        name = part[2:].partition("=")[0].replace("-", "_")
        if "=" in part:
            found[name] = part.partition("=")[2]
        elif name.removeprefix("no_") in _switches():
            found[name.removeprefix("no_")] = "false" if name.startswith("no_") else "true"
        elif left:
            found[name] = left.pop(0)
        else:
            raise ConfigError(f"--{part[2:]} has no value", hint=" ".join(arguments))
    return found


@functools.cache
def _switches() -> frozenset[str]:
    """The settings of `firebox serve` that take no value."""

    groups = (getattr(Config(), group.name) for group in dataclasses.fields(Config))
    return frozenset(
        f.name for group in groups for f in dataclasses.fields(group) if isinstance(f.default, bool)
    )


@functools.cache  # cells differ in much that fit does not ask
def _fit(arguments: tuple[str, ...]) -> str | None:
    command = [sys.executable, "-m", "firebox", "fit", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FIT_S, check=False)
    if done.returncode == 2 or not done.stdout.strip():
        said = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise ConfigError(f"{' '.join(command[2:])}: {said[0]}")
    document = json.loads(done.stdout.strip().splitlines()[-1])
    return None if document["fits"] else "; ".join(document["problems"])
