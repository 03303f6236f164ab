"""`firebox fit --moe-config`: exit status, the JSON document on the last line, the table, wrong calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8,per_channel_quant=True.json"
SMALL = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, GROUP_SIZE_M=1, num_warps=4, num_stages=3)
LARGE = SMALL | dict(BLOCK_SIZE_M=64, BLOCK_SIZE_N=256, BLOCK_SIZE_K=128, num_stages=5, num_warps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


def fit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FIREBOX_CACHE_DIR": str(folder / "cache"), "COLUMNS": "300"}
    environment.pop("FIREBOX_SMEM_LIMIT", None)
    command = [sys.executable, "-m", "firebox", "fit", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=folder
    )


def file(folder: Path, name: str = NAME, **entries: dict[str, int]) -> str:
    path = folder / name
    path.write_text(json.dumps({key[1:]: entry for key, entry in entries.items()}))
    return str(path)


def test_yes_is_0_and_no_is_1(folder: Path) -> None:
    path = file(folder, k16=SMALL, k4096=LARGE)
    no = fit(folder, "--moe-config", path, "--gpu", "gb10", "--json")
    document = json.loads(no.stdout.splitlines()[-1])
    assert (no.returncode, document["fits"], document["file"], no.stderr) == (1, False, path, "")
    rows = {key: (r["shared_bytes"], r["limit_bytes"], r["fits"]) for key, r in document["keys"].items()}
    assert rows == {
        "16": (2 * 48 * 64, 101_376, True),
        "4096": (4 * (64 + 256) * 128, 101_376, False),
    }
    yes = fit(folder, "--moe-config", path, "--gpu", "h200", "--json")
    assert (yes.returncode, json.loads(yes.stdout.splitlines()[-1])["fits"]) == (0, True)


def test_the_table_is_data_and_the_warnings_are_not(folder: Path) -> None:
    path = file(folder, k16=SMALL, k4096=LARGE)
    done = fit(folder, "--moe-config", path, "--gpu", "gb10")
    (row,) = [line for line in done.stdout.splitlines() if "4096" in line]
    for cell in ("64×256×128", "163,840", "101,376", "mma.fp8", "yes", "does not fit"):
        assert cell in row
    last = done.stdout.splitlines()[-1]
    assert last == "1 of 2 entries do not fit gb10; the file's name is looked up by SGLang"
    assert "warning: no key near 1, 2, 4, 64," in done.stderr and "warning" not in done.stdout


def test_the_model_says_what_the_name_should_be(folder: Path) -> None:
    arguments = ("--gpu", "gb10", "--model", "glm-4.7-fp8", "--json")
    right = fit(folder, "--moe-config", file(folder, k16=SMALL), "--tp", "4", *arguments)
    document = json.loads(right.stdout.splitlines()[-1])
    assert right.returncode == 0 and document["looked_up_by"] == ["sglang"]
    assert not [line for line in document["warnings"] if "glm-4.7-fp8" in line]
    path = file(folder, "E=128,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8.json", k16=SMALL)
    wrong = fit(folder, "--moe-config", path, *arguments)
    document = json.loads(wrong.stdout.splitlines()[-1])
    assert wrong.returncode == 0 and document["looked_up_by"] == []  # it fits; nobody will look
    said = [line.split()[0] for line in document["warnings"] if "glm-4.7-fp8" in line]
    assert said == ["E=128", "N=384", "per_channel_quant=True"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--moe-config", NAME], "--gpu"),
        (["--moe-config", NAME, "--gpu", "gb11"], "error: no GPU is called 'gb11'"),
        (["--moe-config", NAME, "--gpu", "gb10", "--tp", "4"], "error: --tp needs --model"),
        (["glm-4.7-fp8", "--moe-config", NAME, "--gpu", "gb10"], "hint: --model glm-4.7-fp8"),
        (["--moe-config", NAME, "--gpu", "gb10", "--model", "no-such"], "error: there is no model 'no-such'"),
        (["--moe-config", "none.json", "--gpu", "gb10"], "No such file"),
        (["--moe-config", "half.json", "--gpu", "gb10"], "half.json: key '64' has no num_stages"),
        (["--moe-config", "text.json", "--gpu", "gb10"], "text.json is not JSON"),
    ],
)
def test_a_wrong_call_is_2(folder: Path, arguments: list[str], sentence: str) -> None:
    file(folder, k16=SMALL)
    file(folder, "half.json", k64={key: SMALL[key] for key in list(SMALL)[:-1]})
    (folder / "text.json").write_text("BLOCK_SIZE_M: 16")
    done = fit(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stdout + done.stderr and "Traceback" not in done.stderr
