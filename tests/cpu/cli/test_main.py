from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import ModuleType

import pytest
from typer.testing import CliRunner

import firebox
from firebox.cli import main as cli
from firebox.errors import CheckpointError, EngineDied, OutOfMemory


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "firebox", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.alone
def test_version_is_the_packages_and_quick():
    """Best of three: a busy machine is not the program's fault, an import of torch or transformers is."""
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        done = run("--version")
        seconds.append(time.perf_counter() - began_s)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"firebox {firebox.__version__}\n", "")
    assert min(seconds) < 0.6


def test_starting_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['firebox', '--version']\n"
        "from firebox.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn', 'zmq', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_verbs_are_the_files_that_define_themselves():
    helped = CliRunner().invoke(cli.build(), ["--help"])
    assert helped.exit_code == 0
    listed = helped.stdout.split("Commands:")[1].split()
    assert {"serve", "generate", "cards"} <= set(listed)
    assert not {"main", "options"} & set(listed)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Usage:"),
        (["no-such-verb"], "No such command"),
        (["serve", "--no-such-flag"], "No such option"),
        (["serve", "--port", "many"], "--port"),
        (["serve", "--dtype", "int3"], "--dtype"),
        (["generate"], "error: give either --prompt or"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "error: give either --prompt or"),
        (["generate", "--prompt-file", "/no/such/file"], "error: --prompt-file: "),
        (["generate", "no-such-model", "--prompt", "a"], "error: there is no model 'no-such-model'"),
        (["serve", "no-such-model"], "hint: a folder"),
    ],
)
def test_a_wrong_call_says_why_and_exits_2(arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointError("bad", hint="better"), 2),
        (OutOfMemory("bad", hint="better"), 1),
        (EngineDied("bad"), 1),
    ],
)
def test_our_errors_become_a_message_a_hint_and_a_status(monkeypatch, capsys, error, status):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "build", lambda: fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == status
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "error: bad\n" + ("hint: better\n" if error.hint else "")


def test_our_mistakes_keep_their_traceback(monkeypatch):
    def fail() -> None:
        raise AssertionError("7 == 8")

    monkeypatch.setattr(cli, "build", lambda: fail)
    with pytest.raises(AssertionError):
        cli.main()


def test_a_group_of_verbs_is_a_typer_app(monkeypatch):
    import typer

    group = typer.Typer()
    group.command("run")(lambda: print("ran"))
    group.command("report")(lambda: None)
    module = ModuleType("matrix")
    module.matrix = group  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "names", lambda room: ("matrix",))
    monkeypatch.setattr(cli, "load", lambda room, name: module)
    assert CliRunner().invoke(cli.build(), ["matrix", "run"]).stdout == "ran\n"


def test_importing_firebox_is_cheap_and_lazy():
    code = (
        "import sys, firebox\n"
        "assert not {'firebox.llm', 'torch', 'transformers', 'zmq'} & set(sys.modules)\n"
        "assert firebox.LLM and firebox.SamplingParams and 'torch' not in sys.modules\n"
        "try:\n    firebox.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'firebox' has no attribute 'nothing'\n"


def test_cards():
    done = run("cards", "--json", env={**os.environ, "COLUMNS": "200"})
    cards = {card["name"]: card for card in json.loads(done.stdout.splitlines()[-1])["cards"]}
    assert cards["firebox-tiny"] == {
        "name": "firebox-tiny",
        "model_type": "glm4_moe",
        "layers": 4,
        "experts": 16,
        "has_weights": True,
    }
    table = run("cards").stdout.splitlines()
    assert len(table) == len(cards) + 1
    assert any(line.split() == ["firebox-tiny", "glm4_moe", "4", "16", "yes"] for line in table)
