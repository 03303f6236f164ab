"""The model cards against what their makers publish: parameters, bytes, cache, formats. Each card is built on
the meta device; sources and what could not be confirmed are in src/firebox/assets/cards/README.md."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from firebox.cache.specs import PagedSpec, cache_needs
from firebox.engine.outline import make_model
from firebox.errors import UnsupportedModel
from firebox.find import names
from firebox.formats.base import FLOATS, OneOf, Slot, WeightSlot
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.moe import MoeBlock
from firebox.models import qwen3_moe
from firebox.models.base import parameters
from firebox.weights.checkpoint import Checkpoint, open_checkpoint

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
BILLION, TRILLION = 10**9, 10**12
NAMES = sorted(folder.name for folder in CARDS.iterdir() if folder.is_dir())


@dataclass(frozen=True)
class Card:
    """A card's files and its model, without memory."""

    checkpoint: Checkpoint
    model: Decoder

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """Without the MTP layer's."""
        entries = (e.layouts[0] if isinstance(e, OneOf) else (e,) for e in self.model.slots())
        slots = [slot for slots in entries for slot in slots]
        return [slot for slot in slots if not any(name.startswith(self.mtp_prefix) for name in slot.tensors)]

    @property
    def mtp_prefix(self) -> str:
        """What the names of an MTP layer begin with."""
        layers = self.checkpoint.text_config["num_hidden_layers"]
        return "mtp." if "qwen3_5" in self.checkpoint.model_type else f"model.layers.{layers}."

    @property
    def mtp_layer(self) -> int:
        """Parameters of a multi-token-prediction layer: one more block, and the projection of hidden state
        and embedding that stands before it. Not its copies of embedding and output matrix."""
        last = sum(
            slot.target.numel()
            for half in self.model.blocks[-1]
            for entry in half.slots()
            for slot in (entry.layouts[0] if isinstance(entry, OneOf) else (entry,))
        )
        hidden = self.checkpoint.text_config["hidden_size"]
        return last + 2 * hidden * hidden

    @property
    def bytes(self) -> int:
        """What the weights take on disk: floats in bf16, but the routers' float32 bias."""
        return sum(
            math.prod(spec.shape)
            * (spec.dtypes[0].itemsize if spec.dtypes != FLOATS else min(slot.target.itemsize, 4))
            for slot in self.slots
            for spec in slot.tensors.values()
            if not spec.optional
        )


@functools.cache
def card(name: str) -> Card:
    checkpoint = open_checkpoint(CARDS / name)
    meta = torch.device("meta")
    model = make_model(checkpoint, Build(probe_cpu(), meta, torch.bfloat16, torch.bfloat16, 1))
    assert isinstance(model, Decoder)
    return Card(checkpoint, model)


def agrees(found: float, published: str, unit: int) -> bool:
    """Is `published` ("5.13") what a maker prints for `found`: rounded, or cut off, at its last digit?"""
    step = 10.0 ** -len(published.partition(".")[2])
    return float(published) - step / 2 <= found / unit < float(published) + step


def test_the_cards_are_those_of_the_design() -> None:
    assert set(NAMES) == {
        "glm-4.7-fp8",
        "glm-4.7-nvfp4",
        "gpt-oss-120b",
        "gpt-oss-20b",
        "qwen3.5-397b-a17b-nvfp4",
        "qwen3-30b-a3b",
        "kimi-k2.5-int4",
        "kimi-k2-thinking-nvfp4",
        "glm-4.5-air-fp8",
    }
    assert {card(name).checkpoint.model_type for name in NAMES} <= set(names("models"))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("gpt-oss-120b", "116.83", "5.13"),  # model card, table 1: active without the embedding
        ("gpt-oss-20b", "20.91", "3.61"),
    ],
)
def test_gpt_oss_parameters(name: str, total: str, active: str) -> None:
    found = parameters(card(name).model)
    assert agrees(found.total, total, BILLION)
    assert agrees(found.active, active, BILLION)


@pytest.mark.parametrize("name", ["glm-4.7-fp8", "glm-4.7-nvfp4"])
def test_glm_4_7_parameters(name: str) -> None:
    """355 B are with the MTP layer, without embedding and output matrix (GLM-4.5's report, table 1); 32 B
    likewise without either, and without the MTP layer."""
    found = parameters(card(name).model)
    assert agrees(found.total - 2 * found.embedding + card(name).mtp_layer, "355", BILLION)
    assert agrees(found.active - found.embedding, "32", BILLION)


def test_glm_4_5_air_parameters() -> None:
    """106 B and 12 B are without embedding and output matrix, and without the MTP layer; with that they were
    108 B."""
    found = parameters(card("glm-4.5-air-fp8").model)
    assert agrees(found.total - 2 * found.embedding, "106", BILLION)
    assert agrees(found.active - found.embedding, "12", BILLION)


@pytest.mark.parametrize("name", ["kimi-k2.5-int4", "kimi-k2-thinking-nvfp4"])
def test_kimi_k2_parameters(name: str) -> None:
    """1.04 T (1043 B in GLM-4.5's report) are with an MTP layer, which the published checkpoints do not
    have."""
    found = parameters(card(name).model)
    assert agrees(found.total + card(name).mtp_layer, "1.04", TRILLION)
    assert agrees(found.total + card(name).mtp_layer, "1043", BILLION)
    assert found.total == 1_026_408_232_448
    assert agrees(found.active, "31.7", BILLION) and round(found.active / BILLION) == 32


def test_qwen3_parameters() -> None:
    """3.3 B are with the embedding."""
    found = parameters(card("qwen3-30b-a3b").model)
    assert agrees(found.total, "30.5", BILLION)
    assert agrees(found.active + found.embedding, "3.3", BILLION)


def test_qwen3_5_parameters() -> None:
    """397 B are with the vision tower, without the MTP layer; 17 B are with the embedding."""
    found = parameters(card("qwen3.5-397b-a17b-nvfp4").model)
    vision = vision_parameters(card("qwen3.5-397b-a17b-nvfp4").checkpoint.config["vision_config"])
    assert agrees(found.total + vision, "397", BILLION)
    assert agrees(found.active + found.embedding, "17", BILLION)


def vision_parameters(config: dict[str, Any]) -> int:
    """The matrices of Qwen3.5's vision tower."""
    hidden, merged = config["hidden_size"], config["hidden_size"] * config["spatial_merge_size"] ** 2
    layer = 4 * hidden**2 + 2 * hidden * config["intermediate_size"]
    patch = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    return int(
        config["depth"] * layer
        + merged * (merged + config["out_hidden_size"])
        + hidden * (patch + config["num_position_embeddings"])
    )


@pytest.mark.parametrize(
    ("name", "layers", "kind", "formats"),
    [
        ("glm-4.7-fp8", 1, PagedSpec(8, 128), {"fp8_channel"}),
        ("glm-4.5-air-fp8", 1, PagedSpec(8, 128), {"fp8_channel"}),
        ("glm-4.7-nvfp4", 1, PagedSpec(8, 128), {"bf16"}),
        ("qwen3.5-397b-a17b-nvfp4", 1, PagedSpec(2, 256), {"bf16"}),
        *((name, 0, None, set()) for name in NAMES if name.startswith(("gpt-oss", "kimi", "qwen3-"))),
    ],
)
def test_mtp_layers(name: str, layers: int, kind: PagedSpec | None, formats: set[str]) -> None:
    """A block and a projection; the norms are less than a millionth. No copies of embedding and head."""
    model = card(name).model
    assert model.mtp_cache_specs == (kind,) * layers
    entries = (e.layouts[0] if isinstance(e, OneOf) else (e,) for layer in model.mtp for e in layer.slots())
    slots = [slot for slots in entries for slot in slots]
    expected = layers * card(name).mtp_layer
    assert sum(slot.target.numel() for slot in slots) == pytest.approx(expected, rel=1e-5)
    assert {slot.format.name for slot in slots if isinstance(slot, WeightSlot)} == formats


def test_active_parameters_are_what_one_token_multiplies_with() -> None:
    """Counted once more, from the slots' names: an expert counts top_k / experts of its size."""
    for name in NAMES:
        model = card(name).model
        routed = sum(
            slot.target.numel()
            for slot in card(name).slots
            if any(".mlp.experts" in tensor for tensor in slot.tensors)
        )
        (sparsity,) = {
            mlp.problem.top_k / mlp.problem.experts for _, mlp in model.blocks if isinstance(mlp, MoeBlock)
        }
        found = parameters(model)
        active = found.total - routed * (1 - sparsity) - model.embedding.weight.numel()
        assert found.active == pytest.approx(active, rel=1e-9), name


@pytest.mark.parametrize(
    ("name", "full", "window", "state"),
    [
        ("glm-4.7-fp8", 376_832, 0, 0),
        ("glm-4.7-nvfp4", 376_832, 0, 0),
        ("glm-4.5-air-fp8", 46 * 2 * 8 * 128 * 2, 0, 0),
        ("kimi-k2.5-int4", 61 * 576 * 2, 0, 0),
        ("kimi-k2-thinking-nvfp4", 61 * 576 * 2, 0, 0),
        ("gpt-oss-120b", 18 * 2 * 8 * 64 * 2, 18 * 2 * 8 * 64 * 2, 0),
        ("gpt-oss-20b", 12 * 2 * 8 * 64 * 2, 12 * 2 * 8 * 64 * 2, 0),
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128 * 2, 0, 0),
        ("qwen3.5-397b-a17b-nvfp4", 15 * 2 * 2 * 256 * 2, 0, 45 * 4 * (12288 * 3 + 64 * 128 * 128)),
    ],
)
def test_cache_bytes(name: str, full: int, window: int, state: int) -> None:
    """In bf16, per token; states in float32, per request."""
    needs = cache_needs(card(name).model.cache_specs, 2)
    assert (needs.full_bytes_per_token, needs.window_bytes_per_token) == (full, window)
    assert needs.state_bytes == state


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt-oss-120b", "60.8"),  # model card, table 1
        ("gpt-oss-20b", "12.8"),
        ("kimi-k2-thinking-nvfp4", "553"),  # the download of nvidia/Kimi-K2-Thinking-NVFP4
    ],
)
def test_checkpoint_bytes(name: str, published: str) -> None:
    """In GiB: says that the right modules are quantised."""
    assert agrees(card(name).bytes, published, 2**30)


PARTS = {
    "attention": (".self_attn.", ".linear_attn."),
    "experts": (".mlp.experts",),
    "shared": (".shared_expert",),
    "dense": (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj"),
    "head": ("lm_head",),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glm-4.7-fp8", "attention fp8_channel, experts fp8_channel, shared fp8_channel, dense fp8_channel"),
        (
            "glm-4.5-air-fp8",
            "attention fp8_channel, experts fp8_channel, shared fp8_channel, dense fp8_channel",
        ),
        ("glm-4.7-nvfp4", "attention bf16, experts nvfp4, shared nvfp4, dense nvfp4"),
        ("gpt-oss-120b", "attention bf16, experts mxfp4"),
        ("gpt-oss-20b", "attention bf16, experts mxfp4"),
        ("kimi-k2.5-int4", "attention bf16, experts int4_group, shared bf16, dense bf16"),
        ("kimi-k2-thinking-nvfp4", "attention bf16, experts nvfp4, shared bf16, dense bf16"),
        ("qwen3-30b-a3b", "attention bf16, experts bf16"),
        ("qwen3.5-397b-a17b-nvfp4", "attention bf16, experts nvfp4, shared bf16"),
    ],
)
def test_formats(name: str, expected: str) -> None:
    """Every weight of a part is stored alike, the output matrix always in bf16."""
    found: dict[str, set[str]] = {}
    for slot in card(name).slots:
        if isinstance(slot, WeightSlot):
            part = next(part for part, marks in PARTS.items() if any(mark in slot.module for mark in marks))
            found.setdefault(part, set()).add(slot.format.name)
    assert found == {part: {format} for part, format in (p.split() for p in expected.split(", "))} | {
        "head": {"bf16"}
    }


@pytest.mark.parametrize("name", NAMES)
def test_facts_that_the_engine_reads(name: str) -> None:
    checkpoint = card(name).checkpoint
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.eos_token_ids and checkpoint.shards == ()
    assert max(checkpoint.eos_token_ids) < checkpoint.text_config["vocab_size"]
    assert checkpoint.text_config["max_position_embeddings"] >= 40_960


def test_a_sparse_step_of_zero_is_refused() -> None:
    config = dict(card("qwen3-30b-a3b").checkpoint.text_config) | {"decoder_sparse_step": 0}
    with pytest.raises(UnsupportedModel, match="decoder_sparse_step = 0"):
        qwen3_moe.Config.from_hf(config)
