from __future__ import annotations

import json
import subprocess

import pytest

from firebox.errors import ConfigError
from firebox.matrix import feasible
from firebox.matrix.base import Verdict
from firebox.matrix.cells import cells
from firebox.matrix.feasible import flags, infeasible, serve_arguments
from firebox.matrix.run import run
from firebox.matrix.spec import FitFor, parse
from firebox.matrix.store import Store

TEXT = """
command = "firebox serve glm-4.7-fp8 --port {port} --kv-cache-dtype {kv} --moe-backend {moe}"
[axes]
kv = ["bf16", "fp8"]
moe = ["a", "b"]
[fit]
gpu = "gb10"
tp = 2
"""


@pytest.fixture(autouse=True)
def _fresh():
    feasible._fit.cache_clear()
    yield
    feasible._fit.cache_clear()


def answers(monkeypatch, code: int, stdout: str, stderr: str = "") -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command, **_):
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(feasible.subprocess, "run", run)
    return asked


def test_what_does_not_fit_is_never_started_and_says_the_number(tmp_path, monkeypatch):
    problem = "31.5 GiB are missing on each GPU for one request of 4096 tokens"
    asked = answers(monkeypatch, 1, json.dumps({"fits": False, "problems": [problem]}))
    store = Store(tmp_path)

    def never(*_: object, **__: object):
        raise AssertionError("it was measured")

    assert run(parse(TEXT), TEXT, store, never)
    assert {attempt.result.verdict for attempt in store.attempts()} == {Verdict.INFEASIBLE}
    assert {attempt.result.cause for attempt in store.attempts()} == {problem}
    assert not (tmp_path / "logs").exists()
    assert sorted(asked) == [
        ["fit", "glm-4.7-fp8", "--gpu", "gb10", "--tp", "2", f"--kv-cache-dtype={kv}", "--json"]
        for kv in ("bf16", "fp8")
    ], "once for what fit can tell apart"


def test_what_fits_is_not_in_the_way(monkeypatch):
    answers(monkeypatch, 0, '{"fits": true, "problems": []}')
    assert infeasible(FitFor(gpu="gb10"), cells(parse(TEXT))[0]) is None


def test_a_question_that_fit_refuses_is_the_users_mistake(monkeypatch):
    answers(monkeypatch, 2, "", "error: there is no model 'glm-5'")
    with pytest.raises(ConfigError, match="there is no model"):
        infeasible(FitFor(gpu="gb10"), cells(parse(TEXT))[0])


def test_nobody_asked_or_another_server(monkeypatch):
    asked = answers(monkeypatch, 1, "")
    assert infeasible(None, cells(parse(TEXT))[0]) is None
    other = parse(TEXT.replace("firebox serve", "vllm serve"))
    assert infeasible(other.fit, cells(other)[0]) is None
    assert asked == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("firebox", "serve", "m"), ("m",)),
        (("/x/bin/firebox", "serve"), ()),
        (("python", "-m", "firebox", "serve", "--port", "1"), ("--port", "1")),
        (("vllm", "serve", "firebox"), None),
        (("python", "firebox.py", "serve"), None),
    ],
)
def test_what_is_a_firebox_serve(argv, expected):
    assert serve_arguments(argv) == expected


def test_flags():
    assert flags(("m", "--cuda-graph", "off", "--mem-fraction=0.5", "--strict", "--no-prefix-cache")) == {
        "model": "m",
        "cuda_graph": "off",
        "mem_fraction": "0.5",
        "strict": "true",
        "prefix_cache": "false",
    }
    with pytest.raises(ConfigError, match="--port has no value"):
        flags(("--port",))
