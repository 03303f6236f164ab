"""`--requantize fp8` on a GPU that is not there: which weights a model keeps in FP8, what they mean, cost and
take, and what is left as it is. Nothing is launched; how such layers compute is in
tests/cpu/engine/test_gpu_path.py and tests/gpu/test_engine.py."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.outline import facts, make_model
from firebox.errors import ConfigError
from firebox.formats import awq, bf16, fp8_channel
from firebox.formats.base import Cut, Format, PlainSlot, StoredSlot, WeightSlot
from firebox.hardware.base import Gpu, find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import _linear
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.layers.linear import DENSE, Linear
from firebox.models.base import decode_bytes
from firebox.weights import requantise
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.load import chosen_slots, load_weights
from firebox.weights.requantise import Requantiser, is_requantised, round_trip, stored_bytes
from tests.support.dry import model_of
from tests.support.quantise import compress, compressed_scheme, decompress
from tests.support.small_models import SIZES, write_small

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
CPU = torch.device("cpu")
COLUMNS = 256
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "dtype": "bfloat16"}
PARTS = {"l.q": 256, "l.k": 128}
FP8 = compressed_scheme(num_bits=8, type="float", strategy="channel")
# Kept in FP8, and what would be if a kernel read it so: MLA's kv_b is split into heads in the compute dtype.
CHANGED = re.compile(
    r".*(self_attn\.(q|k|v|o|q_a|q_b|kv_a)_proj(_with_mqa)?|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)"
    r"|mlp\.(gate|up|down)_proj|mlp\.shared_experts?\.(gate|up|down)_proj)|(language_model\.)?lm_head"
)
LEFT = re.compile(r".*\.kv_b_proj")


def kernels() -> Requantiser:
    return Requantiser(0.04, kernels=True)


def build(requantiser: Requantiser, gpu: str = "gb10", device: torch.device = CPU, **options: Any) -> Build:
    on = find_gpu(gpu)
    return Build(
        on, device, torch.bfloat16, torch.bfloat16, 64, shared=Device(on, device, 64),
        requantise=requantiser.quantise, **options,
    )  # fmt: skip


def in_formats(**formats: Format) -> dict[str, Any]:
    return {"format_of": {f"l.{name}": format for name, format in formats.items()}.__getitem__}


def matrix(rows: int, columns: int = COLUMNS, by: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16() * by


def by_the_library(weight: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' FP8 of `weight`, and back."""
    return decompress("float-quantized", FP8, compress("float-quantized", FP8, weight.float()))


def fill(linear: Linear, weights: dict[str, torch.Tensor]) -> None:
    """Unquantised ones; the biases are the rows' numbers."""
    for slot in linear.slots():
        if isinstance(slot, PlainSlot):
            slot.fill({slot.name: torch.arange(slot.target.shape[0]).float()})
        elif isinstance(slot, StoredSlot | WeightSlot):
            slot.fill({f"{slot.module}.weight": weights[slot.module]})


# ---- one layer


def test_a_merged_projection_is_quantised_whole_row_by_row() -> None:
    """q and k, k three times as large, with a bias: the checkpoint's tensors are asked for, FP8 is kept, and
    it means what compressed-tensors makes of each part."""
    requantiser = kernels()
    linear = Linear(build(requantiser), COLUMNS, PARTS, bias=True)
    assert (linear.refusal, linear.format, linear.weight.is_meta) == (None, "fp8_channel", True)
    weights = {"l.q": matrix(256), "l.k": matrix(128, by=0.06)}
    slots = [slot for slot in linear.slots() if isinstance(slot, StoredSlot)]
    for slot in slots:
        assert slot.tensors == {f"{slot.module}.weight": bf16.Format().tensors(*slot.shape)["weight"]}
        assert slot.stored_bytes == slot.shape[0] * (COLUMNS + 4) and is_requantised(slot)
        assert stored_bytes(slot) == slot.shape[0] * COLUMNS * 2
        assert requantiser.kept_bytes(slot) == slot.stored_bytes
    fill(linear, weights)
    linear.finish()
    assert linear._kernels is not None
    problem, kept = linear._kernels.problem, linear._kernels.weights
    assert problem == _linear.Problem(384, COLUMNS, "fp8_channel", bias=True)
    assert kept.w.dtype == torch.float8_e4m3fn and kept.row_scale is not None
    rows = torch.cat([*weights.values()]).float()
    assert torch.equal(kept.row_scale, rows.abs().amax(1) / 448)
    meant = torch.cat([by_the_library(weight) for weight in weights.values()])
    assert torch.equal(_linear.dequantised(problem, kept), meant) and not torch.equal(meant, rows)
    assert kept.bias is not None
    assert torch.equal(kept.bias, torch.cat((torch.arange(256.0), torch.arange(128.0))).bfloat16().float())
    assert [found.module for found in requantiser.done] == ["l.q", "l.k"]
    for found in requantiser.done:
        assert (found.error, found.bulk_error) == pytest.approx(round_trip(weights[found.module].float()))
        assert 0.025 < found.error < 0.028


def test_an_unquantised_part_joins_the_fp8_of_the_others() -> None:
    """Without --requantize no kernel reads such a layer, with it one does."""
    formats = in_formats(q=bf16.Format(), k=fp8_channel.Format())
    requantiser = kernels()
    linear = Linear(build(requantiser, **formats), COLUMNS, PARTS)
    assert linear.refusal is None and linear.format == "fp8_channel"
    stored = {"l.q": {"weight": matrix(256)}, "l.k": fp8_channel.quantise(matrix(128))}
    for slot in linear.slots():
        assert isinstance(slot, StoredSlot) and is_requantised(slot) == (slot.module == "l.q")
        slot.fill({f"{slot.module}.{part}": tensor for part, tensor in stored[slot.module].items()})
    linear.finish()
    assert linear._kernels is not None and [found.module for found in requantiser.done] == ["l.q"]
    problem, kept = linear._kernels.problem, linear._kernels.weights
    meant = [by_the_library(matrix(256)), fp8_channel.Format().dequantise(stored["l.k"], 128, COLUMNS)]
    assert torch.equal(_linear.dequantised(problem, kept), torch.cat(meant))


LEFT_ALONE: dict[str, tuple[dict[str, Any], dict[str, Any], int, list[str]]] = {
    "for torch": ({}, {"dense": DENSE}, COLUMNS, ["l.q", "l.k"]),
    "a width that no kernel reads": ({}, {}, 40, ["l.q", "l.k"]),
    "beside a format that is not FP8": (in_formats(q=bf16.Format(), k=awq.Format(32)), {}, COLUMNS, ["l.q"]),
    "gates": ({}, {"requantisable": False, "dense": DENSE}, COLUMNS, []),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_no_kernel_reads_in_fp8_is_left_as_it_is(case: str) -> None:
    """To the bit, and said unless it was never meant."""
    options, of_layer, columns, left = LEFT_ALONE[case]
    requantiser = kernels()
    linear = Linear(build(requantiser, **options), columns, PARTS, **of_layer)
    assert linear.refusal is not None
    for slot in linear.slots():
        assert isinstance(slot, WeightSlot)
        if slot.format.name == "bf16":
            slot.fill({f"{slot.module}.weight": matrix(PARTS[slot.module], columns)})
            requantiser(slot)
            assert torch.equal(slot.target, matrix(PARTS[slot.module], columns))
            assert requantiser.kept_bytes(slot) == PARTS[slot.module] * columns * 2
    assert (requantiser.left, requantiser.done) == (left, [])
    (line,) = requantiser.summary(10, 10)
    said = f"{len(left)} tensors stay unquantised, as no kernel reads them in FP8 (l.q first)"
    assert line == f"requantize fp8: {said if left else 'no tensor is unquantised, nothing changed'}"


@pytest.mark.parametrize("why", ["the layer", "the model's part"])
def test_what_is_not_to_be_requantised_stays_in_bf16_kernels(why: str) -> None:
    of_build = {"requantisable": why == "the layer"}
    requantiser = kernels()
    made = Linear(build(requantiser, **of_build), COLUMNS, PARTS, requantisable=why != "the layer")
    assert (made.refusal, made.format) == (None, "bf16")
    weights = {path: matrix(rows) for path, rows in PARTS.items()}
    fill(made, weights)
    made.finish()
    assert made._kernels is not None and torch.equal(made._kernels.weights.w, torch.cat([*weights.values()]))
    assert not requantiser.done


def test_a_share_is_grown_with_zeros_behind_its_scales() -> None:
    """GLM-4.5-Air's dense MLP at tp 8: 1,368 columns are kept as 1,376."""
    requantiser = kernels()
    cut = Cut(1, 8 * 1368, "intermediate_size")
    linear = Linear(build(requantiser), 8 * 1368, {"l.down": 128}, cuts=(cut,), unit=16)
    assert linear.problem(8) == _linear.Problem(128, 1376, "fp8_channel")
    narrow = Linear(build(requantiser), 1368, {"l.down": 128}, cuts=(Cut(1, 1368, "inter"),), unit=16)
    fill(narrow, {"l.down": matrix(128, 1368)})
    narrow.finish()
    assert narrow._kernels is not None
    found = _linear.dequantised(narrow._kernels.problem, narrow._kernels.weights)
    assert torch.equal(found[:, :1368], by_the_library(matrix(128, 1368))) and not found[:, 1368:].any()


@pytest.mark.parametrize("value", [1e6, torch.nan, torch.inf])
def test_what_loses_range_is_refused_as_it_is_loaded(value: float) -> None:
    """One outlier a row that costs all the rest of it; and what is no number."""
    weight = matrix(128).float()
    weight[torch.arange(128), torch.arange(128)] = value
    linear = Linear(build(kernels()), COLUMNS, {"l.o": 128})
    with pytest.raises(ConfigError, match=r"l\.o has a relative error of .*the limit is 0\.04"):
        fill(linear, {"l.o": weight})


def test_a_few_rows_at_a_time_and_the_original_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantised at once is small, the result the same, and nothing holds the unquantised weight."""
    monkeypatch.setattr(requantise, "ELEMENTS_AT_ONCE", 7 * COLUMNS)
    seen: list[int] = []
    whole = fp8_channel.quantise

    def watched(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(rows.shape[0])
        return whole(rows)

    monkeypatch.setattr(fp8_channel, "quantise", watched)
    linear = Linear(build(kernels()), COLUMNS, {"l.o": 128})
    weight = matrix(128)
    gone = weakref.ref(weight)
    fill(linear, {"l.o": weight})
    assert max(seen) == 7 and sum(seen) == 128
    del weight
    gc.collect()
    assert gone() is None, "the original is still held"
    linear.finish()
    assert linear._kernels is not None
    found = _linear.dequantised(linear._kernels.problem, linear._kernels.weights)
    assert torch.equal(found, by_the_library(matrix(128)))


def test_made_up_weights_are_requantised_as_a_checkpoints() -> None:
    requantiser = kernels()
    linear = Linear(build(requantiser), COLUMNS, PARTS)
    for slot in linear.slots():
        assert isinstance(slot, StoredSlot)
        slot.invent(torch.Generator().manual_seed(0))
    linear.finish()
    assert linear._kernels is not None and linear._kernels.problem.format == "fp8_channel"
    found = _linear.dequantised(linear._kernels.problem, linear._kernels.weights)
    assert found.std() == pytest.approx(COLUMNS**-0.5, rel=0.02)
    assert [0.025 < done.error < 0.028 for done in requantiser.done] == [True, True]


def test_a_gpu_without_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="--requantize fp8: a100 has no FP8 type"):
        build(kernels(), "a100")


# ---- whole models


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp(request.param), request.param)


def test_exactly_the_projections_are_kept_in_fp8(folder: Path) -> None:
    """Of every architecture, all in bf16: as on a CPU, but for MLA's kv_b, which torch computes with. The
    bytes of a token are what is kept, and the loader's errors are those of a CPU."""
    checkpoint, requantiser = open_checkpoint(folder), kernels()
    model: Any = make_model(checkpoint, build(requantiser))
    slots = chosen_slots(model, checkpoint.names())
    kept = {slot.module for slot in slots if isinstance(slot, StoredSlot) and is_requantised(slot)}
    modules = {name.removesuffix(".weight") for slot in slots for name in slot.tensors}
    assert kept == {module for module in modules if CHANGED.fullmatch(module)} and "lm_head" in str(kept)
    before, after = (decode_bytes(model, count) for count in (stored_bytes, requantiser.kept_bytes))
    saved = [stored_bytes(s) - requantiser.kept_bytes(s) for s in slots if getattr(s, "module", "") in kept]
    assert before - after == sum(saved) and min(saved) > 0
    as_stored = dataclasses.replace(build(requantiser), requantise=None)  # a shared expert is one more routed
    assert decode_bytes(make_model(checkpoint, as_stored), stored_bytes) == before  # type: ignore[arg-type]
    load_weights(model, checkpoint, on_filled=requantiser)
    assert {found.module for found in requantiser.done} == set(map(published, kept))
    left = {module for module in modules if LEFT.fullmatch(module)}
    assert set(map(published, requantiser.left)) == set(map(published, left))
    said, read, *more = requantiser.summary(before, after)
    assert said.startswith(f"requantize fp8: {len(kept)} tensors; relative error 0.02")
    assert f"{before / 1e6:,.3f} MB → {after / 1e6:,.3f} MB" in read and "CPU" not in read
    stay = f"requantize fp8: {len(requantiser.left)} tensors stay unquantised"
    assert [line.startswith(stay) for line in more] == [True] * bool(requantiser.left)
    on_cpu = Requantiser(0.04)
    plain = Build(probe_cpu(), CPU, torch.bfloat16, torch.bfloat16, 64)
    load_weights(make_model(checkpoint, plain), checkpoint, on_filled=on_cpu)
    errors = {published(found.module): found.error for found in on_cpu.done}
    for found in requantiser.done:
        assert found.error == pytest.approx(errors[found.module], rel=0.05), found.module


def published(module: str) -> str:
    """transformers saves Kimi-K2.5's layers under another name."""
    return module.replace(".model.blocks.", ".model.layers.")


def test_a_tied_output_matrix_is_the_embedding_and_stays() -> None:
    model = model_of("qwen3_moe", find_gpu("gb10"), requantize=True, tie_word_embeddings=True, **WIDE)
    assert model.head.linear._kernels.problem.format == "bf16" and model.head.format == "bf16"
    assert model.head.linear._kernels.weights.w is model.embedding.weight
    assert model.blocks[0][0].qkv._kernels.problem.format == "fp8_channel"


def test_the_router_stays() -> None:
    model = model_of("gpt_oss", find_gpu("gb10"), requantize=True, **WIDE | {"intermediate_size": 128})
    (router,) = {mlp._kernels._router._kernels.problem.format for _, mlp in model.blocks}
    assert router == "bf16" and model.head.linear._kernels.problem.format == "fp8_channel"


def test_the_engine_counts_fp8_before_it_loads() -> None:
    """gpt-oss-120b on the meta device: q, k, v, o of 36 layers and the output matrix take one byte for two,
    and four for each row."""
    hidden, q, kv, vocab = 2880, 64 * 64, 8 * 64, 201_088
    shapes = 36 * [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)] + [(vocab, hidden)]
    saved = sum(rows * columns - 4 * rows for rows, columns in shapes)
    plain, fp8 = (weights_bytes(find_gpu("gb10"), requantize) for requantize in ("none", "fp8"))
    assert plain - fp8 == saved == 1_532_691_968


def weights_bytes(gpu: Gpu, requantize: str) -> int:
    card = CARDS / "gpt-oss-120b"
    model = ModelConfig(model=str(card), dtype="bfloat16", load_format="dummy", requantize=requantize)
    return facts(open_checkpoint(card), Config(model=model, engine=EngineConfig()), gpu).weights_bytes
