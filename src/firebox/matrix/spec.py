"""The grid as its author wrote it: a TOML file, read strictly.

    name = "moe backends"
    command = "firebox serve qwen3-30b-a3b --port {port} --moe-backend {moe}"   # a string, or a list
    health = "/health"

    [environment]                 # of every server
    [axes]
    moe = ["triton", "marlin"]    # a plain value is put where the command says {moe}
    [axes.graph]                  # or names what a value stands for
    off = { flags = ["--cuda-graph", "off"] }
    piecewise = { flags = ["--cuda-graph", "piecewise"], env = { DEBUG = "1" } }

    [[skip]]
    when = 'moe = "marlin" and graph = "off"'
    [load]   [limits]   [repeat]   [fit]

Flags go where the command says {graph}, as arguments of their own; where it does not, to its end. {python} is
the Python that runs this.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.matrix._tables import at_least, refuse_unknown, struct, table
from firebox.matrix.base import Load
from firebox.matrix.skip import Skip

KEYS = ("name", "command", "health", "environment", "axes", "skip", "load", "limits", "repeat", "fit")
RESERVED = ("port", "python")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Scalar = str | int | float | bool


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One value of an axis. `text` replaces {axis} in the command; `flags` are arguments, `env` variables."""

    name: Scalar
    text: str | None = None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = {}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `start_s`: until the server is healthy; `cell_s`: for the measurement; `silence_s`: without a
    piece of any answer; `stop_s`: between SIGTERM and SIGKILL.

    `attempts`: after so many attempts during which this program, or the machine, ended, the cell is given up
    as UNKNOWN. None: it is tried again each time, because an end from outside says nothing about the cell.
    """

    start_s: float = 600.0
    cell_s: float = 1800.0
    silence_s: float = 60.0
    stop_s: float = 15.0
    attempts: int | None = None


class Repeat(msgspec.Struct, frozen=True, kw_only=True):
    """`rounds`: how often each cell is run, each time in another round. `seed`: of the order."""

    rounds: int = 1
    seed: int = 0


class FitFor(msgspec.Struct, frozen=True, kw_only=True):
    """Cells that are a `firebox serve` are judged for `gpu` by `firebox fit` before anything is started."""

    gpu: str
    tp: int = 1


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `axes`: in the file's order. `skips`: expressions, see skip.py."""

    name: str
    command: tuple[str, ...]
    axes: Mapping[str, tuple[Setting, ...]]
    health: str = "/health"
    environment: Mapping[str, str] = {}
    skips: tuple[str, ...] = ()
    load: Load = Load()
    limits: Limits = Limits()
    repeat: Repeat = Repeat()
    fit: FitFor | None = None

    @property
    def values(self) -> Mapping[str, tuple[Scalar, ...]]:
        """The names of each axis' values."""
        return {axis: tuple(setting.name for setting in found) for axis, found in self.axes.items()}


def read(path: Path) -> Spec:
    """The specification in a TOML file. Raises ConfigError."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def parse(text: str, name: str = "matrix") -> Spec:
    """The same from its text; `name`: what it is called unless it says so. Raises ConfigError."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the specification is not TOML: {error}") from error
    refuse_unknown(found, "the specification", KEYS)
    axes = {axis: _settings(axis, values) for axis, values in _axes(found).items()}
    spec = Spec(
        name=str(found.get("name", name)),
        command=_command(found.get("command")),
        axes=axes,
        health=_text(found.get("health", "/health"), "health"),
        environment=_texts(found.get("environment", {}), "environment"),
        skips=tuple(_skip(entry) for entry in _list(found.get("skip", []), "skip")),
        load=struct(found.get("load", {}), "[load]", Load),
        limits=struct(found.get("limits", {}), "[limits]", Limits),
        repeat=struct(found.get("repeat", {}), "[repeat]", Repeat),
        fit=struct(found["fit"], "[fit]", FitFor) if "fit" in found else None,
    )
    _check(spec)
    return spec


def skips(spec: Spec) -> tuple[Skip, ...]:
    """Its constraints, ready to be asked. Raises ConfigError for one that is not about its axes."""
    return tuple(Skip(text, spec.values) for text in spec.skips)


def _axes(found: Mapping[str, Any]) -> Mapping[str, Any]:
    axes = found.get("axes", {})
    if not isinstance(axes, dict) or not axes:
        raise ConfigError("the specification has no axes", hint='[axes]\nmoe = ["triton", "marlin"]')
    for axis in axes:
        if not NAME.fullmatch(axis) or axis in RESERVED:
            raise ConfigError(
                f"an axis is called {axis!r}", hint="letters, digits and _; not port, not python"
            )
    return axes


def _settings(axis: str, values: Any) -> tuple[Setting, ...]:
    if isinstance(values, list):
        found = tuple(Setting(name=value, text=_plain(axis, value)) for value in values)
    elif isinstance(values, dict):
        found = tuple(_setting(f"axes.{axis}.{name}", name, value) for name, value in values.items())
    else:
        raise ConfigError(f"axes.{axis} is {values!r}", hint="a list of values, or a table of them")
    if not found:
        raise ConfigError(f"axes.{axis} has no values", hint="at least one")
    names = [str(setting.name) for setting in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"axes.{axis} has a value twice: {', '.join(names)}")
    return found


def _plain(axis: str, value: Any) -> str:
    if not isinstance(value, Scalar):
        raise ConfigError(f"axes.{axis} has {value!r}", hint="text, a number, true or false")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _setting(where: str, name: str, value: Any) -> Setting:
    if isinstance(value, str):
        return Setting(name=name, text=value)
    given = table(value, where, ("flags", "env"))
    flags = tuple(_text(flag, f"{where}.flags") for flag in _list(given.get("flags", []), f"{where}.flags"))
    return Setting(name=name, flags=flags, env=_texts(given.get("env", {}), f"{where}.env"))


def _command(found: Any) -> tuple[str, ...]:
    parts = shlex.split(found) if isinstance(found, str) else found
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"command is {found!r}", hint='command = "firebox serve --port {port}"')
    if not any("{port}" in part for part in parts):
        raise ConfigError("the command does not say where {port} goes", hint="--port {port}")
    return tuple(parts)


def _skip(entry: Any) -> str:
    return _text(table(entry, "[[skip]]", ("when",)).get("when"), "skip.when")


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{where} is {found!r}", hint="text")
    return found


def _texts(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"{where} is {found!r}", hint='a table of texts, such as { DEBUG = "1" }')
    return found


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise ConfigError(f"{where} is {found!r}", hint="a list")
    return found


def _check(spec: Spec) -> None:
    load, limits = spec.load, spec.limits
    if not load.concurrency or len(set(load.concurrency)) < len(load.concurrency):
        raise ConfigError(
            f"load.concurrency is {list(load.concurrency)}", hint="different numbers, at least one"
        )
    for name, number in (("concurrency", min(load.concurrency)), ("prompt_tokens", load.prompt_tokens)):
        at_least(f"load.{name}", number, 1)
    for name in ("output_tokens", "requests", "repeats"):
        at_least(f"load.{name}", getattr(load, name), 1)
    for name in ("start_s", "cell_s", "silence_s", "stop_s"):
        at_least(f"limits.{name}", getattr(limits, name), 0.1)
    at_least("limits.attempts", limits.attempts, 1)
    at_least("repeat.rounds", spec.repeat.rounds, 1)
    if not spec.health.startswith("/"):
        raise ConfigError(f"health is {spec.health!r}", hint='a path, such as "/health"')
    if spec.fit is not None:
        find_gpu(spec.fit.gpu)
    _check_placeholders(spec)
    skips(spec)


def _check_placeholders(spec: Spec) -> None:
    known = (*RESERVED, *spec.axes)
    flags = [flag for found in spec.axes.values() for setting in found for flag in setting.flags]
    for part in (*spec.command, *flags):
        for name in re.findall(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", part):
            refuse_unknown([name], f"the command's {part!r}", known)
    for axis, settings in spec.axes.items():
        placed = any(f"{{{axis}}}" in part for part in spec.command)
        for setting in settings:
            if setting.text is not None and not placed:
                raise ConfigError(
                    f"axis {axis} changes nothing: the command does not say {{{axis}}}",
                    hint=f"--{axis} {{{axis}}}, or values with flags",
                )
            if setting.text is None and placed and f"{{{axis}}}" not in spec.command:
                raise ConfigError(
                    f"axis {axis} has flags or variables, and {{{axis}}} is only a part of an argument",
                    hint=f"{{{axis}}} as an argument of its own, or not at all",
                )
