"""Every bundled card cut to its first layers (--layers): what the engine would launch, keep and capture of
them is what it would of the whole card, and nothing is missing."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.budget import CheckpointFacts
from firebox.engine.outline import Outline, facts, make_outline
from firebox.hardware.base import find_gpu
from firebox.kernels.plan import Setting
from firebox.kernels.select import TORCH
from firebox.layers.launches import OPS, layers_of
from firebox.text.folder import bundled
from firebox.weights.checkpoint import Checkpoint, first_layers, open_checkpoint


def config_of(checkpoint: Checkpoint) -> Config:
    """GPUs' kernels do not compute in float32, which the bundled model does."""
    dtype = "bfloat16" if checkpoint.dtype == "float32" else "auto"
    return Config(ModelConfig(load_format="dummy", dtype=dtype), EngineConfig(device="cuda"))


@functools.cache
def outline(card: str, gpu: str, layers: int | None = None) -> tuple[Checkpoint, Outline]:
    checkpoint = open_checkpoint(bundled()[card])
    if layers is not None:
        checkpoint = first_layers(checkpoint, layers)
    return checkpoint, make_outline(checkpoint, config_of(checkpoint), find_gpu(gpu))


def facts_of(card: str, gpu: str, layers: int) -> CheckpointFacts:
    checkpoint, outlined = outline(card, gpu, layers)
    return facts(checkpoint, config_of(checkpoint), find_gpu(gpu), outlined)


def operations(card: str, gpu: str, layers: int | None = None) -> list[list[Any]]:
    """Of each layer its blocks' kinds, formats and operations, then the head's."""
    outlined = outline(card, gpu, layers)[1]
    setting = Setting(find_gpu(gpu), kv_dtype=outlined.kv.DTYPE)
    model = outlined.model
    return [
        [(type(block), block.format, block.operations(setting)) for block in blocks]
        for blocks in (*model.blocks, (model.head,))
    ]


@pytest.mark.parametrize("gpu", ["h200", "gb10"])
@pytest.mark.parametrize("card", sorted(bundled()))
def test_a_cut_card_is_as_complete_as_the_whole(card: str, gpu: str) -> None:
    *whole, head = operations(card, gpu)
    for layers in (1, 2):
        *cut, last = operations(card, gpu, layers)
        assert cut == whole[:layers] and last == head
        assert all(isinstance(found, tuple) and found for blocks in cut for _, _, found in blocks), cut
        _, outlined = outline(card, gpu, layers)
        assert outlined.model.not_capturable == ""
        assert outlined.choices and [choice.op for choice in outlined.choices if choice.name == TORCH] == []
        setting = Setting(find_gpu(gpu), kv_dtype=outlined.kv.DTYPE)
        found = layers_of(outlined.model, setting)
        assert [alike.refusal for alike in found if alike.refusal] == []
        assert sum(alike.layers for alike in found if alike.op in OPS.values()) == 2 * layers

    one, two = (facts_of(card, gpu, layers) for layers in (1, 2))
    assert 0 < one.weights_bytes < two.weights_bytes
    for found_facts in (one, two):
        kept = (found_facts.kv_bytes_per_token, found_facts.window_bytes_per_token, found_facts.state_bytes)
        assert any(kept), "no layer keeps anything of a token"
        assert found_facts.workspace_bytes > 0 and found_facts.graphs_bytes > 0
