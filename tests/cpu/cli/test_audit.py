"""`firebox audit`: exit status, the JSON document on the last line, the table, wrong calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from firebox.cli.main import build
from firebox.errors import ConfigError

TABLES = Path(__file__).parents[1] / "bench" / "audit" / "tables"
GOOD = "concurrency,output tok/s,TPOT (ms)\n8,150,50\n"
BAD = GOOD + "8,400,50\n"


def audit(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(build(), ["audit", *arguments], input=text)


def document(result: Result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def test_yes_is_0_and_no_is_1() -> None:
    assert audit("-", text=GOOD).exit_code == 0
    done = audit("-", "--json", text=BAD)
    found = document(done)
    assert (done.exit_code, found["impossible"]) == (1, 1)
    good, bad = found["rows"]
    assert (good["row"], good["verdict"], good["law"], good["factor"]) == (1, "possible", None, None)
    assert (bad["row"], bad["verdict"], bad["law"]) == (2, "impossible", "tokens_by_latency")
    assert (bad["claimed"], bad["implied"], bad["factor"]) == (400, 160, 2.5)


def test_suspicion_is_no_reason_to_fail() -> None:
    arguments = ("--card", "qwen3.5-397b-a17b-nvfp4", "--gpu", "gb10", "--tp", "4", "--json")
    done = audit(str(TABLES / "qwen-matrix.md"), *arguments)
    found = document(done)
    suspicious = [row["claim"]["output_tok_s_sum"] for row in found["rows"] if row["verdict"] == "suspicious"]
    assert (done.exit_code, found["impossible"], suspicious) == (0, 0, [156.2, 144.6, 143.1])
    assert "weights as this model stores them" in done.stderr


def test_the_table_is_data_and_the_log_is_not() -> None:
    done = audit(str(TABLES / "little.md"))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    (row,) = [line for line in lines if "395.2" in line and "impossible" in line]
    for cell in ("157.8", "2.504", "littles_law"):
        assert cell in row
    assert "read as: concurrency = concurrency, output tok/s = output_tok_s" in done.stderr
    assert "row 5: no number in output tok/s" in done.stderr and "no number" not in done.stdout


def test_what_rows_do_not_say() -> None:
    text = "output tok/s,TPOT (ms)\n400,50\n"
    assert document(audit("-", "--json", text=text))["rows"][0]["verdict"] == "unknown"
    assert document(audit("-", "--json", "--concurrency", "8", text=text))["rows"][0]["factor"] == 2.5
    drafted = "concurrency,output tok/s,ITL (ms)\n8,400,50\n"
    (row,) = document(audit("-", "--json", "--drafts", "3", text=drafted))["rows"]
    assert row["verdict"] == "possible"
    assert document(audit("-", "--json", text=drafted))["rows"][0]["verdict"] == "suspicious"


def test_columns_by_flag() -> None:
    text = "n,latency (s),rate\n4,2,9\n"
    done = audit(
        "-", "--json", "--column", "n=concurrency", "--column", "latency (s)=e2e_ms",
        "--column", "rate=requests_per_s", text=text,
    )  # fmt: skip
    (row,) = document(done)["rows"]
    assert (row["law"], row["claimed"], row["implied"]) == ("littles_law", 9, 2)


@pytest.mark.parametrize(
    ("arguments", "text", "says"),
    [
        (("-",), "prose", "no table"),
        (("-",), "concurrency,latency\n1,2\n", "may be e2e_ms, ttft_ms, tpot_ms, itl_ms"),
        (("-", "--column", "x"), GOOD, "--column 'x'"),
        (("-", "--column", "TPOT (ms)=speed"), GOOD, "no such field"),
        (("-", "--column", "speed=tpot_ms"), GOOD, "no column is called 'speed'"),
        (("-", "--card", "gpt-oss-120b"), GOOD, "belong together"),
        (("-", "--card", "gpt-oss-120b", "--gpu", "gb10", "--tp", "3"), GOOD, "cannot be cut"),
        (("-", "--card", "gpt-oss-120b", "--gpu", "gb10", "--tp", "1", "--gpus", "1"), GOOD, "say the same"),
        (("-", "--concurrency", "0"), GOOD, "--concurrency 0"),
        (("no-such-file.csv",), None, "cannot be read"),
    ],
)
def test_wrong_calls(arguments: tuple[str, ...], text: str | None, says: str) -> None:
    done = audit(*arguments, text=text)
    assert isinstance(done.exception, ConfigError) and says in str(done.exception)


def test_a_wrong_call_is_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "firebox", "audit", str(tmp_path / "none.csv")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "hint: " in done.stderr
