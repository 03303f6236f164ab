"""Which models tensor parallelism can cut, and what the others are told: the arithmetic by hand, then the
real cards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from firebox.engine.outline import make_model
from firebox.errors import ConfigError, UnsupportedFormat
from firebox.find import load, names
from firebox.formats import (
    awq,
    bf16,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    gptq,
    int4_group,
    mxfp4,
    nvfp4,
)
from firebox.formats.base import Cut, Format, PlainSlot, WeightSlot
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.models.base import Model
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.cuts import SIZES, check_cuts, refusal, working_sizes
from firebox.weights.load import chosen_slots

META = torch.device("meta")
CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NARROW = ["lm_head", "in_proj_a", "in_proj_b", "shared_expert_gate"]
FP8_CHANNEL = open_checkpoint(CARDS / "glm-4.7-fp8").config["quantization_config"]
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head"],
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def on_meta(name: str, quantization: dict[str, Any] | None = None, **changes: Any) -> Model:
    """A card's model, its weights in another format if one is given; `changes` to its config.json."""
    checkpoint = open_checkpoint(CARDS / name)
    config = checkpoint.config | ({"quantization_config": quantization} if quantization else {}) | changes
    checkpoint = dataclasses.replace(checkpoint, config=config)
    return make_model(checkpoint, Build(probe_cpu(), META, torch.bfloat16, torch.bfloat16, 1))


def weight(format: Format, rows: int, columns: int, cut: Cut | None) -> WeightSlot:
    return WeightSlot("m", format, torch.empty(rows, columns, device=META), cut=cut)


ROWS, COLUMNS = Cut(0, 768, "inter"), Cut(1, 768, "inter")


@pytest.mark.parametrize(
    ("format", "rows", "columns"),
    [
        # shares of 768: 384 at 2, 192 at 4, 96 at 8, 48 at 16, 24 at 32, 12 at 64, 6 at 128
        (bf16.Format(), 128, 128),
        (fp8_tensor.Format(), 128, 128),
        (fp8_channel.Format(), 128, 128),
        (fp8_block.Format(), 2, 2),
        (fp8_block.Format((64, 32)), 4, 8),
        (nvfp4.Format(), 128, 16),
        (mxfp4.Format(), 128, 8),
        (int4_group.Format(32), 128, 8),
        (int4_group.Format(32, symmetric=False), 32, 8),
        (int4_group.Format(0), 128, 32),
        (awq.Format(128), 32, 2),
        (awq.Format(64), 32, 4),
        (gptq.Format(128), 32, 2),
        (gptq.Format(128, bits=8), 64, 2),
        (gptq.Format(128, desc_act=True), 32, 1),
        (gptq.Format(0), 32, 1),
    ],
    ids=str,
)
def test_each_format_is_cut_between_its_units_only(format: Format, rows: int, columns: int) -> None:
    """The largest power of two up to 128 that works, for 768 rows and for 768 columns."""
    for cut, expected in ((ROWS, rows), (COLUMNS, columns)):
        slot = weight(format, 768, 768, cut)
        works = [tp for tp in (2**i for i in range(8)) if refusal(slot, tp) is None]
        assert works == [2**i for i in range(len(works))] and works[-1] == expected, cut


def test_every_format_is_in_the_table() -> None:
    (mark,) = test_each_format_is_cut_between_its_units_only.pytestmark  # type: ignore[attr-defined]
    assert {row[0].name for row in mark.args[1]} == set(names("formats")) - {"kv", "layouts", "select"}


def test_a_unit_holds_for_the_width_of_the_pieces() -> None:
    """Four heads of 64 rows: on two ranks whole blocks, on four half ones."""
    heads = Cut(0, 4, "heads")
    assert refusal(weight(fp8_block.Format(), 256, 128, heads), 2) is None
    found = refusal(weight(fp8_block.Format(), 256, 128, heads), 4)
    assert str(found) == "m: heads 4 · 64 / 4 = 64 is not a multiple of 128 (fp8_block)"
    assert type(found) is UnsupportedFormat


def test_pieces_are_not_divided() -> None:
    slot = weight(bf16.Format(), 12 * 64, 32, Cut(0, 12, "heads"))
    assert [tp for tp in range(1, 13) if refusal(slot, tp) is None] == [1, 2, 3, 4, 6, 12]
    found = refusal(slot, 8)
    assert type(found) is ConfigError and str(found) == "m: heads 12 / 8 is not a whole number"


def test_kv_heads_are_shared_when_there_are_fewer_than_ranks() -> None:
    slot = weight(fp8_block.Format(), 4 * 128, 32, Cut(0, 4, "kv", shared=True))
    assert [tp for tp in range(1, 17) if refusal(slot, tp) is None] == [1, 2, 4, 8, 12, 16]
    assert str(refusal(slot, 6)) == "m: kv 4 / 6 is not a whole number, and 6 is not a multiple of it"
    narrow = weight(fp8_block.Format(), 4 * 64, 32, Cut(0, 4, "kv", shared=True))
    assert refusal(narrow, 2) is None and refusal(narrow, 8) is not None, "a head of 64 is half a block"
    one = weight(fp8_block.Format(), 64, 32, Cut(0, 1, "kv", shared=True))
    assert all(refusal(one, tp) is None for tp in SIZES), "every rank has all of it"


def test_each_run_of_a_stacked_weight_is_divided_by_itself() -> None:
    """q and k of 256 rows, v of 512: on two ranks 128 and 256, on four 64 and 128. As one run of 1024 rows
    four ranks would do."""
    cut = Cut(0, 4, "key heads", runs=(256, 256, 512))
    slot = weight(fp8_block.Format(), 1024, 32, cut)
    assert refusal(slot, 2) is None and refusal(slot, 4) is not None
    assert refusal(dataclasses.replace(slot, cut=dataclasses.replace(cut, runs=())), 4) is None


def test_a_weight_that_nothing_cuts() -> None:
    assert refusal(weight(fp8_block.Format(), 100, 100, None), 16) is None
    assert refusal(PlainSlot("norm.weight", torch.empty(3)), 16) is None


# ---- the cards


@pytest.mark.parametrize(
    ("card", "quantization", "expected"),
    [
        # moe_intermediate_size 768, 32 heads, 4 KV heads of 128
        ("qwen3-30b-a3b", None, (1, 2, 4, 8, 16)),
        ("qwen3-30b-a3b", FP8_BLOCK, (1, 2)),  # 384, then 192
        ("qwen3-30b-a3b", FP8_CHANNEL, (1, 2, 4, 8, 16)),
        ("qwen3-30b-a3b", NVFP4, (1, 2, 4, 8, 16)),  # 48 = 3 groups
        ("qwen3-30b-a3b", INT4, (1, 2, 4, 8)),  # 96 = 3 groups, 48 = 1.5
        ("qwen3-30b-a3b", AWQ, (1, 2)),
        ("qwen3-30b-a3b", GPTQ, (1, 2)),
        ("qwen3-30b-a3b", GPTQ | {"desc_act": True}, (1,)),
        # moe_intermediate_size 1536, intermediate_size 12288, 96 heads, 8 KV heads of 128
        ("glm-4.7-fp8", None, (1, 2, 4, 8, 16)),
        ("glm-4.7-nvfp4", None, (1, 2, 4, 8, 16)),  # 96 = 6 groups
        ("glm-4.7-fp8", FP8_BLOCK, (1, 2, 4)),  # 384, then 192
        # 1408, 10944
        ("glm-4.5-air-fp8", None, (1, 2, 4, 8, 16)),
        ("glm-4.5-air-fp8", FP8_BLOCK, (1,)),  # 704 = 5.5 blocks
        # 1024, 16 key heads, 64 value heads, 2 KV heads of 256, shared expert 1024
        ("qwen3.5-397b-a17b-nvfp4", None, (1, 2, 4, 8, 16)),
        ("qwen3.5-397b-a17b-nvfp4", FP8_BLOCK | {"modules_to_not_convert": NARROW}, (1, 2, 4, 8)),  # 128, 64
        ("qwen3.5-397b-a17b-nvfp4", FP8_BLOCK, (1,)),  # in_proj_a has 64 rows: half a block
        # 2880 in groups of 32: 90 groups
        ("gpt-oss-120b", None, (1, 2, 4, 8, 16)),  # 45 groups, then 23 at most, 12, 6
        ("gpt-oss-20b", None, (1, 2, 4, 8, 16)),
        # 2048, 64 heads
        ("kimi-k2.5-int4", None, (1, 2, 4, 8, 16)),
        ("kimi-k2-thinking-nvfp4", None, (1, 2, 4, 8, 16)),
    ],
)
def test_the_sizes_that_work(
    card: str, quantization: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    model = on_meta(card, quantization)
    assert working_sizes(model) == expected
    check_cuts(model, expected[-1])
    for tp in SIZES[len(expected) :][:1]:
        with pytest.raises(UnsupportedFormat):
            check_cuts(model, tp)


def test_a_refusal_names_module_rule_numbers_and_what_works() -> None:
    with pytest.raises(UnsupportedFormat) as caught:
        check_cuts(on_meta("glm-4.7-fp8", FP8_BLOCK), 8)
    said = str(caught.value)
    assert said.startswith(
        "model.layers.3.mlp.experts.0.gate_proj: "
        "moe_intermediate_size 1536 / 8 = 192 is not a multiple of 128 (fp8_block)"
    )
    # 89 sparse layers and the MTP layer, each with 160 experts and a shared one, three matrices each
    assert said.endswith(f", and {90 * 161 * 3 - 1} more")
    assert caught.value.hint == "tensor-parallel sizes that work: 1, 2, 4"


@pytest.mark.parametrize(
    ("columns", "unit", "tp", "most"),
    [
        (2880, 32, 2, 1440),  # 45 groups each
        (2880, 32, 4, 736),  # 23, 23, 22, 22
        (2880, 32, 8, 384),  # 12, 12, then 11
        (2880, 32, 3, 960),
        (768, 128, 4, 192),  # 2, 2, 1, 1 blocks were a third above the mean: left to the format to refuse
        (1536, 128, 8, 192),
        (1408, 1, 16, 88),
        (1408, 1, 3, None),
    ],
)
def test_shares_that_groups_divide_nearly(columns: int, unit: int, tp: int, most: int | None) -> None:
    cut = Cut(1, columns, "intermediate_size", unit=unit)
    assert cut.pieces(tp) == most
    if most is not None:
        assert cut.share(2 * columns, tp) == 2 * most, "gate and up in one"
        assert most * tp >= columns, "every column has its place"


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        check_cuts(on_meta("glm-4.7-fp8", num_attention_heads=40, num_key_value_heads=8), 16)
    assert "model.layers.0.self_attn.q_proj: num_attention_heads 40 / 16 is not a whole number" in str(
        caught.value
    )
    assert caught.value.hint == "tensor-parallel sizes that work: 1, 2, 4, 8"
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight: vocab_size 151552 / 3 "):
        check_cuts(on_meta("glm-4.7-fp8"), 3)
    with pytest.raises(ConfigError, match="over 0 ranks"):
        check_cuts(on_meta("glm-4.7-fp8"), 0)


# how the names end of what is divided along output and along input features; every rank has the rest whole
OUTPUTS = (
    *("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "in_proj_qkv", "in_proj_z", "in_proj_a"),
    *("in_proj_b", "gate_proj", "up_proj", "w1", "w3", "lm_head", "gate_up_proj"),
    *("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_up_proj_bias", "sinks", "embed_tokens.weight"),
    *("conv1d.weight", "dt_bias", "A_log"),
)
INPUTS = ("o_proj", "out_proj", "down_proj", "w2")


@pytest.mark.parametrize("model_type", names("models"))
def test_what_is_cut_where(model_type: str) -> None:
    module = load("models", model_type)
    config = module.Config.from_hf(module.TINY | module.TINY.get("text_config", {}))
    model = module.Model(config, Build(probe_cpu(), META, torch.bfloat16, torch.bfloat16, 1))
    over_heads = ("q_norm.weight", "k_norm.weight") if model_type == "minimax_m2" else ()
    seen = set()
    for slot in chosen_slots(model, None):
        name = slot.module if isinstance(slot, WeightSlot) else next(iter(slot.tensors))
        axis = 0 if name.endswith(OUTPUTS + over_heads) else 1 if name.endswith(INPUTS) else None
        assert (None if slot.cut is None else slot.cut.axis) == axis, name
        if slot.cut is not None:
            size = slot.target.shape[-1] if slot.target.dim() == 1 or axis == 1 else slot.target.shape[0]
            assert name.endswith("_bias") or slot.target.dim() == 3 or size % slot.cut.count == 0, name
            assert not slot.cut.runs or sum(slot.cut.runs) == size, name
        seen.add(axis)
    assert seen == {0, 1, None}
