"""`firebox bench` against a real server with the bundled model. Seeds make the answers, and so the verdicts,
the same each time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import ServerProcess

LOAD = ["--concurrency", "1,4", "--prompt-tokens", "64", "--output-tokens", "96", "--requests", "2"]


def bench(server: ServerProcess, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "firebox", "bench", server.url, *LOAD, "--repeat", "2", "--seed", "5"]
    command += ["--db", str(tmp_path / "results.db"), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_sampled_answers_have_numbers_that_agree_with_the_server(
    server: ServerProcess, tmp_path: Path
) -> None:
    before = server.metrics()["firebox_generated_tokens_total"]
    status, found = bench(server, tmp_path, "--extra", '{"seed": 3, "temperature": 1.0}')
    generated = server.metrics()["firebox_generated_tokens_total"] - before
    assert status == 0, [row["why"] for row in found["rows"]]
    assert [(row["concurrency"], row["requests"], row["verdict"]) for row in found["rows"]] == [
        (1, 4, "ok"),
        (4, 16, "ok"),
    ]
    answers = sum(row["requests"] for row in found["rows"]) * 96
    beside = 2 + (1 + 4) * 8  # the request that asks what the server takes, and the warm-up
    assert generated == answers + beside
    for row in found["rows"]:
        assert row["prompt_tokens"] == 64 and row["output_tokens"] == 96 and row["cached_tokens"] == 0
        assert row["tokens_counted_by"] == "usage"
        assert 0 < row["output_tok_s_wall"] <= row["output_tok_s_sum"] * 1.15


def test_greedy_answers_that_loop_have_none(server: ServerProcess, tmp_path: Path) -> None:
    status, found = bench(server, tmp_path, "--temperature", "0", "--output-tokens", "300")
    assert status == 1 and not found["passed"]
    looping = [row for row in found["rows"] if row["verdict"] in ("garbage", "repetition")]
    assert looping
    for row in looping:
        assert row["output_tok_s_wall"] is None and row["ttft_ms"] is None and row["why"]


def test_chats_are_measured_too(server: ServerProcess, tmp_path: Path) -> None:
    status, found = bench(
        server, tmp_path, "--chat", "--extra", '{"seed": 3}', "--markdown", str(tmp_path / "r.md")
    )
    assert status == 0, [row["why"] for row in found["rows"]]
    assert "| 4 |" in (tmp_path / "r.md").read_text()
    assert all(row["prompt_tokens"] > 64 for row in found["rows"]), "the template's tokens are counted"
