"""All of it: files for a model on a GPU that is not here, judged as `firebox fit --moe-config` judges them.
With few keys and few compiles, so that it takes seconds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firebox.cli._fit_model import source_of
from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.planning.foreign import judge
from firebox.tuning.servers.files import note_of, save
from firebox.tuning.servers.names import expert_layers
from firebox.tuning.servers.predict import KEYS, Report, predict_files

GB10 = find_gpu("gb10")
GLM = source_of("glm-4.7-fp8", "auto")
SOME = (1, 4, 16, 64, 256, 1024, 4096)
START = "device_name=NVIDIA_GB10,dtype=fp8_w8a8"
PRODUCTS = 14  # compiles: enough for several rows a block
BUDGET_S = 600.0


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests, so that equal tiles compile once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
        yield


def predict(folder: Path, **how: Any) -> Report:
    usual = {"keys": SOME, "most_compiles": PRODUCTS}
    return predict_files(GLM, GB10, 4, folder, BUDGET_S, **(usual | how))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return predict(tmp_path_factory.mktemp("out"))


def entries(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(path.read_text("utf-8"))
    return found


def test_the_files_of_both_servers(report: Report) -> None:
    sglang = [
        f"sglang/configs/triton_3_9_0/E={experts},N=384,{START},per_channel_quant=True{down}.json"
        for experts in (161, 160)
        for down in ("", "_down")
    ]
    root = report.paths[-1].parents[1]
    assert [str(path.relative_to(root)) for path in report.paths] == [
        *sglang,
        f"vllm/E=160,N=384,{START}.json",
    ]
    assert report.compiled == PRODUCTS and report.left == 0
    for path in report.paths:
        assert list(entries(path)) == [str(tokens) for tokens in SOME]
        assert note_of(path).read_text("utf-8").startswith("predicted by firebox")
    assert len(KEYS) == 18 and KEYS[-1] == 4096


def test_each_file_is_judged_well(report: Report) -> None:
    for path in report.paths:
        verdict = judge(path, GB10)
        assert verdict.fits and verdict.warnings == (), path
        assert all(one.native and not one.spill_bytes for one in verdict.keys.values())
        for_model = judge(path, GB10, expert_layers(GLM, 4).shape)
        server = "vllm" if path.parent.name == "vllm" else "sglang"
        assert for_model.looked_up_by == (server,)
        if server == "sglang":
            assert for_model.warnings == ()


def test_the_second_product_has_tiles_of_its_own(report: Report) -> None:
    for first, second in ((0, 1), (2, 3)):
        ups, downs = entries(report.paths[first]), entries(report.paths[second])
        assert ups != downs
        for key, up in ups.items():
            assert up["BLOCK_SIZE_M"] == downs[key]["BLOCK_SIZE_M"]


def test_vllm_runs_one_tile_for_both_products(report: Report) -> None:
    pairs = report.predicted[report.paths[-1]].values()
    assert all(pair.first.tile == pair.second.tile for pair in pairs)
    assert all(pair.first.us != pair.second.us for pair in pairs)


def test_more_tokens_are_never_a_smaller_throughput(report: Report) -> None:
    for path, pairs in report.predicted.items():
        rates = [tokens / pair.us for tokens, pair in pairs.items()]
        assert rates == sorted(rates), path
    rows = [entry["BLOCK_SIZE_M"] for entry in entries(report.paths[0]).values()]
    assert rows[0] == 16 and rows[-1] >= 64, "few rows an expert want small blocks, many large ones"


def test_the_same_again(report: Report, tmp_path: Path) -> None:
    again = predict(tmp_path)
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in report.paths]


def test_what_does_not_fit_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20_000
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", str(limit))
    small = predict(tmp_path, keys=(1, 1024))
    for path in small.paths:
        verdict = judge(path, GB10)
        assert all(one.shared_bytes <= limit and one.limit_bytes == limit for one in verdict.keys.values())


def test_seeds_are_compiled_first(tmp_path: Path) -> None:
    seed = tmp_path / f"E=160,N=384,{START}.json"
    only = dict(zip(("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"), (32, 32, 64), strict=True))
    save(seed, {"64": {**only, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 2}})
    found = predict(tmp_path / "out", keys=(64,), most_compiles=2, seeds=(seed,))
    for path in found.paths:
        entry = entries(path)["64"]
        assert {name: entry[name] for name in only} == only and entry["num_stages"] == 2


def test_a_budget_that_is_too_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="no tile is left for 1 tokens on gb10: 0 compiles") as raised:
        predict_files(GLM, GB10, 4, tmp_path, 1.0, keys=SOME, most_compiles=PRODUCTS)
    assert "more than 1 s" in str(raised.value.hint) and not list(tmp_path.iterdir())
    assert "did not suffice for 14 of 14 compiles" in caplog.text


def test_what_was_dropped_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An A100 has no fp8."""
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="dropped: 2 does not compile"):
        predict_files(GLM, find_gpu("a100"), 4, tmp_path, BUDGET_S, keys=(1,), most_compiles=2)
    assert "2 tiles compiled, 0 may be written; dropped: 2 does not compile" in caplog.text
    with pytest.raises(ConfigError, match="about GPUs, not gb10"):
        predict_files(GLM, replace(GB10, triton_target=None), 4, tmp_path, BUDGET_S)
