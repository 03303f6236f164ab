"""Names of tuning files: each server's own spelling, and a sentence for whatever it would never look up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firebox.hardware.base import find_gpu
from firebox.planning._foreign_name import Name, askers, devices, file_name, judged_as, parse, warnings

GB10, H200 = find_gpu("gb10"), find_gpu("h200")
PLAIN = Name(160, 384, "NVIDIA_GB10", "fp8_w8a8", None, per_channel=False, down=False)
START = "E=160,N=384,device_name=NVIDIA_GB10"


@pytest.mark.parametrize(
    ("name", "sglang", "vllm"),
    [
        (PLAIN, f"{START},dtype=fp8_w8a8.json", f"{START},dtype=fp8_w8a8.json"),
        (replace(PLAIN, dtype=None), f"{START}.json", f"{START}.json"),
        (
            replace(PLAIN, block=(128, 128)),
            f"{START},dtype=fp8_w8a8,block_shape=[128, 128].json",
            f"{START},dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (
            replace(PLAIN, per_channel=True),
            f"{START},dtype=fp8_w8a8,per_channel_quant=True.json",
            f"{START},dtype=fp8_w8a8.json",
        ),
        (
            replace(PLAIN, per_channel=True, down=True),
            f"{START},dtype=fp8_w8a8,per_channel_quant=True_down.json",
            None,
        ),
        (replace(PLAIN, dtype="int8_w8a8"), f"{START},dtype=int8_w8a8.json", None),
        (replace(PLAIN, dtype="fp8_w8a16"), None, f"{START},dtype=fp8_w8a16.json"),
        (replace(PLAIN, dtype="mxfp4_w4a16"), None, None),
        (replace(PLAIN, experts=None), None, None),
    ],
)
def test_each_server_spells_its_own_way(name: Name, sglang: str | None, vllm: str | None) -> None:
    assert (file_name("sglang", name), file_name("vllm", name)) == (sglang, vllm)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("block", [None, (128, 128), (64, 32)])
@pytest.mark.parametrize("dtype", [None, "fp8_w8a8", "int8_w8a8", "int4_w4a16"])
@pytest.mark.parametrize("server", ["sglang", "vllm"])
def test_what_a_server_writes_is_read_back(server: str, dtype: str | None, block, down: bool) -> None:
    name = replace(PLAIN, dtype=dtype, block=block, per_channel=server == "sglang", down=down)
    text = file_name(server, name)
    if text is not None:
        assert parse(text) == name


def test_h200s_share_vllms_name() -> None:
    nvl = replace(H200, device_names=("NVIDIA H200", "NVIDIA H200 NVL"))
    assert devices("vllm", nvl) == ("NVIDIA_H200",)
    assert devices("sglang", nvl) == ("NVIDIA_H200", "NVIDIA_H200_NVL")
    pro = find_gpu("rtx-pro-6000-max-q")
    assert devices("vllm", pro) == ("NVIDIA_RTX_PRO_6000_Blackwell_Max-Q_Workstation_Edition",)


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (f"{START},dtype=fp8_w8a8.json", ("sglang", "vllm")),
        (f"{START}.json", ("sglang", "vllm")),
        (f"{START},dtype=fp8_w8a8,per_channel_quant=True.json", ("sglang",)),
        (f"{START},dtype=fp8_w8a8,per_channel_quant=True_down.json", ("sglang",)),
        (f"{START},dtype=fp8_w8a8,block_shape=[128, 128].json", ("sglang",)),
        (f"{START},dtype=fp8_w8a8,block_shape=[128,128].json", ("vllm",)),
        (f"{START},dtype=int8_w8a8,per_channel_quant=True.json", ("sglang",)),
        (f"{START},dtype=int4_w4a16.json", ("sglang", "vllm")),
        (f"{START},dtype=fp8_w8a16.json", ("vllm",)),
    ],
)
def test_a_name_that_is_looked_up_has_no_warning(text: str, who: tuple[str, ...]) -> None:
    assert askers(text, parse(text), GB10) == who
    assert list(warnings(text, parse(text), GB10)) == []


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (f"{START},dtype=fp8.json", ["dtype=fp8 is a word of neither"]),
        (f"{START},dtype=mxfp4_w4a16.json", ["dtype=mxfp4_w4a16 is a word of neither"]),
        (
            "E=160,N=384,device_name=NVIDIA_DGX_Spark.json",
            ["device_name=NVIDIA_DGX_Spark is not what gb10 is called: NVIDIA_GB10"],
        ),
        ("E=160,N=384,device_name=NVIDIA GB10.json", ["device_name=NVIDIA GB10 is not"]),
        (f"{START},dtype=int8_w8a8.json", ["int8_w8a8 without per_channel_quant=True or block_shape"]),
        (f"{START},dtype=int4_w4a16,block_shape=[128,128].json", ["block_shape does not go with"]),
        (f"{START},per_channel_quant=True.json", ["per_channel_quant=True does not go with dtype=None"]),
        (
            f"{START},dtype=fp8_w8a8,block_shape=[128, 128],per_channel_quant=True.json",
            ["exclude each other"],
        ),
        (f"{START},dtype=fp8_w8a8,block_shape=[0, 128].json", ["block_shape=[0, 128] has a zero"]),
        (f"{START},dtype=fp8_w8a16_down.json", ["only SGLang reads files that end in _down"]),
        (
            f"{START},block_shape=[128, 128],dtype=fp8_w8a8.json",
            ["not spelled or ordered", "dtype=fp8_w8a8,block_shape=[128,128].json"],
        ),
        (f"{START},dtype=fp8_w8a8,block_shape=[128,128]_down.json", ["not spelled or ordered"]),
        ("N=384,E=160,device_name=NVIDIA_GB10.json", ["not spelled or ordered"]),
        (f"{START},dtype=fp8_w8a8,EP=2.json", ["the name has 'EP=2'"]),
        (f"{START},dtype=fp8_w8a8,per_channel_quant=False.json", ["the name has 'per_channel_quant=False'"]),
        ("E=0,N=384,device_name=NVIDIA_GB10.json", ["the name has no E:", "'E=0'"]),
        ("best.json", ["the name has no E, N, device_name", "'best'"]),
    ],
)
def test_a_name_that_nobody_looks_up_says_why(text: str, sentences: list[str]) -> None:
    said = list(warnings(text, parse(text), GB10))
    assert askers(text, parse(text), GB10) == ()
    for sentence in sentences:
        assert any(sentence in line for line in said), said
    assert len(said) <= len(sentences)


def test_each_reason_is_its_own_sentence() -> None:
    text = "E=160,N=384,device_name=NVIDIA_H200,dtype=fp9,per_channel_quant=True,x=1.json"
    said = list(warnings(text, parse(text), GB10))
    assert [line.split()[0] for line in said] == [
        "the",
        "dtype=fp9",
        "device_name=NVIDIA_H200",
        "per_channel_quant=True",
    ]


def test_what_is_judged_instead() -> None:
    assert [judged_as(word) for word in (None, "fp8_w8a8", "mxfp4_w4a16", "fp9")] == [
        "bf16",
        "fp8_w8a8",
        "int4_w4a16",
        "bf16",
    ]
