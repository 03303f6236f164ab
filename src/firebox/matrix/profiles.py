"""A configuration to take away: a command line, and a TOML profile.

Of a `firebox serve` the profile has one key a setting, named as the flag with underscores, for
`firebox serve --profile FILE`. Of any other server it has the command and the environment.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from firebox.config import Config
from firebox.matrix.cells import Cell
from firebox.matrix.feasible import flags, serve_arguments

PORT = 30000


def command_line(cell: Cell) -> str:
    """The cell as one line for a shell, on port PORT."""
    env = [f"{name}={shlex.quote(_ported(value))}" for name, value in cell.env.items()]
    return " ".join([*env, shlex.join(_ported(part) for part in cell.argv)])


def profile(cell: Cell, title: str) -> str:
    """The cell as a TOML file; `title` becomes its first comment."""
    lines = [f"# {line}" for line in title.splitlines()]
    arguments = serve_arguments(cell.argv)
    if arguments is None:
        argv = ", ".join(_toml(_ported(part)) for part in cell.argv)
        lines += [f"command = [{argv}]", "", "[environment]"]
        lines += [f"{_toml(name)} = {_toml(_ported(value))}" for name, value in cell.env.items()]
    else:
        if cell.env:
            lines += [
                "# set before `firebox serve --profile`: " + " ".join(f"{k}={v}" for k, v in cell.env.items())
            ]
        found = {name: value for name, value in flags(arguments).items() if name != "port"}
        lines += [f"{name} = {_toml(value)}" for name, value in settings(found).items()]
    return "\n".join(lines) + "\n"


def settings(found: Mapping[str, str]) -> dict[str, Any]:
    """Flags with the types of the config's fields; what the config does not have stays text."""
    kinds = {
        field.name: str(field.type)
        for group in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(Config(), group.name))
    }
    return {name: _typed(value, kinds.get(name, "str")) for name, value in found.items()}


def _typed(value: str, kind: str) -> Any:
    if kind.startswith("bool"):
        return value == "true"
    if kind.startswith("int"):
        return int(value)
    return float(value) if kind.startswith("float") else value


def _ported(text: str) -> str:
    return text.replace("{port}", str(PORT)).replace("{python}", "python")


def _toml(value: Any) -> str:
    """JSON's texts, numbers and truths are TOML's, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
