"""`firebox fit --requantize fp8`: what memory, roof and launches become, without GPU and weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from firebox.bench.offline import source_of as source_of_engine
from firebox.cli._fit_model import source_of as source_of_user
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.errors import ConfigError
from firebox.formats.base import WeightSlot
from firebox.hardware.base import find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels.plan import Setting
from firebox.layers import dense_gpu
from firebox.planning.fit import Fit, open_source, plan
from firebox.text.folder import bundled
from firebox.tuning.problems import works_of
from firebox.weights.checkpoint import open_checkpoint
from tests.support.planning import planned, source_of

HIDDEN, Q, KV, VOCAB, LAYERS = 2880, 64 * 64, 8 * 64, 201_088, 36  # gpt-oss-120b
ATTENTION = [(Q, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, Q)]


def requantised(card: str, gpu: str, tp: int = 1) -> Fit:
    on = find_gpu(gpu)
    source = dataclasses.replace(source_of(card), requantise=True)
    return plan(open_source(source, on), on, tp, EngineConfig())


def test_gpt_oss_120b_reads_3_5_gb_a_token_instead_of_5_0() -> None:
    """By hand: a byte less for each weight of attention and output matrix, four more for each of their rows;
    the same in memory, and all of it is room for KV tokens."""
    # a GPU without tuned linear layers: both take the default tiles, whose sums are as large
    before, after = planned("gpt-oss-120b", "rtx-pro-6000"), requantised("gpt-oss-120b", "rtx-pro-6000")
    assert before.roof and after.roof and before.memory and after.memory
    saved = LAYERS * sum(rows * columns - 4 * rows for rows, columns in ATTENTION)
    saved_head = VOCAB * HIDDEN - 4 * VOCAB
    for batch in (1, 8, 64):
        difference = before.roof.steps[batch].weights - after.roof.steps[batch].weights
        assert difference == pytest.approx(saved + saved_head, abs=1)
    assert before.roof.steps[1].weights / 1e9 == pytest.approx(5.00, abs=0.01)
    assert after.roof.steps[1].weights / 1e9 == pytest.approx(3.47, abs=0.01)
    weights = {name: before.memory.weights[name] - found for name, found in after.memory.weights.items()}
    assert {name: found for name, found in weights.items() if found} == {
        "attention": saved,
        "head": saved_head,
    }
    workspace = after.memory.workspace_bytes - before.memory.workspace_bytes
    more = (after.memory.kv_tokens - before.memory.kv_tokens) * after.memory.cache.per_token
    assert more == pytest.approx(saved + saved_head - workspace, abs=16 * after.memory.cache.per_token)
    of_activations = EngineConfig().max_batch_tokens * (Q + 4)  # in FP8, with a scale for each
    assert workspace == pytest.approx(of_activations, rel=1e-3)
    assert (before.document()["requantize"], after.document()["requantize"]) == ("none", "fp8")


def test_its_projections_are_planned_in_fp8_and_nothing_else() -> None:
    for tp in (1, 2):
        found = requantised("gpt-oss-120b", "h200", tp)
        assert [layers.refusal for layers in found.layers if layers.refusal] == [] and found.fits
        formats = {o.name: o.format for layers in found.layers for o in layers.operations}
        assert {name for name, format in formats.items() if format == "fp8_channel"} == {
                "norm_qkv", "qkv", "o", "head",
            }  # fmt: skip
        assert (formats["router"], formats["experts"]) == ("bf16", "mxfp4")
        problems = {o.name: o.problem for layers in found.layers for o in layers.operations}
        qkv, o, head = (problems[name] for name in ("qkv", "o", "head"))
        assert (qkv.format, qkv.rows, qkv.columns, qkv.bias) == (
            "fp8_channel",
            (Q + 2 * KV) // tp,
            HIDDEN,
            True,
        )
        assert (o.format, o.rows, o.columns, o.residual) == ("fp8_channel", HIDDEN, Q // tp, True)
        assert (head.format, head.rows, head.out_dtype) == ("fp8_channel", VOCAB // tp, "f32")


def test_a_cut_leaves_each_row_its_scale() -> None:
    """At tp 2 every rank has half of q, k, v with half of their scales, and half of each row of o with all of
    its scales."""
    before, after = planned("gpt-oss-120b", "h200", 2), requantised("gpt-oss-120b", "h200", 2)
    assert before.memory and after.memory
    halves = sum(rows // 2 * columns - 4 * rows // 2 for rows, columns in ATTENTION[:3])
    inwards = HIDDEN * Q // 2 - 4 * HIDDEN
    saved = before.memory.weights["attention"] - after.memory.weights["attention"]
    assert saved == LAYERS * (halves + inwards)


def test_shared_experts_leave_the_routed_ones_that_they_ran_with() -> None:
    """An unquantised GLM-4.5-Air: its shared expert runs as one more routed one unless it becomes FP8."""
    on = find_gpu("h200")
    card = dataclasses.replace(source_of("glm-4.5-air-fp8", quantization_config=None))
    plain, fp8 = (
        open_source(dataclasses.replace(card, requantise=requantise), on) for requantise in (False, True)
    )
    names = [
        {o.name: o for layers in plan(opened, on, 8, EngineConfig()).layers for o in layers.operations}
        for opened in (plain, fp8)
    ]
    assert "shared_down" not in names[0] and names[0]["experts"].problem.experts == 129
    assert names[1]["shared_gate_up"].format == names[1]["shared_down"].format == "fp8_channel"
    assert names[1]["experts"].format == "bf16" and names[1]["experts"].problem.experts == 128
    assert names[1]["shared_down"].source is dense_gpu
    beside = [[part for part in opened.parts if part.name == "mtp"] for opened in (plain, fp8)]
    kept = [[part.kept_bytes(Setting(on, 8)) for part in parts] for parts in beside]
    assert kept[0] == kept[1] and len(kept[0]) > 1
    assert [fp8.model.mtp[0].mlp.requantises(f"{name}.down_proj") for name in ("mlp", "lm_head")] == 2 * [
        False
    ]


def test_what_torch_computes_with_stays_and_is_counted_so() -> None:
    """Kimi-K2.5's attention is unquantised: all becomes FP8 but kv_b, 61 layers of 64 · 256 rows of 512."""
    on = find_gpu("h200")
    plain = open_source(source_of("kimi-k2.5-int4"), on)
    fp8 = open_source(dataclasses.replace(plain.source, requantise=True), on)
    attention = [next(p for p in opened.parts if p.name == "attention") for opened in (plain, fp8)]
    weights = [[s for s, _ in part.slots if isinstance(s, WeightSlot)] for part in attention]
    kinds = [{(slot.target.shape, slot.format.name) for slot in slots} for slots in weights]
    kv_b = (64 * 256, 512)
    assert {format for shape, format in kinds[0]} == {"bf16"}
    assert {shape for shape, format in kinds[1] if format == "bf16"} == {kv_b}


def test_an_output_matrix_alone() -> None:
    """GLM-4.7-FP8 has nothing else that is unquantised."""
    before, after = planned("glm-4.7-fp8", "gb10", 4), requantised("glm-4.7-fp8", "gb10", 4)
    assert before.memory and after.memory
    changed = {name for name, found in after.memory.weights.items() if found != before.memory.weights[name]}
    assert changed == {"head"}
    saved = before.memory.weights["head"] - after.memory.weights["head"]
    assert saved == 151_552 // 4 * (5120 - 4)


def test_a_gpu_without_fp8() -> None:
    with pytest.raises(ConfigError, match="--requantize fp8: a100 has no FP8 type"):
        requantised("gpt-oss-20b", "a100")


def test_as_a_user_asks_for_it() -> None:
    assert source_of_user("gpt-oss-20b", "auto", "fp8").requantise
    assert not source_of_user("gpt-oss-20b", "auto").requantise
    with pytest.raises(ConfigError, match="'fp4'"):
        source_of_user("gpt-oss-20b", "auto", "fp4")


def test_the_tuner_tunes_what_is_launched() -> None:
    """FP8 entries of linear.json for what `serve --requantize fp8` runs; the router's is as before."""
    source = dataclasses.replace(source_of("gpt-oss-120b"), requantise=True)
    works, refusals = works_of(source, find_gpu("h200"), 1, "linear")
    sizes = {(work.problem.format, work.problem.rows) for work in works}
    rows = {("fp8_channel", Q + 2 * KV), ("fp8_channel", HIDDEN), ("fp8_channel", VOCAB)}
    assert sizes == rows | {("bf16", 128)} and not refusals


@pytest.mark.parametrize(
    ("kind", "requantize", "wanted"), [("h200", "fp8", True), ("h200", "none", False), ("cpu", "fp8", False)]
)
def test_the_roof_of_a_measurement(kind: str, requantize: str, wanted: bool) -> None:
    """`firebox bench offline` counts what its engine reads; a CPU reads dequantised numbers."""
    checkpoint = open_checkpoint(Path(bundled()["gpt-oss-20b"]))
    gpu = probe_cpu() if kind == "cpu" else find_gpu(kind)
    config = Config(model=ModelConfig(requantize=requantize))
    assert source_of_engine("gpt-oss-20b", config, checkpoint, "bfloat16", gpu).requantise is wanted
