"""`firebox tune --predict` as a process: what it writes, and what kill -9 costs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firebox.models import glm4_moe

SIZES = {
    "hidden_size": 128,
    "head_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_nextn_predict_layers": 0,
    "dtype": "bfloat16",
}
KILLS = 10


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(glm4_moe.TINY | SIZES))
    return folder


def start(model: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "firebox", "tune", str(model), "--gpu", "gb10", "--predict"]
    command += ["--max-batch-tokens", "1", "--budget", "600s", "--out", str(out), "--no-servers"]
    environment = os.environ | {"FIREBOX_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ours(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "nvidia_gb10" / "experts.json").read_text())
    return found


def test_ten_kills_change_nothing(model: Path, tmp_path: Path) -> None:
    """Killed at random moments of compiling and ranking, and started again each time: the files of a run that
    was left alone."""
    rng, out, cache = random.Random(7), tmp_path / "killed", tmp_path / "cache"
    kills = 0
    for _ in range(KILLS):
        process = start(model, out, cache)
        try:
            process.wait(timeout=rng.uniform(1.0, 4.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills == KILLS, "it ended before it was killed"
    last = start(model, out, cache)
    assert last.wait(timeout=300) == 0, last.communicate()[1]
    whole = start(model, tmp_path / "whole", cache)
    assert whole.wait(timeout=300) == 0
    assert ours(out) == ours(tmp_path / "whole")
    (key,) = set(ours(out)) - {"about"}
    assert key.startswith("bf16 hidden=128 inter=64")
    entries = ours(out)[key]
    assert isinstance(entries, dict) and set(entries) == {"1"}
    assert {entry["how"] for entry in entries.values()} == {"predicted"}
