"""Writes docs/config.md from the fields of `firebox.config` and `firebox.env`; with --check, exits 1 when it
is stale."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

from firebox import config, env

TARGET = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEAD = """# Settings

<!-- Made by tools/config_docs.py from src/firebox/config.py and src/firebox/env.py. Change those, then run
`python tools/config_docs.py`; `make check` fails while this file is stale. -->

Every setting is a flag of `firebox serve`; those of model and engine are flags of `firebox generate` too.
A setting whose default is *derived* is filled in from the checkpoint and the machine when the engine starts;
`--explain` prints what it became, and why.
"""


def document() -> str:
    """The whole of docs/config.md."""
    sections = [_section(field) for field in dataclasses.fields(config.Config)]
    return "\n".join([HEAD, *sections, _environment()])


def _section(field: dataclasses.Field[typing.Any]) -> str:
    """One table: the settings of one dataclass of the config tree."""
    section = typing.get_type_hints(config.Config)[field.name]
    rows = [_row(section, setting) for setting in dataclasses.fields(section)]
    title = f"## {field.name.capitalize()}\n\n{(section.__doc__ or '').splitlines()[0]}\n"
    return "\n".join([title, _table(("flag", "type", "default", "what it does"), rows), ""])


def _row(section: type, setting: dataclasses.Field[typing.Any]) -> tuple[str, ...]:
    kind = typing.get_type_hints(section)[setting.name]
    choices = setting.metadata["choices"]
    shown = " ".join(f"`{choice}`" for choice in choices) if choices else _type_name(kind)
    default = (
        "*derived*"
        if setting.default is None and "default:" in setting.metadata["help"]
        else _value(setting.default)
    )
    return (_flag(setting.name, kind), shown, default, setting.metadata["help"])


def _flag(name: str, kind: object) -> str:
    if name == "model":
        return "`MODEL`"
    flag = f"--{name.replace('_', '-')}"
    return f"`{flag}` `--no-{flag.removeprefix('--')}`" if kind is bool else f"`{flag}`"


def _type_name(kind: object) -> str:
    parts = [part.__name__ for part in typing.get_args(kind) if part is not type(None)] or [
        getattr(kind, "__name__", str(kind))
    ]
    words = {"int": "integer", "float": "number", "str": "text", "bool": "yes or no", "Path": "folder"}
    return " or ".join(words.get(part, part) for part in parts)


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value}`"


def _environment() -> str:
    """The table of environment variables."""
    hints = typing.get_type_hints(env.Environment)
    rows = [
        (
            f"`{field.metadata['name']}`",
            _type_name(hints[field.name]),
            _value(field.default),
            field.metadata["help"],
        )
        for field in dataclasses.fields(env.Environment)
    ]
    table = _table(("variable", "type", "default", "what it does"), rows)
    return f"## Environment\n\nRead in `firebox.env` and nowhere else.\n\n{table}\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Writes the file, or checks it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not up to date"
    )
    check = parser.parse_args().check
    fresh = document()
    if check and (not TARGET.exists() or TARGET.read_text(encoding="utf-8") != fresh):
        print("docs/config.md is stale: run `python tools/config_docs.py`", file=sys.stderr)
        return 1
    if not check:
        TARGET.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
