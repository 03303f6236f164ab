from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from firebox.cli import main as cli
from firebox.errors import ConfigError

ROW = {
    "op": "moe",
    "tokens": [1, 16],
    "kernel": "moe_few",
    "format": "fp8_block",
    "why": "tuned",
    "fallback": False,
}
LEDGER: dict[str, Any] = {
    "model": "m",
    "versions": {"triton": "3.9.0"},
    "settings": {"engine": {"page_tokens": 16, "strict": False}},
    "reasons": [],
    "ledger": [ROW, {**ROW, "tokens": [17, 2048], "kernel": "moe_sorted"}, {**ROW, "kernel": "second"}],
}


def compared(folder: Path, first: Any, second: Any) -> list[dict[str, Any]]:
    return run(folder, second, first)[1]


def run(tmp_path: Path, second: Any, first: Any = LEDGER) -> tuple[int, list[dict[str, Any]]]:
    for name, document in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(document))
    done = CliRunner().invoke(
        cli.build(), ["ledger", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]
    )
    return done.exit_code, json.loads(done.stdout)["changes"]


def test_equal_ledgers_differ_in_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, LEDGER) == (0, [])


def test_every_difference_is_named_once(tmp_path: Path) -> None:
    other = copy.deepcopy(LEDGER)
    other["ledger"][1].update(kernel="torch", why="no kernel accepts", fallback=True)
    del other["ledger"][2]
    other["settings"]["engine"]["page_tokens"] = 32
    other["versions"]["triton"] = "3.6.0"
    status, changes = run(tmp_path, other)
    assert status == 1
    assert [(c["what"], c["name"], c["first"], c["second"]) for c in changes] == [
        (
            "operation",
            "moe [17, 2048]",
            "moe_sorted (fp8_block): tuned",
            "torch (fp8_block), a fallback: no kernel accepts",
        ),
        ("operation", "moe [1, 16] #2", "second (fp8_block): tuned", None),
        ("setting", "engine.page_tokens", "16", "32"),
        ("version", "triton", "3.9.0", "3.6.0"),
    ]


def test_another_tile_more_shared_memory_or_another_mode_is_a_difference(tmp_path: Path) -> None:
    launch = {
        "op": "moe/experts/moe_down",
        "config": {"rows": 64, "tma": True},
        "shared_bytes": 1000,
        "instruction": "mma.fp8",
        "native": True,
        "mode": "graph",
        "how": "tuned",
        "layers": 4,
    }
    first = {**LEDGER, "ledger": [ROW | launch]}
    said = "moe_few (fp8_block), 4 layers, rows=64 tma=True, 1000 bytes shared, mma.fp8, graph, tuned: tuned"
    (tmp_path / "same").mkdir()
    assert compared(tmp_path / "same", first, first) == []
    for name, value, now in (
        ("config", {"rows": 32, "tma": True}, said.replace("rows=64", "rows=32")),
        ("shared_bytes", 2000, said.replace("1000", "2000")),
        ("mode", "eager", said.replace("graph", "eager")),
        ("native", False, said.replace("mma.fp8", "mma.fp8, emulated")),
        ("how", "predicted", said.replace("graph, tuned", "graph, predicted")),
    ):
        changes = compared(tmp_path, first, {**LEDGER, "ledger": [ROW | launch | {name: value}]})
        assert [(c["name"], c["first"], c["second"]) for c in changes] == [
            ("moe/experts/moe_down [1, 16]", said, now)
        ]


@pytest.mark.parametrize("text", ["no json", "[]", '{"ledger": 1}'])
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_text(text)
    done = CliRunner().invoke(cli.build(), ["ledger", "diff", str(tmp_path / "a"), str(tmp_path / "a")])
    assert isinstance(done.exception, ConfigError)
