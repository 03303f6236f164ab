"""Configurations that were measured or predicted, as data: tuned/<gpu>/experts.json, linear.json,
attention.json and route.json. Kernels read them; who finds them writes them.

    {"fp8_channel hidden=5120 inter=384 experts=160 top_k=8":
        {"16": {"path": "few", "gate_up": {…Config…}, "down": {…Config…}},
         "256": {"path": "sorted", "gate_up": …, "down": …}, …}, …}
    {"fp8_channel rows=3584 columns=5120":
        {"16": {"path": "few", "config": {…Config…}}, "512": {"path": "many", "config": …}, …}, …}
    {"norm bf16 rows=5120 columns=2048":  (of linear.json too; layers/norm_linear_gpu.py, `key`)
        {"1": {"path": "one", "config": {…Config…}}}, …}
    {"decode bfloat16 kv=bfloat16 heads=24 …":  (_attention_choice.py, `key`)
        {"8": {"path": "decode", "config": {…Config…}}, …}, …}
    {"bf16 hidden=2880 experts=128 …":  (layers/route_gpu.py, `key`)
        {"1": {"path": "one", "config": {…Config…}}}, …}

A number of tokens takes the entry of the nearest number that is there, by ratio; an expert layer with more
than REACH times the tokens of the last entry has none. An entry that was not measured says so: "how":
"predicted". What `firebox tune` wrote here, under FIREBOX_CACHE_DIR/tuned, stands in for the same problem's
entries in the package from its fewest to its most tokens, but no prediction for a measurement.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from firebox.env import read
from firebox.kernels import _veto
from firebox.kernels._experts import Problem

F = TypeVar("F", bound=Callable[..., Any])
Entries = dict[int, dict[str, Any]]  # by their number of tokens
ABOUT = "about"  # the key of a file that is no problem's
REACH = 16  # a tile for one token is nothing for a prompt
_CACHED: list[Any] = []
_roots: tuple[Path, ...] = ()


def key(problem: Problem) -> str:
    """How the file calls a problem."""
    sizes = ("hidden", "inter", "experts", "top_k")
    of_32 = not problem.format.startswith("int4") or problem.group == 32
    further = [] if of_32 else [f"group={problem.group}"]
    return " ".join([problem.format, *(f"{size}={getattr(problem, size)}" for size in sizes), *further])


def nearest(
    gpu_name: str, problem: Problem, tokens: int, path: str | None = None, but: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The measured entry of experts.json for so many tokens, of one path if one is named, of any `but` these
    otherwise; None where nothing was measured."""
    entries = _file(gpu_name).get(key(problem), {})
    if tokens > REACH * max(entries, default=0):
        return None
    return _nearest(entries, tokens, lambda found: path in (None, found) and found not in but)


def entries(gpu_name: str, file: str, key: str) -> tuple[dict[str, Any], ...]:
    """Those of a problem, for any number of tokens and of any path."""
    return tuple(_file(gpu_name, file).get(key, {}).values())


def keys(gpu_name: str, file: str) -> frozenset[str]:
    """What a file calls the problems that have entries."""
    return frozenset(_file(gpu_name, file))


def measured(
    gpu_name: str, file: str, key: str, tokens: int, but: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The same of another `file`, under `key`; of any path `but` these."""
    return _nearest(_file(gpu_name, file).get(key, {}), tokens, lambda found: found not in but)


def turns(gpu_name: str, file: str, key: str) -> Iterator[int]:
    """The numbers of tokens from which another entry of a problem may be the nearest, whatever paths are
    looked at, or there is none within REACH."""
    tokens = sorted(_file(gpu_name, file).get(key, {}))
    for fewer, more in itertools.combinations(tokens, 2):
        middle = math.isqrt(fewer * more)  # as near to both, if its square is their product
        yield from (middle, middle + 1)
    yield from (REACH * most + 1 for most in tokens[-1:])


def how(entry: dict[str, Any]) -> str:
    """How an entry was found: "measured" or "predicted"."""
    return str(entry.get("how", "measured"))


def _nearest(entries: Entries, tokens: int, wanted: Callable[[str], bool]) -> dict[str, Any] | None:
    found, least = None, math.inf
    for n, entry in entries.items():
        ratio = n / tokens if n > tokens else tokens / n
        if ratio < least and wanted(entry["path"]):
            found, least = entry, ratio
    return found


def folder(gpu_name: str) -> str:
    """Of a GPU's files, below a root."""
    return "nvidia_" + gpu_name.replace("-", "_")


def roots() -> tuple[Path, ...]:
    """The folders that are read, later ones first: the package's own, and what was tuned on this machine."""
    return _roots or (Path(str(resources.files("firebox"))) / "tuned", read().cache_dir / "tuned")


def use(*folders: Path) -> None:
    """Reads these folders from now on; none: the usual ones. What was looked up before is looked up again,
    but what has been captured in a graph stays as it is."""
    global _roots
    _roots = folders
    _file.cache_clear()
    for function in _CACHED:
        function.cache_clear()


def cached(function: F) -> F:
    """functools.cache for what depends on these files, and on vetoes."""
    found: Any = _veto.remembers(functools.cache(function))
    _CACHED.append(found)
    return cast(F, found)


@functools.cache
def _file(gpu_name: str, name: str = "experts") -> dict[str, Entries]:
    found: dict[str, Entries] = {}
    for root in roots():
        path = root / folder(gpu_name) / f"{name}.json"
        if path.is_file():
            of_root: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            for key, entries in of_root.items():
                if key != ABOUT:
                    found[key] = _over(found.get(key, {}), {int(n): entry for n, entry in entries.items()})
    return found


def _over(below: Entries, entries: Entries) -> Entries:
    """`entries`, and those `below` of fewer or more tokens than any of them; no measurement is given up for
    a prediction."""
    if _is_measured(below) and not _is_measured(entries):
        return below
    least, most = min(entries), max(entries)
    return {n: entry for n, entry in below.items() if not least <= n <= most} | entries


def _is_measured(entries: Entries) -> bool:
    return any(how(entry) == "measured" for entry in entries.values())
