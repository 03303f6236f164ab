"""Random weights: every architecture in every format it is published in gets all of its weights, of a
distribution that keeps activations and routing alive."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from firebox.engine.messages import SamplingParams
from firebox.engine.outline import make_model
from firebox.find import load, names
from firebox.formats.base import WeightSlot
from firebox.hardware.probe import probe_cpu
from firebox.kernels.select import TORCH
from firebox.layers.base import Build
from firebox.layers.moe import MoeBlock
from firebox.models.base import Model
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.dummy import load_dummy
from firebox.weights.load import chosen_slots
from tests.support.engine import InProcessEngine
from tests.support.quantise import RECIPES

SECTIONS: dict[str, dict[str, Any]] = {recipe.name: recipe.section for recipe in RECIPES}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
# gpt-oss stores its experts in a way of its own, quantised in MXFP4 only
PAIRS = [
    *((model, "") for model in names("models")),
    *((model, name) for model in names("models") if model != "gpt_oss" for name in SECTIONS),
    ("gpt_oss", "mxfp4"),
]
NORMS = ("norm.weight", "layernorm.weight")
Weights = dict[str, torch.Tensor]


def config_of(model: str, format: str = "", **changes: Any) -> dict[str, Any]:
    """TINY with these changes to the language model, and a section that names the format."""
    config: dict[str, Any] = load("models", model).TINY
    if "text_config" in config:
        config = config | {"text_config": config["text_config"] | changes}
    else:
        config = config | changes
    section = {**SECTIONS, "mxfp4": MXFP4}.get(format)
    return config if section is None else config | {"quantization_config": section}


def made(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32, **build: Any) -> Model:
    """The model of a folder that has a config.json only."""
    (folder / "config.json").write_text(json.dumps(config))
    return make_model(
        open_checkpoint(folder), Build(probe_cpu(), torch.device("cpu"), dtype, dtype, 512, **build)
    )


def filled(model: Model, seed: int = 0) -> Weights:
    """The weights by name, NaN before they are filled."""
    targets = {next(iter(slot.tensors)): slot.target for slot in chosen_slots(model, None)}
    for target in targets.values():
        target.fill_(torch.nan)
    load_dummy(model, seed)
    return targets


@pytest.mark.parametrize(("model", "format"), PAIRS)
def test_every_weight_is_filled_and_the_model_runs(model: str, format: str, tmp_path: Path) -> None:
    built = made(tmp_path, config_of(model, format))
    kinds = {slot.format.name for slot in chosen_slots(built, None) if isinstance(slot, WeightSlot)}
    assert (kinds - {"bf16"} != set()) == (format != ""), "the section quantises something"
    found = filled(built)
    assert len(found) > 20
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    engine = InProcessEngine(tmp_path, load_format="dummy")
    answers = engine.generate([[i, 2 * i + 1, 7] for i in range(1, 9)])
    assert len({tuple(ids) for ids in answers}) > 4, "the next token depends on the prompt"
    assert InProcessEngine(tmp_path, load_format="dummy").generate([[1, 3, 7]]) == [answers[0]]


@pytest.mark.parametrize("model", names("models"))
def test_the_distribution_of_each_kind(model: str, tmp_path: Path) -> None:
    found = filled(made(tmp_path, config_of(model)))
    kinds = set()
    for name, tensor in found.items():
        kind = kind_of(name, tensor)
        kinds.add(kind)
        mean, std, n = float(tensor.float().mean()), float(tensor.float().std()), tensor.numel()
        if kind == "norm":
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif kind == "correction":
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        elif kind == "decay":
            assert tensor.exp().min() >= 1.0 and tensor.exp().max() <= 16.0 and std > 0, name
        elif kind == "time":
            assert F.softplus(tensor).min() > 0.00099 and F.softplus(tensor).max() < 0.101, name
        else:
            expected = {"bias": 0.02, "embedding": 1.0}.get(kind, tensor.shape[-1] ** -0.5)
            # six standard errors of a normal distribution's mean and spread
            assert abs(mean) < 6 * expected / math.sqrt(n), name
            assert abs(std / expected - 1) < 6 / math.sqrt(2 * n), name
    assert {"norm", "matrix", "embedding"} <= kinds
    assert ("decay" in kinds) == ("time" in kinds) == model.startswith("qwen3_5")
    assert ("bias" in kinds) == (model in ("gpt_oss", "glm4_moe"))


def kind_of(name: str, tensor: torch.Tensor) -> str:
    ends = {"e_score_correction_bias": "correction", "A_log": "decay", "dt_bias": "time", "bias": "bias"}
    ends |= {"sinks": "bias", "embed_tokens.weight": "embedding"} | dict.fromkeys(NORMS, "norm")
    norms = ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")
    found = next((kind for end, kind in ends.items() if name.endswith(end)), None)
    return "norm" if name.endswith(norms) else found or "matrix"


@pytest.mark.parametrize("model", names("models"))
def test_seeds(model: str, tmp_path: Path) -> None:
    first, again, other = (filled(made(tmp_path, config_of(model)), seed) for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        constant = kind_of(name, tensor) in ("norm", "correction")
        assert torch.equal(tensor, other[name]) == constant, name


EXPERTS, TOP_K = 32, 4


@pytest.mark.parametrize("model", names("models"))
def test_routing_spreads(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every MoE layer, on what the layers before it make of random tokens: so many tokens choose as many
    distinct experts as chance would, E · (1 − (1 − k/E)^B), and no expert is a favourite."""
    sizes = {"n_routed_experts": EXPERTS, "num_experts": EXPERTS, "num_local_experts": EXPERTS}
    (tmp_path / "config.json").write_text(json.dumps(config_of(model, **sizes, num_experts_per_tok=TOP_K)))
    engine = InProcessEngine(tmp_path, load_format="dummy", moe_backend=TORCH)
    chosen: dict[int, list[torch.Tensor]] = {}
    route = MoeBlock._route

    def spy(self: MoeBlock, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = route(self, h)
        assert self.problem.experts == EXPERTS and found[0].shape[1] == TOP_K
        chosen.setdefault(id(self), []).append(found[0])
        return found

    monkeypatch.setattr(MoeBlock, "_route", spy)
    ids = torch.randint(1, 320, (8, 256), generator=torch.Generator().manual_seed(0))
    every_token = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    engine.generate(ids.tolist(), every_token)  # the last layer's, too
    assert len(chosen) >= 2
    for layer in chosen.values():
        experts = torch.cat(layer)  # [tokens, top_k]
        assert len(experts) == 2048
        for batch in (1, 2, 4, 8, 16):
            distinct = [len(group.unique()) for group in experts.split(batch)]
            expected = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** batch)
            assert sum(distinct) / len(distinct) == pytest.approx(expected, rel=0.15), batch
        counts = experts.flatten().bincount(minlength=EXPERTS) / (2048 * TOP_K / EXPERTS)
        assert counts.min() > 0.2 and counts.max() < 3, counts
