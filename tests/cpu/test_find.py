"""find.py, on a room of its own made for the test: what counts as a thing, and what an absent one says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import firebox
from firebox import find

FILES = {
    "__init__.py": "",
    "base.py": "raise AssertionError('the contract is not a thing')",
    "_shared.py": "raise AssertionError('private files are not things')",
    "oak.py": "KIND = 'tree'",
    "fern.py": "KIND = 'plant'",
    "notes.txt": "not Python",
    "kv/__init__.py": "",
    "kv/fp8.py": "KIND = 'nested'",
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package firebox.garden_for_tests, gone again after the test."""
    name = "garden_for_tests"
    for path, text in FILES.items():
        target = tmp_path / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    monkeypatch.setattr(firebox, "__path__", [*firebox.__path__, str(tmp_path)])
    yield name
    for module in [module for module in sys.modules if module.startswith(f"firebox.{name}")]:
        del sys.modules[module]


def test_names_are_the_files_but_base_and_private(room: str) -> None:
    assert find.names(room) == ("fern", "kv", "oak")


def test_names_imports_no_thing(room: str) -> None:
    find.names(room)
    assert f"firebox.{room}.oak" not in sys.modules


def test_load_imports_that_file(room: str) -> None:
    assert find.load(room, "oak").KIND == "tree"
    assert find.load(room, "oak") is sys.modules[f"firebox.{room}.oak"]


def test_a_room_within_a_room(room: str) -> None:
    assert find.names(f"{room}.kv") == ("fp8",)
    assert find.load(f"{room}.kv", "fp8").KIND == "nested"


@pytest.mark.parametrize("absent", ["elm", "base", "_shared", "oak.leaf", ""])
def test_absent_thing_says_what_is_there(room: str, absent: str) -> None:
    with pytest.raises(KeyError) as caught:
        find.load(room, absent)
    assert all(name in str(caught.value) for name in (repr(absent)[1:-1], "fern", "kv", "oak"))


def test_absent_room() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_room"):
        find.names("no_such_room")


def test_broken_thing_raises_its_own_error(room: str, tmp_path: Path) -> None:
    (tmp_path / room / "broken.py").write_text("import module_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        find.load(room, "broken")
