"""Writing and reading fused-MoE tuning files, in the layout that SGLang's and vLLM's own tuners write.

    write(folder, lookup, pairs, origin) → paths      the files of one lookup, each with a note beside it
    save(path, entries)                               one file
    read(path) → TuningFile                           as planning.foreign judges it
    candidates_from(path) → (Tile, …)                 its tiles, to search among

What made a file stands in `<name>.firebox.txt`: SGLang reads every key of the JSON as a number of tokens, and
what is not an entry makes it fail.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firebox.planning import _foreign_file, _foreign_name
from firebox.planning._foreign_file import TRITON_VERSION, TuningFile
from firebox.planning._foreign_kernel import Tile
from firebox.planning._foreign_name import SPELLED
from firebox.planning.foreign import operands_of, tile_of
from firebox.tuning.servers.choose import Choice, Pair
from firebox.tuning.servers.names import VARIABLES, Lookup

NOTE = ".firebox.txt"
INDENT = 4


@dataclass(frozen=True)
class Origin:
    """Where a file's numbers come from. `how`: "predicted" or "measured"; `model`, `tp`, `gpu`: for what;
    `triton`: the version that compiled; `commit`: of Firebox, "" if not known."""

    how: str
    model: str
    tp: int
    gpu: str
    triton: str
    date: datetime.date
    commit: str = ""


def write(folder: Path, lookup: Lookup, pairs: Mapping[int, Pair], origin: Origin) -> tuple[Path, ...]:
    """Writes every file of the lookup and its note; `pairs`: number of tokens → the choices. Returns the
    paths of the JSON files. Replaces what is there."""
    for tokens, pair in pairs.items():
        rows = {pair.first.tile.block_m, pair.second.tile.block_m}
        assert len(rows) == 1, f"{tokens} tokens: rows are sorted once, not for blocks of {rows}"
    written = []
    for names, second in ((lookup.first, False), (lookup.second, True)):
        choices = {n: pair.second if second else pair.first for n, pair in sorted(pairs.items())}
        times = {n: pair.us if not lookup.second else choices[n].us for n, pair in sorted(pairs.items())}
        for name in names:
            path = folder / lookup.folder / name
            save(path, {str(n): entry(choice) for n, choice in choices.items()})
            note = "\n".join(_note(folder, lookup, times, origin, second)) + "\n"
            note_of(path).write_text(note, encoding="utf-8")
            written.append(path)
    return tuple(written)


def entry(choice: Choice) -> dict[str, int]:
    """As it stands in a file."""
    tile = choice.tile
    return {
        "BLOCK_SIZE_M": tile.block_m,
        "BLOCK_SIZE_N": tile.block_n,
        "BLOCK_SIZE_K": tile.block_k,
        "GROUP_SIZE_M": choice.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def save(path: Path, entries: Mapping[str, Mapping[str, Any]], triton_version: str | None = None) -> None:
    """Writes one file, keys ascending; its folder is made. `triton_version`: for vLLM's files alone, SGLang
    fails on it."""
    ascending = {key: dict(entries[key]) for key in sorted(entries, key=int)}
    version = {} if triton_version is None else {TRITON_VERSION: triton_version}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**version, **ascending}, indent=INDENT) + "\n", encoding="utf-8")


def note_of(path: Path) -> Path:
    """The note beside a file."""
    return path.with_name(path.name + NOTE)


def read(path: Path) -> TuningFile:
    """Raises ConfigError, naming file and key, for what is no tuning file."""
    return _foreign_file.read(path)


def candidates_from(path: Path) -> tuple[Tile, ...]:
    """The different tiles of a file, in its order, as the servers run them, without TMA. Raises ConfigError
    as `read` does."""
    name = _foreign_name.parse(path.name)
    operands = operands_of(name)
    tiles = (tile_of(one, name, operands) for one in read(path).entries.values())
    return tuple(dict.fromkeys(replace(tile, tma=False) for tile in tiles))


def _note(
    folder: Path, lookup: Lookup, times: Mapping[int, float], origin: Origin, second: bool
) -> Iterator[str]:
    of = "both products" if not lookup.second else "the second product" if second else "the first product"
    root = folder / lookup.folder.parts[0]
    yield f"{origin.how} by firebox, commit {origin.commit or 'not known'}, {origin.date.isoformat()}"
    if origin.how == "predicted":
        yield "every tile was compiled for the GPU; times come from a model, nothing was run"
    yield f"model   {origin.model}, tensor parallel {origin.tp}"
    yield f"gpu     {origin.gpu}"
    yield f"triton  {origin.triton}"
    yield f"server  {SPELLED[lookup.server]}, {of}; to use it: {VARIABLES[lookup.server]}={root.resolve()}"
    if lookup.fused:
        yield f"shared  {lookup.fused} shared expert counted among the experts"
    yield "tokens  µs a layer"
    for tokens, us in times.items():
        yield f"{tokens:>6}  {us:.1f}"
