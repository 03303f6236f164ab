"""TINY checkpoints in each format they are published in give the greedy tokens of transformers on what the
quantised weights mean."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

from firebox.engine.outline import make_model
from firebox.find import load, names
from firebox.formats.base import WeightSlot
from firebox.formats.select import formats_of
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.load import chosen_slots
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import InProcessEngine
from tests.support.published import PUBLISHED, Published
from tests.support.quantise import (
    GPT_OSS_MXFP4,
    RECIPES,
    gpt_oss_in_mxfp4,
    quantise_checkpoint,
    read_tensors,
    write_tensors,
)

TOKENS = 16
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
LATENT = {"moe_intermediate_size": 96, "q_lora_rank": 64, "v_head_dim": 32}
HYBRID = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}
SIZES: dict[str, dict[str, Any]] = {  # that every group divides
    "glm4_moe": {"moe_intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 96},
    "minimax_m2": {"intermediate_size": 96},
    "deepseek_v3": LATENT,
    "kimi_k2": LATENT,
    "kimi_k25": LATENT,
    "qwen3_5_moe": HYBRID,
    "qwen3_5_moe_text": HYBRID,
}
LISTED = [row for row in PUBLISHED if row.recipe in BY_NAME]
# every other way of writing a checkpoint that is read, on one architecture
REST = [
    Published("glm4_moe", name, "")
    for name in BY_NAME
    if ("glm4_moe", name) not in {(row.model, row.recipe) for row in LISTED}
]


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(1, 320) for _ in range(n)] for n in (1, 17, 40)]


def greedy(folder: Path, reference: Any) -> None:
    engine = InProcessEngine(folder)
    expected = [reference_greedy(reference, prompt, TOKENS) for prompt in prompts()]
    found = [ids[:TOKENS] for ids in engine.generate(prompts())]
    assert found == expected
    assert len({tuple(ids) for ids in found}) == len(found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: write_checkpoint(folder / name, sized(name, sizes)) for name, sizes in SIZES.items()}


def sized(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = load("models", name).TINY
    if "text_config" in config:
        return config | {"text_config": config["text_config"] | sizes}
    return config | sizes


def test_the_table_has_every_architecture() -> None:
    assert {row.model for row in PUBLISHED} == set(names("models"))
    assert {row.recipe for row in PUBLISHED} <= {*BY_NAME, "mxfp4"}
    assert [row for row in PUBLISHED if row not in LISTED] == [
        row for row in PUBLISHED if row.model == "gpt_oss"
    ]


@pytest.mark.parametrize("row", [*LISTED, *REST], ids=lambda row: row.id)
def test_it_answers_as_transformers_on_what_the_weights_mean(
    plain: dict[str, Path], row: Published, tmp_path: Path
) -> None:
    """The loader refuses a tensor that the formats it read from config.json do not account for."""
    folder = tmp_path / row.recipe
    recipe = BY_NAME[row.recipe]
    meant = quantise_checkpoint(plain[row.model], folder, recipe, row.plain)
    assert expert_formats(folder) == {formats_of({"quantization_config": recipe.section})("any").name}
    greedy(folder, load_reference(meant))


def expert_formats(folder: Path) -> set[str]:
    checkpoint = open_checkpoint(folder)
    model = make_model(checkpoint, Build(probe_cpu(), torch.device("meta"), torch.float32, torch.float32, 1))
    slots = chosen_slots(model, checkpoint.names())
    return {s.format.name for s in slots if isinstance(s, WeightSlot) and ".experts." in s.module}


@pytest.mark.parametrize("model", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("recipe", ["fp8_channel", "fp8_tensor", "int4_group", "fp8_block"])
def test_it_answers_as_transformers_that_reads_the_checkpoint_itself(
    plain: dict[str, Path], model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formats that transformers 5.23 can dequantise on a CPU, experts included."""
    quantise_checkpoint(plain[model], tmp_path / recipe, BY_NAME[recipe])
    # it asks for accelerate, which it does not need to dequantise
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True
    )
    config = (
        FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
        if recipe == "fp8_block"
        else CompressedTensorsConfig(dequantize=True)
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / recipe, quantization_config=config, dtype=torch.float32
    )
    greedy(tmp_path / recipe, reference.eval())


@pytest.mark.parametrize("reads", ["what the weights mean", "the blocks itself"])
def test_gpt_oss_in_mxfp4(tmp_path: Path, reads: str) -> None:
    """With the names and shapes of openai/gpt-oss-20b."""
    config = load("models", "gpt_oss").TINY
    folder = write_checkpoint(tmp_path / "plain", config)
    stored, meant = gpt_oss_in_mxfp4(read_tensors(folder))
    write_tensors(tmp_path / "mxfp4", config | {"quantization_config": GPT_OSS_MXFP4}, stored)
    write_tensors(tmp_path / "meant", config, meant)
    assert stored["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (8, 192, 2, 16)
    assert stored["model.layers.0.mlp.experts.down_proj_scales"].shape == (8, 64, 3)
    reference = load_reference(tmp_path / "meant")
    if reads == "the blocks itself":
        reference = AutoModelForCausalLM.from_pretrained(
            tmp_path / "mxfp4", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
        )
    greedy(tmp_path / "mxfp4", reference.eval())
