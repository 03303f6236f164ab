"""A file's name against the model it should be for: the cards' true E, N, dtype and scales."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebox.errors import ConfigError, UnsupportedModel
from firebox.planning._foreign_model import ExpertShape, asks, expert_shape, model_warnings
from firebox.planning._foreign_name import parse
from firebox.weights.checkpoint import open_checkpoint

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
ON = "device_name=NVIDIA_GB10"


def shape(card: str, tp: int) -> ExpertShape:
    checkpoint = open_checkpoint(CARDS / card)
    return expert_shape(card, checkpoint.model_type, checkpoint.text_config, tp)


@pytest.mark.parametrize(
    ("card", "tp", "expected"),
    [
        ("glm-4.7-fp8", 4, (160, 1, 384, "fp8_channel")),
        ("glm-4.7-nvfp4", 2, (160, 1, 768, "nvfp4")),
        ("glm-4.5-air-fp8", 1, (128, 1, 1408, "fp8_channel")),
        ("gpt-oss-120b", 1, (128, 0, 2880, "mxfp4")),
        ("gpt-oss-20b", 2, (32, 0, 1440, "mxfp4")),
        ("qwen3-30b-a3b", 4, (128, 0, 192, "bf16")),
        ("qwen3.5-397b-a17b-nvfp4", 4, (512, 0, 256, "nvfp4")),
        ("kimi-k2.5-int4", 8, (384, 1, 256, "int4_group")),
        ("kimi-k2-thinking-nvfp4", 8, (384, 1, 256, "nvfp4")),
    ],
)
def test_the_cards(card: str, tp: int, expected: tuple[int, int, int, str]) -> None:
    found = shape(card, tp)
    assert (found.experts, found.shared, found.width, found.format) == expected


def test_what_has_no_answer() -> None:
    with pytest.raises(ConfigError, match=r"--tp 5 does not divide the experts' width 1536"):
        shape("glm-4.7-fp8", 5)
    with pytest.raises(ConfigError, match="--tp 0"):
        shape("glm-4.7-fp8", 0)
    with pytest.raises(UnsupportedModel, match="'llama'"):
        expert_shape("some", "llama", {}, 1)


GLM = shape("glm-4.7-fp8", 4)
BLOCKS = ExpertShape("qwen", 512, 0, 256, "fp8_block", (128, 128))
KIMI = shape("kimi-k2.5-int4", 8)
QWEN = shape("qwen3-30b-a3b", 4)


@pytest.mark.parametrize(
    ("shape", "text", "sglang", "vllm"),
    [
        (GLM, f"E=160,N=384,{ON},dtype=fp8_w8a8,per_channel_quant=True.json", True, False),
        (GLM, f"E=161,N=384,{ON},dtype=fp8_w8a8,per_channel_quant=True.json", True, False),
        (GLM, f"E=161,N=384,{ON},dtype=fp8_w8a8,per_channel_quant=True_down.json", True, False),
        (GLM, f"E=160,N=384,{ON},dtype=fp8_w8a8.json", False, True),
        (BLOCKS, f"E=512,N=256,{ON},dtype=fp8_w8a8,block_shape=[128, 128].json", True, False),
        (BLOCKS, f"E=512,N=256,{ON},dtype=fp8_w8a8,block_shape=[128,128].json", False, True),
        (KIMI, f"E=384,N=256,{ON},dtype=int4_w4a16.json", False, True),
        (KIMI, f"E=385,N=128,{ON},dtype=int4_w4a16.json", True, False),
        (QWEN, f"E=128,N=192,{ON}.json", True, True),
    ],
)
def test_names_that_are_looked_up(shape: ExpertShape, text: str, sglang: bool, vllm: bool) -> None:
    name = parse(text)
    assert (asks("sglang", text, shape, name), asks("vllm", text, shape, name)) == (sglang, vllm)
    said = list(model_warnings(text, name, shape))
    missing = shape is GLM and not sglang
    assert len(said) == missing
    assert not missing or ("per_channel_quant=True is missing" in said[0] and "vLLM looks for" in said[0])


@pytest.mark.parametrize(
    ("shape", "text", "sentences"),
    [
        (
            GLM,
            f"E=128,N=384,{ON},dtype=fp8_w8a8,per_channel_quant=True.json",
            ["E=128 is not for glm-4.7-fp8: servers look for E=160, SGLang for E=161 where"],
        ),
        (
            GLM,
            f"E=160,N=1536,{ON},dtype=fp8_w8a8,per_channel_quant=True.json",
            ["N=1536 is not for glm-4.7-fp8 cut this way: servers look for N=384"],
        ),
        (GLM, f"E=161,N=384,{ON},dtype=fp8_w8a8.json", ["per_channel_quant=True is missing"]),
        (
            GLM,
            f"E=160,N=384,{ON}.json",
            ["a name without dtype is not for", "per_channel_quant=True is missing"],
        ),
        (
            GLM,
            f"E=160,N=384,{ON},dtype=fp8_w8a8,block_shape=[128, 128].json",
            ["per_channel_quant=True is missing", "block_shape=[128, 128] is not for"],
        ),
        (BLOCKS, f"E=512,N=256,{ON},dtype=fp8_w8a8.json", ["block_shape=[128, 128] is missing"]),
        (
            BLOCKS,
            f"E=512,N=256,{ON},dtype=fp8_w8a8,per_channel_quant=True.json",
            ["per_channel_quant=True is not for", "block_shape=[128, 128] is missing"],
        ),
        (QWEN, f"E=128,N=192,{ON},dtype=fp8_w8a8.json", ["servers look for a name without dtype"]),
        (KIMI, f"E=385,N=256,{ON},dtype=int4_w4a16.json", ["no server looks for this name for kimi"]),
        (
            shape("gpt-oss-120b", 1),
            f"E=128,N=2880,{ON}.json",
            ["the experts of gpt-oss-120b are mxfp4, for which no server has a dtype word"],
        ),
    ],
)
def test_names_for_another_model(shape: ExpertShape, text: str, sentences: list[str]) -> None:
    said = list(model_warnings(text, parse(text), shape))
    assert len(said) == len(sentences), said
    for line, sentence in zip(said, sentences, strict=True):
        assert sentence in line
    assert not any(asks(server, text, shape, parse(text)) for server in ("sglang", "vllm"))
