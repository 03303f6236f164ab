"""The only discovery in Firebox: a room is a package, a thing is a module in it, its name is the key.

`names("models")` lists what is there, `load("models", "glm4_moe")` imports it. There are no registries.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


def names(room: str) -> tuple[str, ...]:
    """The things in a room (`"models"`, `"text.tool_parsers"`), sorted; `base` and `_private` files are not
    things."""
    package = importlib.import_module(f"firebox.{room}")
    return _names(tuple(package.__path__))


@functools.cache  # a model asks some thousand times, and files do not come and go
def _names(folders: tuple[str, ...]) -> tuple[str, ...]:
    found = (module.name for module in pkgutil.iter_modules(folders))
    return tuple(sorted(name for name in found if name != "base" and not name.startswith("_")))


def load(room: str, name: str) -> ModuleType:
    """Imports one thing. Raises KeyError, naming what is there, when the room has no such file."""
    if name not in names(room):
        raise KeyError(f"{room} has no {name!r}; it has: {', '.join(names(room))}")
    return importlib.import_module(f"firebox.{room}.{name}")
