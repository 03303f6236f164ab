"""Every environment variable that Firebox reads. Nothing else in the code touches `os.environ`.

`read()` looks at the environment when it is called and returns it typed; there is no cached copy, so a test
may change a variable. What other libraries read for themselves (HF_HOME, HF_HUB_OFFLINE, OMP_NUM_THREADS,
CUDA_VISIBLE_DEVICES) is theirs and not listed here. A variable that is set to the empty string counts as not
set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firebox.errors import ConfigError

SMEM_LIMIT = "FIREBOX_SMEM_LIMIT"
LOG_LEVELS = ("debug", "info", "warning", "error")


def variable(name: str, default: Any, parse: Callable[[str], Any], help: str) -> Any:
    """A field of Environment: the variable's name, how its text becomes a value, and its documentation."""
    return dataclasses.field(default=default, metadata={"name": name, "parse": parse, "help": help})


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("it must be at least 1")
    return value


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"it must be one of {', '.join(LOG_LEVELS)}")
    return text.lower()


@dataclass(frozen=True)
class Environment:
    """The environment, typed. One field a variable."""

    cache_dir: Path = variable(
        "FIREBOX_CACHE_DIR",
        Path("~/.cache/firebox"),
        _path,
        "folder for what can be made again: compiled kernels and their read-back",
    )
    smem_limit_bytes: int | None = variable(
        SMEM_LIMIT,
        None,
        _positive_int,
        "most bytes of shared memory a block may use; to try a small GPU's limit on a larger one",
    )
    log_level: str = variable(
        "FIREBOX_LOG_LEVEL", "info", _log_level, f"what the log on stderr shows: {', '.join(LOG_LEVELS)}"
    )


def read(environ: Mapping[str, str] | None = None) -> Environment:
    """The environment as it is now (or `environ`). Raises ConfigError, naming the variable, for a value that
    does not parse."""
    source = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Environment):
        name, text = field.metadata["name"], source.get(field.metadata["name"], "").strip()
        if text:
            values[field.name] = _parse(name, text, field.metadata["parse"])
    environment = Environment(**values)
    return dataclasses.replace(environment, cache_dir=environment.cache_dir.expanduser())


def smem_limit_bytes() -> int | None:
    """The same of one variable, which the choice of tiles asks for thousands of times. Raises ConfigError."""
    text = os.environ.get(SMEM_LIMIT, "").strip()
    return _parse(SMEM_LIMIT, text, _positive_int) if text else None


def for_process(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process to be started: this one's, and `extra`."""
    return {**os.environ, **extra}


def _parse(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"environment variable {name} is {text!r}", hint=str(error)) from error
