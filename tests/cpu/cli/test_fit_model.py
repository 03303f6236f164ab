"""`firebox fit MODEL`: exit status, the JSON document on the last line, what a person reads, wrong calls."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firebox.text.folder import bundled, resolve_folder
from tests.support.planning import FP8_BLOCK
from tests.support.run_cache import run_cache

LAUNCH = {
    *("op", "kernel", "format", "tokens", "config", "shared_bytes", "limit_bytes", "registers"),
    *("spill_bytes", "instruction", "native", "weight_only", "fits", "path", "why", "losers"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(run_cache(tmp_path_factory)))
        yield tmp_path_factory.mktemp("fit")


def fit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "300"}
    environment.pop("FIREBOX_SMEM_LIMIT", None)
    command = [sys.executable, "-m", "firebox", "fit", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=folder
    )


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_model_that_fits(folder: Path) -> None:
    done = fit(folder, "gpt-oss-20b", "--gpu", "gb10", "--json")
    found = document(done)
    assert (done.returncode, found["fits"], found["problems"]) == (0, True, [])
    assert (found["model"], found["gpu"], found["tp"]) == ("gpt-oss-20b", "gb10", 1)
    assert found["checked"] == ["memory", "launches"]
    memory, roof = found["memory"], found["roof"]
    # 12.8 in the checkpoint; kept with scales padded to 16 groups and biases in float32
    assert memory["weights_bytes"] / 2**30 == pytest.approx(12.866, abs=0.001)
    assert memory["kv_bytes_per_token"] == 24_576 and memory["kv_tokens"] > 1_000_000
    assert roof["tokens_per_s"]["1"] == pytest.approx(231e9 / roof["bytes_per_token"], rel=0.001)
    assert set(roof["tokens_per_s"]) == {"1", "8", "64"}
    rows = found["launches"]
    assert all(row.keys() >= LAUNCH for row in rows)
    assert all(row["fits"] and row["native"] and row["shared_bytes"] <= 101_376 for row in rows)
    gate_up = [row["tokens"] for row in rows if row["op"] == "moe_gate_up"]
    assert gate_up[0][0] == 1 and gate_up[-1][1] == 8192
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(gate_up))
    assert found["not_planned"] == []
    assert {row["layer"] for row in rows} == {"embedding", "attention_block", "moe_block", "head", "sampling"}
    for row in (row for row in rows if row["operation"] == "experts"):
        assert set(row["losers"]) == {"one", "few", "sorted", "block-scaled"} - {row["path"]}
    routed = [choice for choice in found["choices"] if choice["operation"] == "experts"]
    assert (routed[0]["tokens"][0], routed[-1]["tokens"][1]) == (1, 8192)
    assert {"takes one token", "takes up to 128 tokens"} <= {
        why for choice in routed for why in choice["losers"].values()
    }
    library = [row for row in rows if row["kernel"] == "cublas"]
    assert library and all((row["shared_bytes"], row["config"]) == (0, {}) for row in library)


def test_without_a_model_it_is_firebox_tiny(folder: Path) -> None:
    """Which computes in float32, and no kernel for experts does; in bf16 it fits."""
    no = fit(folder, "--gpu", "rtx-5090", "--json")
    found = document(no)
    assert (no.returncode, found["model"], [row["op"] for row in found["launches"]]) == (
        1,
        "firebox-tiny",
        ["sample", "sample", "logprobs", "logprobs"],
    )
    assert "hidden states are float32; kernels know bfloat16 and float16" in {
        row["why"] for row in found["refused"]
    }
    assert found["help"] == ["--dtype bfloat16"]
    yes = fit(folder, "--gpu", "rtx-5090", "--dtype", "bfloat16")
    assert yes.returncode == 0, yes.stdout
    lines = yes.stdout.splitlines()
    assert lines[-1] == "firebox-tiny on 1 × rtx-5090: fits, as far as was checked"
    (partial,) = [line for line in lines if line.startswith("this check is partial")]
    assert partial.endswith("Composed of torch operators on a GPU, and so not checked: nothing")
    (row,) = [line for line in lines if "gate_up_few" in line and "│        1 │" in line]
    for cell in ("101,376", "rows 64", "few, default", "mma.bf16", "yes", "fits"):
        assert cell in row
    (choice,) = [line for line in lines if line.split()[:2] == ["experts", "1"]]
    assert choice.split(maxsplit=2)[2] == (
        "few           default; not one: only a measurement chooses it; not sorted: rule: few up to 16 "
        "tokens, for want of a measurement; not block-scaled: knows no bf16 weights"
    )
    assert any("datasheet; no measurement yet" in line for line in lines)


def test_what_is_missing_and_what_would_help(folder: Path) -> None:
    done = fit(folder, "firebox-tiny", "--gpu", "rtx-5090", "--dtype", "bfloat16", "--kv-cache-dtype", "fp8")
    assert done.returncode == 0 and "tokens of 1,024 bytes" in done.stdout
    done = fit(folder, "gpt-oss-120b", "--gpu", "rtx-5090", "--tp", "2", "--dtype", "float32")
    assert done.returncode == 1
    assert "does not fit: " in done.stdout and "GiB are missing on each GPU" in done.stdout
    assert done.stdout.splitlines()[-1] == "gpt-oss-120b on 2 × rtx-5090: does not fit, as far as was checked"


def test_experts_divided_and_drafts_are_planned_and_said_to_be_no_more(folder: Path) -> None:
    asked = ("gpt-oss-120b", "--gpu", "gb10", "--tp", "1", "--ep", "5", "--num-drafts", "3")
    done = fit(folder, *asked)
    lines = done.stdout.splitlines()
    assert (
        done.returncode == 1 and "does not fit: --tp 1 --ep 5: 128 experts / 5 is not a whole number" in lines
    )
    assert [line.partition(": ")[2][:14] for line in lines if line.startswith("planned only: ")] == [
        *("--ep 5: the en", "--num-drafts 3"),
    ]
    assert lines[-1] == "gpt-oss-120b on 5 × gb10: does not fit, as far as was checked"
    found = document(fit(folder, *asked, "--json"))
    assert (found["ep"], found["gpus"], found["num_drafts"], len(found["planned_only"])) == (5, 5, 3, 2)


def test_strict_is_1_where_a_layer_falls_back(folder: Path) -> None:
    """firebox-tiny with heads of a width that no kernel for attention knows."""
    config = json.loads((resolve_folder("firebox-tiny") / "config.json").read_text())
    model = folder / "tiny-48"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 48}))
    arguments = (str(model), "--gpu", "rtx-5090", "--dtype", "bfloat16", "--json")
    assert fit(folder, *arguments).returncode == 0
    strict = fit(folder, *arguments, "--strict")
    assert strict.returncode == 1 and document(strict)["fits"]
    fallbacks = document(strict)["fallbacks"]
    why = "attends with triton_paged, not with torch_reference"
    assert fallbacks[0] == f"attention_block of 4 layers falls back to torch operators: {why}"
    missing = "default tiles: tuned/nvidia_rtx_5090/experts.json has no entry for 'bf16 hidden="
    assert any(f"moe_block, experts: {missing}" in line for line in fallbacks), fallbacks


def test_a_cut_that_the_format_does_not_allow_is_1(folder: Path) -> None:
    """qwen3-30b-a3b in FP8 blocks: a folder with a config.json is enough."""
    config = json.loads((bundled()["qwen3-30b-a3b"] / "config.json").read_text())
    model = folder / "qwen3-fp8"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": FP8_BLOCK}))
    arguments = (str(model), "--gpu", "gb10", "--tp", "4")
    done = fit(folder, *arguments, "--json")
    found = document(done)
    assert (done.returncode, found["fits"], found["memory"], found["launches"]) == (1, False, None, [])
    assert found["help"] == ["--tp 1 or 2"] and found["tp_that_work"] == [1, 2]
    said = fit(folder, *arguments)
    assert said.returncode == 1 and "768 / 4 = 192 is not a multiple of 128 (fp8_block)" in said.stdout
    assert "would help: --tp 1 or 2" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpt-oss-20b"], "--gpu"),
        (["no-such", "--gpu", "gb10"], "error: there is no model 'no-such'"),
        (["gpt-oss-20b", "--gpu", "gb11"], "error: no GPU is called 'gb11'"),
        (["gpt-oss-20b", "--gpu", "gb10", "--tp", "0"], "error: --tp 0"),
        (["gpt-oss-20b", "--gpu", "gb10", "--ep", "0"], "error: --ep 0"),
        (["gpt-oss-20b", "--gpu", "gb10", "--dtype", "fp8"], "error: dtype is 'fp8'"),
        (["gpt-oss-20b", "--gpu", "gb10", "--kv-cache-dtype", "fp4"], "error: kv_cache_dtype is 'fp4'"),
        (["gpt-oss-20b", "--gpu", "gb10", "--context-length", "999999"], "was made for 1 to 131072 tokens"),
        (["gpt-oss-20b", "--gpu", "gb10", "--max-running-requests", "0"], "--max-running-requests"),
        (["--gpu", "gb10", "--model", "gpt-oss-20b"], "error: --model gpt-oss-20b is for --moe-config"),
        (
            ["--moe-config", "x.json", "--gpu", "gb10", "--kv-cache-dtype", "fp8"],
            "error: --moe-config does not go with --kv-cache-dtype",
        ),
        (
            ["--moe-config", "x.json", "--gpu", "gb10", "--dtype", "bfloat16"],
            "error: --moe-config does not go with --dtype",
        ),
        (["--moe-config", "x.json", "--gpu", "gb10", "--ep", "2"], "--moe-config does not go with --ep"),
    ],
)
def test_a_wrong_call_is_2(folder: Path, arguments: list[str], sentence: str) -> None:
    done = fit(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stdout + done.stderr and "Traceback" not in done.stderr
