"""Folders and file names against what the servers' own functions said (tests/support/foreign_names.json, made
by tools/record_foreign_names.py from sglang 0.5.23 and vllm 0.33.0)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firebox.cli._fit_model import source_of
from firebox.errors import ConfigError, UnsupportedFormat
from firebox.hardware.base import find_gpu
from firebox.planning._foreign_name import DTYPES, SERVERS, Name, devices, file_name
from firebox.tuning.servers.names import Lookup, expert_layers, fuses, lookups
from firebox.tuning.servers.products import products

ROOT = Path(__file__).parents[4]
CARDS = ROOT / "src/firebox/assets/cards"
RECORDED = json.loads((ROOT / "tests/support/foreign_names.json").read_text(encoding="utf-8"))
GB10 = find_gpu("gb10")
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def asked(model: str, tp: int, gpu: str = "gb10") -> tuple[Lookup, ...]:
    return lookups(expert_layers(source_of(model, "auto"), tp), find_gpu(gpu), "3.9.0")


def names(found: tuple[Lookup, ...], server: str) -> list[str]:
    return [name for one in found if one.server == server for name in (*one.first, *one.second)]


@pytest.fixture
def qwen_fp8(tmp_path: Path) -> str:
    """The card's config.json, whose model is in text_config, with scales in blocks."""
    config = json.loads((CARDS / "qwen3.5-397b-a17b-nvfp4/config.json").read_text(encoding="utf-8"))
    assert "num_experts" in config["text_config"] and "num_experts" not in config
    config["text_config"].pop("quantization_config", None)
    folder = tmp_path / "qwen3.5-397b-a17b-fp8"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8_BLOCKS}))
    return str(folder)


@pytest.mark.parametrize("server", SERVERS)
def test_every_recorded_name_is_ours(server: str) -> None:
    rows = RECORDED[server]["rows"]
    assert len(rows) == {"sglang": 432, "vllm": 108}[server]
    for experts, width, device, dtype, block, per_channel, down, theirs in rows:
        called = devices(server, replace(GB10, device_names=(device,)))
        (spelled,) = called
        shape = None if block is None else (block[0], block[1])
        ours = file_name(server, Name(experts, width, spelled, dtype, shape, per_channel, down))
        assert ours == theirs


@pytest.mark.parametrize("server", SERVERS)
def test_their_dtype_words_are_ours(server: str) -> None:
    assert set(RECORDED[server]["dtypes"]) == {word for word, who in DTYPES.items() if server in who}


def recorded_lookups(server: str, model: str) -> list[str]:
    """Of all ways in which the model's weights may be held: with its shared expert fused, and without."""
    found = [one for one in RECORDED[server]["lookups"] if one["model"].split()[0] == model]
    assert found, model
    return [name for one in found for name in one["names"]]


@pytest.mark.parametrize(("model", "tp"), [("glm-4.7-fp8", 4), ("kimi-k2.5-int4", 8), ("qwen3-30b-a3b", 4)])
def test_cards_are_asked_for_as_recorded(model: str, tp: int) -> None:
    found = asked(model, tp)
    assert sorted(names(found, "sglang")) == sorted(recorded_lookups("sglang", model))
    unfused = [name for name in recorded_lookups("vllm", model) if not name.startswith("E=161")]
    assert names(found, "vllm") == unfused  # vLLM fuses no shared expert


def test_a_nested_text_config_with_blocks(qwen_fp8: str) -> None:
    found = asked(qwen_fp8, 4)
    assert names(found, "sglang") == recorded_lookups("sglang", "qwen3.5-397b-a17b-fp8")
    assert names(found, "vllm") == recorded_lookups("vllm", "qwen3.5-397b-a17b-fp8")
    assert names(found, "vllm") == [
        "E=512,N=256,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[128,128].json"
    ]
    layers = expert_layers(source_of(qwen_fp8, "auto"), 4)
    up, down = products(layers, found[0])
    assert (up.n, up.k, down.n, down.k) == (512, 4096, 4096, 256)
    assert (up.routing.experts, up.routing.top_k, up.routing.fused) == (512, 10, 0)
    assert (up.operands.scales, up.operands.block) == ("block", (128, 128))


def test_folders_and_counts_of_shared_experts() -> None:
    found = asked("glm-4.7-fp8", 4)
    assert [(one.server, one.fused, str(one.folder)) for one in found] == [
        ("sglang", 1, "sglang/configs/triton_3_9_0"),
        ("sglang", 0, "sglang/configs/triton_3_9_0"),
        ("vllm", 0, "vllm"),
    ]
    issue = "E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8.json"
    assert [str(path) for path in found[2].paths] == [f"vllm/{issue}"]
    layers = expert_layers(source_of("glm-4.7-fp8", "auto"), 4)
    assert [products(layers, one)[0].routing.rows(3) for one in found] == [27, 24, 24]


@pytest.mark.parametrize(
    ("model", "fused"),
    [("glm-4.7-fp8", True), ("glm-4.5-air-fp8", True), ("kimi-k2.5-int4", False), ("qwen3-30b-a3b", False)],
)
def test_who_fuses(model: str, fused: bool) -> None:
    assert fuses(expert_layers(source_of(model, "auto"), 1)) is fused


def test_deepseek_fuses_256_experts_that_are_not_int4() -> None:
    layers = expert_layers(source_of("glm-4.7-fp8", "auto"), 1)

    def deepseek(**shape: Any) -> bool:
        return fuses(replace(layers, kind="deepseek_v3", shape=replace(layers.shape, **shape)))

    assert deepseek(experts=256) and deepseek(experts=256, format="fp8_block")
    assert not deepseek(experts=160) and not deepseek(experts=256, shared=2)
    assert not deepseek(experts=256, format="awq")


def test_devices_and_what_has_no_files() -> None:
    h200 = asked("glm-4.7-fp8", 4, "h200")
    assert all("device_name=NVIDIA_H200," in name for name in (*h200[0].first, *h200[2].first))
    with pytest.raises(UnsupportedFormat, match=r"gpt-oss-120b are mxfp4.*neither SGLang nor vLLM"):
        asked("gpt-oss-120b", 1)
    with pytest.raises(UnsupportedFormat, match="nvfp4"):
        asked("qwen3.5-397b-a17b-nvfp4", 4)
    with pytest.raises(ConfigError, match="--tp 5"):
        asked("glm-4.7-fp8", 5)
