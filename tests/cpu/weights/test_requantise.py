"""`--requantize fp8`: which tensors change and into what, what is refused, and what is reported."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from firebox.cli._explanation import explanation
from firebox.engine.outline import make_model
from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.formats import bf16, mxfp4
from firebox.formats.base import WeightSlot
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.models.base import decode_bytes
from firebox.weights import requantise
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.load import chosen_slots, load_weights
from firebox.weights.requantise import Requantiser, requantised_bytes, round_trip, stored_bytes
from tests.support.checkpoints import load_reference, reference_greedy, reference_logprobs, write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine
from tests.support.quantise import (
    GPT_OSS_MXFP4,
    compress,
    compressed_scheme,
    decompress,
    gpt_oss_in_mxfp4,
    read_tensors,
    write_tensors,
)

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
FP8 = compressed_scheme(num_bits=8, type="float", strategy="channel")
# the projections of attention (linear attention too), dense MLPs and shared experts, and the output matrix
CHANGED = re.compile(
    r".*(self_attn\.(q|k|v|o|q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)"
    r"|mlp\.(gate|up|down)_proj|mlp\.shared_experts?\.(gate|up|down)_proj)|(language_model\.)?lm_head"
)


def by_the_library(weight: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' FP8 of `weight`, and back."""
    return decompress("float-quantized", FP8, compress("float-quantized", FP8, weight))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one tensor


def test_rounding_alone() -> None:
    """The numbers behind the limit of 0.04: normal rows, and the worst that rounding alone can do."""
    weight = normal(256, 1024)
    expected = by_the_library(weight)
    relative = float((expected - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt())
    error, bulk_error = round_trip(weight)
    assert torch.equal(weight, expected)
    assert error == pytest.approx(relative, rel=1e-5) == pytest.approx(bulk_error, rel=1e-5)
    assert 0.0255 < error < 0.0275
    low = torch.where(normal(64, 512) > 0, 1.0, -1.0) * (1 + torch.rand(64, 512) * 0.124)
    low[:, 0] = 448 / 256  # so that the scale is a power of two
    assert 0.033 < max(round_trip(low)) < 0.037


def test_in_bf16_and_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = normal(37, 50).bfloat16(), normal(37, 50).bfloat16()
    expected = by_the_library(whole.float()).bfloat16()
    error = round_trip(whole)
    monkeypatch.setattr(requantise, "ELEMENTS_AT_ONCE", 170)
    assert round_trip(pieces) == pytest.approx(error, rel=1e-9)
    assert torch.equal(whole, expected) and torch.equal(pieces, expected)


def slot_of(target: torch.Tensor, **options: Any) -> WeightSlot:
    return WeightSlot("model.layers.3.o_proj", bf16.Format(), target, **{"requantisable": True, **options})


def outliers(size: float) -> torch.Tensor:
    weight = normal(64, 256)
    weight[torch.arange(64), torch.arange(64) * 3] = size
    return weight


def test_an_outlier_that_costs_all_the_rest_is_refused() -> None:
    """One number a row that is 10^6 times the others: they become zero. Next to it they hardly count, so that
    the error of the whole tensor says nothing."""
    whole, bulk = round_trip(outliers(1e6))
    assert whole < 1e-4 and bulk == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError) as caught:
        Requantiser(0.04)(slot_of(outliers(1e6)))
    message = str(caught.value)
    assert "model.layers.3.o_proj" in message and f"{bulk:.3g} without outliers" in message
    assert "limit is 0.04" in message
    assert "--requantize-limit" in str(caught.value.hint)
    lenient = Requantiser(1.0)
    lenient(slot_of(normal(4, 8)))
    assert len(lenient.done) == 1


def test_an_outlier_that_costs_nothing_is_not() -> None:
    """e4m3 has 15 binades: at 1000 times the others they still are normal numbers, at 10^5 they are not."""
    for size, accepted in ((1e2, True), (1e3, True), (1e5, False)):
        requantiser = Requantiser(0.04)
        if accepted:
            requantiser(slot_of(outliers(size)))
            assert requantiser.done[0].bulk_error < 0.03
        else:
            with pytest.raises(ConfigError):
                requantiser(slot_of(outliers(size)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    weight = normal(8, 16)
    weight[3, 5] = value
    with pytest.raises(ConfigError, match="relative error of nan"):
        Requantiser(1.0)(slot_of(weight))


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(8, 16)
    requantiser = Requantiser(0.04)
    requantiser(slot_of(weight))
    assert not weight.any() and requantiser.done[0].worst == 0.0


def test_slots_that_are_left_alone() -> None:
    requantiser, weight = Requantiser(0.04), normal(8, 32)
    requantiser(slot_of(weight, requantisable=False))
    requantiser(dataclasses.replace(slot_of(weight), format=mxfp4.Format()))
    assert torch.equal(weight, normal(8, 32)) and not requantiser.done


@pytest.mark.parametrize("limit", [0.0, -1.0, 1.5])
def test_a_limit_that_makes_no_sense(limit: float) -> None:
    with pytest.raises(ConfigError, match="requantize_limit"):
        Requantiser(limit)


# ---- whole models


Targets = dict[str, torch.Tensor]  # by the name of the first tensor that goes there


def loaded(folder: Path, requantiser: Requantiser | None) -> Targets:
    """What each slot's target holds."""
    checkpoint = open_checkpoint(folder)
    build = Build(probe_cpu(), torch.device("cpu"), torch.float32, torch.float32, 8)
    model = make_model(checkpoint, build)
    slots = chosen_slots(model, checkpoint.names())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "finish", lambda self: None)  # which packs them
        load_weights(model, checkpoint, on_filled=requantiser or (lambda slot: None))
    return {next(iter(slot.tensors)): slot.target for slot in slots}


def module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def differing(before: Targets, after: Targets) -> set[str]:
    """The modules whose weights are not the same to the bit."""
    assert before.keys() == after.keys()
    return {module_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", names("models"))
def test_exactly_the_projections_change(name: str, tmp_path: Path) -> None:
    """Into what compressed-tensors makes of them; every other tensor stays bit by bit, the experts too."""
    write_checkpoint(tmp_path, load("models", name).TINY)
    requantiser = Requantiser(0.04)
    before, after = loaded(tmp_path, None), loaded(tmp_path, requantiser)
    changed = differing(before, after)
    assert changed == {module for module in map(module_of, before) if CHANGED.fullmatch(module)}
    assert {found.module for found in requantiser.done} == changed and len(requantiser.done) == len(changed)
    for module in changed:
        assert torch.equal(after[f"{module}.weight"], by_the_library(before[f"{module}.weight"]))
    kept = [name for name in before if module_of(name) not in changed]
    parts = ("embed_tokens", "layernorm", "experts") if name != "minimax_m2" else ("embed_tokens", "experts")
    assert all(any(part in name for name in kept) for part in parts)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(1, 320) for _ in range(n)] for n in (1, 17, 40)]


def meant_by_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: by_the_library(tensor) if CHANGED.fullmatch(name.removesuffix(".weight")) else tensor
        for name, tensor in tensors.items()
    }


def test_gpt_oss_with_its_experts_in_mxfp4(tmp_path: Path) -> None:
    """Its experts stay what their blocks mean, attention and output matrix become FP8: the answers of
    transformers on just that; and near those without --requantize."""
    config = load("models", "gpt_oss").TINY
    stored, meant = gpt_oss_in_mxfp4(read_tensors(write_checkpoint(tmp_path / "plain", config)))
    quantised = tmp_path / "mxfp4"
    write_tensors(quantised, config | {"quantization_config": GPT_OSS_MXFP4}, stored)
    write_tensors(tmp_path / "meant", config, meant_by_fp8(meant))
    write_tensors(tmp_path / "before", config, meant)

    before, after = loaded(quantised, None), loaded(quantised, Requantiser(0.04))
    experts = [name for name in before if ".mlp.experts." in name]
    assert len(experts) == 3 * 4 and any(name.endswith("_blocks") for name in experts)
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"}
    assert differing(before, after) == attention | {"lm_head"}

    engine = InProcessEngine(quantised, requantize="fp8")
    reference, plain = load_reference(tmp_path / "meant"), load_reference(tmp_path / "before")
    expected = [reference_greedy(reference, prompt, GREEDY.max_tokens or 0) for prompt in prompts()]
    assert engine.generate(prompts()) == expected
    errors = logprob_errors(engine, plain, prompts()[2])
    assert 0 < errors.median() < 0.15 * reference_logprobs(plain, prompts()[2]).std()


def logprob_errors(engine: InProcessEngine, reference: Any, prompt: list[int]) -> torch.Tensor:
    """Of each prompt token but the first."""
    request_id = engine.submit(prompt, msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    (delta,) = engine.deltas()[request_id]
    assert delta.prompt_logprobs is not None
    found = torch.tensor([entry.logprob for entry in delta.prompt_logprobs[1:] if entry is not None])
    following = torch.tensor(prompt[1:]).unsqueeze(-1)
    return (found - reference_logprobs(reference, prompt)[:-1].gather(1, following).squeeze(-1)).abs()


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "qwen3_5_moe"])
def test_an_unquantised_model_answers_as_transformers_on_what_is_left(name: str, tmp_path: Path) -> None:
    config = load("models", name).TINY
    source = write_checkpoint(tmp_path / "source", config)
    write_tensors(tmp_path / "meant", config, meant_by_fp8(read_tensors(source)))
    reference = load_reference(tmp_path / "meant")
    expected = [reference_greedy(reference, prompt, 12) for prompt in prompts()]
    params = msgspec.structs.replace(GREEDY, max_tokens=12)
    assert InProcessEngine(source, requantize="fp8").generate(prompts(), params) == expected
    assert logprob_errors(InProcessEngine(source, requantize="fp8"), reference, prompts()[2]).max() < 1e-3
    assert logprob_errors(InProcessEngine(source), reference, prompts()[2]).max() > 1e-2


def test_random_weights_are_requantised_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, load("models", "glm4_moe").TINY)
    engine = InProcessEngine(tmp_path, load_format="dummy", requantize="fp8")
    first, _ = (line for line in engine.ready.reasons if line.startswith("requantize "))
    assert 0.025 < float(first.split()[6]) < 0.027, first


def test_a_tied_output_matrix_is_the_embedding_and_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, load("models", "qwen3_moe").TINY | {"tie_word_embeddings": True})
    requantiser = Requantiser(0.04)
    before, after = loaded(tmp_path, None), loaded(tmp_path, requantiser)
    assert not {"model.embed_tokens", "lm_head"} & differing(before, after)
    assert len(requantiser.done) == 3 * 4 + 3  # q, k, v and o of each layer, and one dense MLP


# ---- what is said


def test_it_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line a tensor in the debug log, the summary in the log and among what --explain prints."""
    write_checkpoint(tmp_path, load("models", "qwen3_moe").TINY)
    with caplog.at_level(logging.DEBUG, "firebox"):
        engine = InProcessEngine(tmp_path, requantize="fp8")
    details = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    modules = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qkvo"]
    modules += [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert sorted(line.split()[1].rstrip(":") for line in details) == sorted([*modules, "lm_head"])
    errors = [float(re.search(r"relative error (0\.\d+)", line)[1]) for line in details]  # type: ignore[index]
    assert all(0.02 < error < 0.03 for error in errors)
    assert lines[0].startswith(f"requantize fp8: 16 tensors; relative error {sum(errors) / 16:.3f}")
    assert "limit 0.04" in lines[0] and " MB → " in lines[1]
    assert [line for line in engine.ready.reasons if line.startswith("requantize ")] == lines
    assert all(line in explanation(engine.ready) for line in lines)
    caplog.clear()
    plain = InProcessEngine(tmp_path)
    assert not any("requantize" in line for line in plain.ready.reasons) and not caplog.records


def test_a_model_with_nothing_to_change_says_so() -> None:
    assert Requantiser(0.04).summary(10, 10) == ["requantize fp8: no tensor is unquantised, nothing changed"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"requantize": "fp4"}, "'fp4'"),
        ({"requantize": "fp8", "requantize_limit": 0.0}, "requantize_limit is 0.0"),
        (
            {"requantize": "fp8", "requantize_limit": 0.02},
            r"lm_head has a relative error of 0\.02.* is 0\.02",
        ),
    ],
)
def test_refused_at_start(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    write_checkpoint(tmp_path, load("models", "qwen3_moe").TINY)
    with pytest.raises(ConfigError, match=named):
        InProcessEngine(tmp_path, **settings)


# ---- bytes


def on_meta(card: str) -> Decoder:
    model = make_model(
        open_checkpoint(CARDS / card),
        Build(probe_cpu(), torch.device("meta"), torch.bfloat16, torch.bfloat16, 1),
    )
    assert isinstance(model, Decoder)
    return model


def test_bytes_per_token_of_gpt_oss_120b() -> None:
    """From its config.json by hand: 36 layers, 64 and 8 heads of 64, hidden 2880, 4 of 128 experts."""
    hidden, q, kv, vocab = 2880, 64 * 64, 8 * 64, 201_088
    linear = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    attention = sum(rows * columns for rows, columns in linear)
    attention_rows = sum(rows for rows, _ in linear)
    expert = 3 * hidden * hidden * 17 // 32 + (2 * hidden + hidden) * 2  # MXFP4 is 4.25 bits; biases in bf16
    rest = 2 * (attention_rows + 64 + 128 * hidden + 128 + 2 * hidden)  # biases, sinks, router, norms
    before = 36 * (2 * attention + 4 * expert + rest) + 2 * vocab * hidden + 2 * hidden
    after = before - 36 * (attention - 4 * attention_rows) - (vocab * hidden - 4 * vocab)
    model = on_meta("gpt-oss-120b")
    assert decode_bytes(model, stored_bytes) == before
    assert decode_bytes(model, requantised_bytes) == after
    assert 0.6 < after / before < 0.7


def test_of_glm_4_7_in_fp8_only_the_output_matrix_is_left() -> None:
    model = on_meta("glm-4.7-fp8")
    before, after = (decode_bytes(model, count) for count in (stored_bytes, requantised_bytes))
    assert before - after == 151_552 * (5120 - 4)
