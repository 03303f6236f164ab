"""What makes a checkout installable: pins, which constraints file, the set-up, generated documents."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tools import config_docs, setup_venv

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def asked_for() -> set[str]:
    """Every package that pyproject.toml names, development included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {re.split(r"[^\w.-]", line)[0] for line in lines}


@pytest.mark.parametrize("name", ["constraints-cpu.txt", "constraints-cuda.txt"])
def test_everything_asked_for_is_pinned(name: str) -> None:
    assert asked_for() <= set(pins(name)), asked_for() - set(pins(name))


def test_constraints_differ_in_torch_alone() -> None:
    cpu, cuda = pins("constraints-cpu.txt"), pins("constraints-cuda.txt")
    assert {name for name in cpu | cuda if cpu.get(name) != cuda.get(name)} == {"torch"}


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints-cpu.txt", "constraints-cuda.txt", "Makefile", ".ci/run"]
)
def test_no_file_names_a_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"index-url|find-links|://", text)


@pytest.mark.parametrize(
    ("system", "gpu", "cpu_build", "expected"),
    [
        ("Linux", False, True, "constraints-cpu.txt"),
        ("Linux", True, True, "constraints-cuda.txt"),
        ("Linux", False, False, "constraints-cuda.txt"),
        ("Darwin", False, False, "constraints-cpu.txt"),
    ],
)
def test_constraints_for_a_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, gpu: bool, cpu_build: bool, expected: str
) -> None:
    monkeypatch.setattr(setup_venv.platform, "system", lambda: system)
    monkeypatch.setattr(setup_venv, "_has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(setup_venv, "_cpu_torch_on_offer", lambda: cpu_build)
    assert setup_venv._constraints() == expected


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[str, ...]]]:
    """A checkout of its own with an empty .venv; the list grows by one entry for each call of pip."""
    for name in ("pyproject.toml", "constraints-cpu.txt", "constraints-cuda.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup_venv, "ROOT", tmp_path)
    monkeypatch.setattr(setup_venv, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_venv, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(setup_venv, "_cpu_torch_on_offer", lambda: True)
    monkeypatch.setattr(setup_venv, "_has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(setup_venv, "_pip", lambda *arguments: calls.append(arguments))
    return tmp_path, calls


def test_setup_installs_once(
    checkout: tuple[Path, list[tuple[str, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, calls = checkout
    assert [setup_venv.main(), setup_venv.main()] == [0, 0]
    assert len(calls) == 1
    assert "constraints-cpu.txt" in calls[0]
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints-cpu.txt", "constraints-cuda.txt"])
def test_setup_installs_again_after_a_change(checkout: tuple[Path, list[tuple[str, ...]]], name: str) -> None:
    folder, calls = checkout
    setup_venv.main()
    (folder / name).write_text((folder / name).read_text() + "\n# changed\n")
    setup_venv.main()
    assert len(calls) == 2


def test_a_torn_stamp_counts_as_none(checkout: tuple[Path, list[tuple[str, ...]]]) -> None:
    folder, calls = checkout
    (folder / ".venv" / "stamp.json").write_text('{"fingerprint": ')
    setup_venv.main()
    assert len(calls) == 1


def test_config_docs_are_up_to_date() -> None:
    assert config_docs.TARGET.read_text(encoding="utf-8") == config_docs.document()


def test_config_docs_notice_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_docs, "TARGET", tmp_path / "config.md")
    monkeypatch.setattr("sys.argv", ["config_docs.py", "--check"])
    assert config_docs.main() == 1
    config_docs.TARGET.write_text(config_docs.document().replace("30000", "8000"))
    assert config_docs.main() == 1
    assert "stale" in capsys.readouterr().err
    config_docs.TARGET.write_text(config_docs.document())
    assert config_docs.main() == 0
