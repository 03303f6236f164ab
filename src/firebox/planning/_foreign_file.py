"""What is in a fused-MoE tuning file of SGLang or vLLM: for numbers of tokens, a tile each.

    {"triton_version": "3.4.0",  "64": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128,
     "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}, …}

The servers take the entry whose key is nearest to the tokens of a step. "triton_version" is vLLM's; SGLang
reads every key as a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firebox.errors import ConfigError

NEEDED = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
POWERS_OF_TWO = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps")
SPLIT_K, USE_TMA, TRITON_VERSION = "SPLIT_K", "USE_TMA", "triton_version"
SIZES_TOKENS = tuple(2**i for i in range(13))  # 1 to 4096: where a file should have a key not too far off


@dataclass(frozen=True)
class TuningFile:
    """A file's `entries`, by their keys, in its order; its `triton_version`, if it says one; `warnings` from
    reading it."""

    path: Path
    entries: Mapping[str, Mapping[str, Any]]
    triton_version: str | None
    warnings: tuple[str, ...]


def read(path: Path) -> TuningFile:
    """Raises ConfigError, naming file and key, for what cannot be judged at all: no JSON object of entries,
    an entry that lacks a number it needs."""
    warnings: list[str] = []
    document = _document(path, warnings)
    version = document.pop(TRITON_VERSION, None)
    entries = {}
    for key, entry in document.items():
        if re.fullmatch(r"[1-9]\d*", key) is None:
            warnings.append(f"the key {key!r} is not a number of tokens: servers fail to read the file")
            continue
        entries[key] = _checked(path, key, entry)
        warnings += _entry_warnings(key, entry)
    if not entries:
        raise ConfigError(f"{path} has no entry", hint="its keys are numbers of tokens")
    return TuningFile(
        path, entries, None if version is None else str(version), (*warnings, *_key_warnings(entries))
    )


def _document(path: Path, warnings: list[str]) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        warnings.extend(f"{name!r} stands in the file more than once; the last one counts" for name in twice)
        return dict(found)

    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except OSError as error:
        raise ConfigError(f"--moe-config: {error}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a JSON object", hint='it holds {"64": {"BLOCK_SIZE_M": …}, …}')
    return document


def _checked(path: Path, key: str, entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: key {key!r} holds {entry!r}", hint=f"an object with {', '.join(NEEDED)}")
    for name in NEEDED:
        if name not in entry:
            raise ConfigError(f"{path}: key {key!r} has no {name}", hint=f"it needs {', '.join(NEEDED)}")
        if type(entry[name]) is not int or entry[name] < 1:
            raise ConfigError(
                f"{path}: key {key!r} has {name} = {entry[name]!r}", hint="a whole number, at least 1"
            )
    return entry


def _entry_warnings(key: str, entry: Mapping[str, Any]) -> Iterator[str]:
    for name in POWERS_OF_TWO:
        if entry[name] & (entry[name] - 1):
            yield f"key {key}: {name} = {entry[name]} is not a power of two, and Triton takes no other"
    for name in entry:
        if name not in (*NEEDED, SPLIT_K, USE_TMA):
            yield f"key {key}: {name} = {entry[name]!r} is unknown here and not judged"
    if entry.get(SPLIT_K, 1) != 1:
        yield f"key {key}: SPLIT_K = {entry[SPLIT_K]!r} is not read: vLLM sets it to 1"


def _key_warnings(entries: Mapping[str, Any]) -> Iterator[str]:
    keys = [int(key) for key in entries]
    if keys != sorted(keys):
        yield f"the keys do not increase: {', '.join(entries)}"
    far = {size: min(keys, key=lambda key: abs(key - size)) for size in SIZES_TOKENS}
    for used in dict.fromkeys(far.values()):
        sizes = [size for size, key in far.items() if key == used and not size / 2 <= key <= size * 2]
        if sizes:
            spelled = ", ".join(map(str, sizes))
            yield f"no key near {spelled} tokens: servers take {used}'s there"
