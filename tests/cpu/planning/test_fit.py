"""`firebox fit MODEL` below the command line: every card on every GPU that users have, what does not fit and
what would help. Nothing is compiled here but where a test says so."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firebox.config import EngineConfig
from firebox.errors import ConfigError, UnsupportedModel
from firebox.hardware.base import find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import _attention_choice, _tuned
from firebox.kernels.compile import Compiled
from firebox.kernels.plan import Library, Operation
from firebox.kernels.plan import planned as plan_of
from firebox.layers import dense_gpu, expert_paths, launches
from firebox.planning.fit import Fit, compiled, open_source, plan
from firebox.text.folder import bundled
from tests.support.planning import FP8_BLOCK, opened, planned, source_of
from tests.support.run_cache import run_cache

SIZES = {"gb10": (1, 2, 4), "rtx-pro-6000": (1, 4, 8), "rtx-5090": (1, 2, 4, 8), "h200": (1, 4, 8)}
CARDS = [name for name in bundled() if name != "firebox-tiny"]
# the least of these sizes that holds the card with 4096 tokens
LEAST = {
    "glm-4.5-air-fp8": {"gb10": 1, "rtx-pro-6000": 4, "rtx-5090": 4, "h200": 1},
    "glm-4.7-fp8": {"gb10": 4, "rtx-pro-6000": 4, "rtx-5090": None, "h200": 4},
    "glm-4.7-nvfp4": {"gb10": 2, "rtx-pro-6000": 4, "rtx-5090": 8, "h200": 4},
    "gpt-oss-120b": {"gb10": 1, "rtx-pro-6000": 1, "rtx-5090": 4, "h200": 1},
    "gpt-oss-20b": {"gb10": 1, "rtx-pro-6000": 1, "rtx-5090": 1, "h200": 1},
    "kimi-k2-thinking-nvfp4": {"gb10": None, "rtx-pro-6000": 8, "rtx-5090": None, "h200": 8},
    "kimi-k2.5-int4": {"gb10": None, "rtx-pro-6000": 8, "rtx-5090": None, "h200": 8},
    "qwen3-30b-a3b": {"gb10": 1, "rtx-pro-6000": 1, "rtx-5090": 2, "h200": 1},
    "qwen3.5-397b-a17b-nvfp4": {"gb10": 4, "rtx-pro-6000": 4, "rtx-5090": None, "h200": 4},
}


def experts_of(found: Fit) -> Operation:
    """What the routed experts launch, alike in all layers."""
    (operation,) = {o for layers in found.layers for o in layers.operations if o.name == "experts"}
    return operation


@pytest.mark.parametrize("gpu", SIZES)
@pytest.mark.parametrize("card", CARDS)
def test_every_card_answers_on_every_gpu(card: str, gpu: str) -> None:
    answers = {tp: planned(card, gpu, tp) for tp in SIZES[gpu]}
    fitting = [tp for tp, found in answers.items() if found.fits]
    assert min(fitting, default=None) == LEAST[card][gpu]
    for found in answers.values():
        assert found.memory is not None and found.roof is not None
        assert found.memory.kv_tokens >= 4096 or not found.fits
        assert found.document()["memory"]["kv_tokens"] == found.memory.kv_tokens
        assert found.roof.tokens_per_s(1) < found.roof.tokens_per_s(8) < found.roof.tokens_per_s(64)
        assert [layers.refusal for layers in found.layers if layers.refusal] == []


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_its_launches_on_four_gb10(card: str) -> None:
    """No layer is refused, and 1 to 8192 tokens find their experts."""
    found = plan(opened(card), find_gpu("gb10"), 4, EngineConfig())
    assert [layers.refusal for layers in found.layers if layers.refusal] == []
    operation = experts_of(found)
    made = plan_of(operation, found.gpu, found.max_tokens)
    routed = [row for row in made if row.op == "moe_gate_up"]
    assert (routed[0].first, routed[-1].last) == (1, 8192)
    assert all(before.last + 1 == after.first for before, after in itertools.pairwise(routed))
    assert {row.path for row in routed} >= {"few", "sorted"}


def test_the_ledger_adds_up() -> None:
    memory = planned("glm-4.7-fp8", "gb10", 4).memory
    assert memory is not None
    found = memory.document()
    spent = sum(found[f"{name}_bytes"] for name in ("reserve", "weights", "workspace", "graphs", "requests"))
    assert sum(found["weights"].values()) == found["weights_bytes"]
    kv = found["gpu_bytes"] - spent - found["snapshots_bytes"]
    assert 0 <= kv - found["kv_tokens"] * found["kv_bytes_per_token"] < 16 * found["kv_bytes_per_token"]
    assert found["kv_bytes_per_token"] == 94_208


# ---- what does not fit


def test_what_is_missing_and_what_would_help() -> None:
    found = planned("glm-4.7-fp8", "gb10", 2)
    memory = found.memory
    assert memory is not None and not found.fits
    assert found.problems == (
        f"{memory.missing_bytes / 2**30:.1f} GiB are missing on each GPU for one request of 4096 tokens",
    )
    assert found.help == ("--tp 4 or 8 or 16",)
    assert memory.missing_bytes == -memory.left_bytes + 4096 * memory.cache.per_token


def test_help_is_true() -> None:
    """GLM-4.5-Air on one GB10 holds 40 thousand tokens: of 60 thousand it is told what to change, and each
    change alone suffices."""
    asked: dict[str, Any] = {"context_length": 60_000}
    found = planned("glm-4.5-air-fp8", "gb10", **asked)
    assert [word.rsplit(" ", 1)[0] for word in found.help] == [
        "--tp 2 or 4 or 8 or",
        "--kv-cache-dtype",
        "--context-length",
    ]
    tokens = int(found.help[2].split()[-1])
    assert planned("glm-4.5-air-fp8", "gb10", kv_cache_dtype="fp8", **asked).fits
    assert planned("glm-4.5-air-fp8", "gb10", 2, **asked).fits
    assert planned("glm-4.5-air-fp8", "gb10", context_length=tokens).fits
    assert not planned("glm-4.5-air-fp8", "gb10", context_length=tokens + 1).fits


def test_routed_experts_are_counted_as_they_are_kept() -> None:
    """gpt-oss-20b, 24 layers of 32 experts: a row has its words, a byte for each 32 columns, of which there
    are 16 · n, and a float32 bias. At tp 2 there are 1,472 columns for 1,440, and on an H200 panels of 128
    columns, 23 for 22.5. The roof is about what has to be read."""
    one, two, panels = (planned("gpt-oss-20b", *where) for where in (("gb10", 1), ("gb10", 2), ("h200", 1)))
    for found, gate_up, down in (
        (one, 5760 * (1440 + 96 + 4), 2880 * (1440 + 96 + 4)),
        (two, 2944 * (1440 + 96 + 4), 2880 * (736 + 48 + 4)),
        (panels, 5760 * (1472 + 92 + 4), 2880 * (1472 + 92 + 4)),
    ):
        assert found.memory is not None and found.fits
        assert found.memory.weights["experts"] == 24 * 32 * (gate_up + down)
    assert one.roof is not None and two.roof is not None
    assert one.roof.steps[64].weights / two.roof.steps[64].weights == pytest.approx(2, rel=0.01)


def test_glm_4_5_air_on_eight_keeps_192_columns_of_176() -> None:
    """In routed and shared experts, and 1,376 of 1,368 in the dense MLP, the MTP layer's experts too."""
    parts = {part.name: part for part in opened("glm-4.5-air-fp8").parts if part.block is None}
    found = planned("glm-4.5-air-fp8", "rtx-pro-6000", 8)
    assert found.memory is not None and found.fits
    dense = found.memory.weights["dense_mlp"] - parts["dense_mlp"].shard_bytes(8)
    assert dense == 8 * (3 * 4096 + 2 * 4)
    shared = found.memory.weights["router_and_shared"] - parts["router_and_shared"].shard_bytes(8)
    assert shared == 45 * 16 * (3 * 4096 + 2 * 4)
    columns = {"experts": 45 * 128 * 192, "mtp": 128 * 192}
    of_mtp = found.memory.weights["mtp"] / (columns["mtp"] * 3 * 4096)
    of_all = found.memory.weights["experts"] / (columns["experts"] * 3 * 4096)
    assert 1 < of_all < 1.02 and 1 < of_mtp < 1.3


def test_fewer_requests_may_help() -> None:
    """Qwen3.5's states: 64 requests take 6.3 GB of each of two H200, 1 almost nothing."""
    asked = {"context_length": 200_000, "max_running_requests": 512}
    found = planned("qwen3.5-397b-a17b-nvfp4", "h200", 2, **asked)
    assert not found.fits and "fewer --max-running-requests" in found.help
    assert planned("qwen3.5-397b-a17b-nvfp4", "h200", 2, **asked | {"max_running_requests": 1}).fits


def test_groups_that_cannot_be_shared_out_equally() -> None:
    """gpt-oss has 90 groups of 32 columns an expert; a rank's 23 and 12 are grown to what tiles divide."""
    whole = planned("gpt-oss-120b", "rtx-pro-6000", 1).memory
    for tp, columns in ((4, 768), (8, 384)):
        found = planned("gpt-oss-120b", "rtx-pro-6000", tp)
        assert found.fits and found.working_tp == (1, 2, 4, 8, 16)
        assert experts_of(found).problem.inter == columns
        assert whole is not None and found.memory is not None
        share = found.memory.weights["experts"] / whole.weights["experts"] * tp
        assert share == pytest.approx(columns * tp / 2880, rel=0.03)


def test_a_cut_that_the_format_does_not_allow() -> None:
    gpu = find_gpu("gb10")
    model = open_source(source_of("qwen3-30b-a3b", quantization_config=FP8_BLOCK), gpu)
    assert plan(model, gpu, 2, EngineConfig()).fits
    found = compiled(plan(model, gpu, 4, EngineConfig()))
    assert (found.fits, found.working_tp, found.help) == (False, (1, 2), ("--tp 1 or 2",))
    (problem,) = found.problems
    assert "moe_intermediate_size 768 / 4 = 192 is not a multiple of 128 (fp8_block)" in problem
    assert problem.endswith("tensor-parallel sizes that work: 1, 2")
    document = found.document()
    assert (document["memory"], document["roof"], document["launches"]) == (None, None, [])
    assert document["tp_that_work"] == [1, 2] and document["checked"] == ["tp"]


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: planned("gpt-oss-20b", "gb10", 0), ConfigError, "--tp 0"),
        (lambda: plan(opened("gpt-oss-20b"), probe_cpu(), 1, EngineConfig()), ConfigError, "about GPUs"),
        (
            lambda: planned("qwen3-30b-a3b", "gb10", context_length=40_961),
            ConfigError,
            "--context-length 40961",
        ),
        (
            lambda: planned("gpt-oss-20b", "gb10", kv_cache_dtype="fp4"),
            ConfigError,
            "kv_cache_dtype is 'fp4'",
        ),
        (
            lambda: open_source(
                dataclasses.replace(source_of("gpt-oss-20b"), model_type="gpt_osset"), find_gpu("gb10")
            ),
            UnsupportedModel,
            "gpt_osset",
        ),
    ],
)
def test_a_wrong_call(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


# ---- launches


@pytest.mark.parametrize("card", ["gpt-oss-20b", "qwen3.5-397b-a17b-nvfp4", "kimi-k2.5-int4"])
def test_what_is_composed_of_torch_operators_is_named(card: str) -> None:
    found = planned(card, "gb10").document()
    assert found["not_planned"] == []
    assert found["refused"] == []


def outcome(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Fit:
    """gpt-oss-20b on gb10, every compile of which ends as told."""

    def compile_all(requests: list[Any], **options: bool) -> list[Compiled]:
        base = Compiled("k", 121, 101_376, True, False, None, 0.1, "3.9", "13", shared_bytes=1000)
        return [dataclasses.replace(base, **changes) for _ in requests]

    monkeypatch.setattr(launches, "compile_all", compile_all)
    return compiled(planned("gpt-oss-20b", "gb10"))


def test_launches_that_do_not_fit_are_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = outcome(monkeypatch, shared_bytes=101_376)
    assert fine.fits and fine.checked == ("memory", "launches")
    large = outcome(monkeypatch, shared_bytes=147_456)
    assert large.launches is not None
    assert not large.fits and len(large.problems) == sum(row.compiled is not None for row in large.launches)
    assert (
        large.problems[0]
        == "embedding, gather: embed at 1 to 8192 tokens: 147456 bytes of shared memory of 101376"
    )
    broken = outcome(monkeypatch, error="PassManager::run failed")
    assert not broken.fits and broken.problems[0].endswith("8192 tokens: PassManager::run failed")


def test_experts_that_no_kernel_runs_do_not_fit() -> None:
    """firebox-tiny computes in float32."""
    found = compiled(planned("firebox-tiny", "gb10"))
    assert found.memory is not None and found.memory.fits
    assert not found.fits and found.help == ("--dtype bfloat16",)
    assert {
        "op": "moe_block",
        "layers": 3,
        "format": "bf16",
        "why": "hidden states are float32; kernels know bfloat16 and float16",
    } in found.document()["refused"]
    assert {row["op"] for row in found.document()["refused"]} == {
        *("embedding", "attention_block", "dense_block", "moe_block", "head")
    }


def test_real_compiles_of_a_small_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same in bf16: all fit, all with the instruction that the kernels are written for. On the GPU of
    which tests/cpu/cli/test_fit_model.py asks the same, so that one of them compiles."""
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(run_cache(tmp_path_factory)))
    gpu = find_gpu("rtx-5090")
    model = open_source(source_of("firebox-tiny", dtype="bfloat16"), gpu)
    found = compiled(plan(model, gpu, 1, EngineConfig()))
    assert found.fits and found.launches
    rows = [launch.document() for launch in found.launches]
    products = [row for row in rows if row["op"] in ("moe_gate_up", "moe_down")]
    assert {row["instruction"] for row in products} == {"mma.bf16"}
    assert all(row["native"] and row["fits"] and row["limit_bytes"] == 101_376 for row in rows)
    assert all(0 < row["shared_bytes"] <= 101_376 for row in products)
    assert products[0]["tokens"] == [1, 1] and products[0]["config"]["rows"] == 64


# ---- fallbacks


@pytest.fixture(autouse=True)
def forget_paths() -> Iterator[None]:
    """What a test makes of tuned files does not outlive it."""
    yield
    _tuned.use()


def test_an_emulated_launch_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of launches without a product `native` says nothing, and they are none."""
    assert not any("is written for" in why for why in outcome(monkeypatch, native=True).fallbacks)
    found = outcome(monkeypatch, native=False, instruction="mma.bf16")
    assert found.launches is not None and found.fits, "slow is not too large"
    products = [row for row in found.launches if row.planned.request and row.planned.request.declares]
    said = [why for why in found.fallbacks if "is written for" in why]
    assert 0 < len(products) < len(found.launches) and len(said) == len(products)
    assert "moe_block, experts: moe_gate_up at 1 to 1 tokens is written for bf16 and runs mma.bf16" in said
    assert found.document()["fallbacks"] == list(found.fallbacks)


def test_default_tiles_are_a_fallback_until_a_file_has_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence an operation. Norms and sampling have one way, attention of a GPU without a file a rule;
    products that cuBLAS does alone are not ours."""
    _tuned.use(tmp_path)
    found = outcome(monkeypatch)
    assert [why.partition(": default tiles: ")[0] for why in found.fallbacks] == [
        *("attention_block, qkv", "attention_block, o"),
        *("moe_block, router", "moe_block, experts", "head, head"),
    ]
    problem = "mxfp4_nibbles hidden=2880 inter=2880 experts=32 top_k=4"
    assert found.fallbacks[3].endswith(f"tuned/nvidia_gb10/experts.json has no entry for '{problem}'")
    assert found.fallbacks[4].endswith(
        "tuned/nvidia_gb10/linear.json has no entry for 'bf16 rows=201088 columns=2880'"
    )
    tuned(monkeypatch, {problem})
    assert [why.partition(":")[0] for why in outcome(monkeypatch).fallbacks] == [
        *("attention_block, qkv", "attention_block, o", "moe_block, router", "head, head")
    ]
    tuned(monkeypatch, None)
    found = outcome(monkeypatch)
    assert found.fallbacks == () and found.launches is not None
    whys = {row.planned.operation.name: row.planned.why for row in found.launches}
    assert (whys["qkv"], whys["experts"].partition(",")[0]) == ("measured", "predicted"), "and says which"


def untuned(card: str, gpu: str, **settings: int) -> set[str]:
    """What --strict says of attention's tiles."""
    found = plan(opened(card), find_gpu(gpu), 1, EngineConfig(**settings))
    rows = (
        row for _, row in launches.rows(found.layers, found.gpu, 512) if row.operation.name == "attention"
    )
    return {why for why in (row.untuned(found.gpu) for row in rows) if why}


def test_default_tiles_of_attention_are_a_fallback_where_the_gpu_has_tuned_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The H200's were measured with pages of 64 tokens. A GPU without a file runs its default by rule, until
    it has a file, of whatever model."""
    heads = "heads=64 kv_heads=8 head_dim=64 value_dim=64"
    sinks = f"decode bfloat16 kv=bfloat16 {heads} page_tokens={{}} {{}}sinks"
    path = "default tiles: tuned/nvidia_{}/attention.json has no entry for {!r}"
    assert untuned("gpt-oss-120b", "h200") == set()
    assert untuned("gpt-oss-120b", "h200", page_tokens=16) == {
        path.format("h200", sinks.format(16, window)) for window in ("", "window ")
    }
    assert untuned("gpt-oss-120b", "gb10") == set()
    folder = tmp_path / "nvidia_gb10"
    folder.mkdir()
    tile = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3}
    entries = {sinks.format(64, "window "): {"1": {"path": "decode", "config": tile}}}
    (folder / "attention.json").write_text(json.dumps(entries))
    _tuned.use(tmp_path)
    _attention_choice.measured.cache_clear()
    try:
        assert untuned("gpt-oss-120b", "gb10") == {path.format("gb10", sinks.format(64, ""))}
    finally:
        _attention_choice.measured.cache_clear()


def test_what_a_layer_gives_to_torch_by_intention_is_no_fallback() -> None:
    """Qwen3.5's gate of the shared expert, one row, says so; the halves of MLA's kv_b are dequantised."""
    for card, names, why in (
        (
            "qwen3.5-397b-a17b-nvfp4",
            {"shared_gate"},
            "has one row, a dot product for each token: a library's",
        ),
        ("kimi-k2.5-int4", {"key_half", "value_half"}, "dequantised weights were asked for"),
    ):
        found = planned(card, "gb10", 4)
        given = {
            (row.operation.name, row.why)
            for _, row in launches.rows(found.layers, found.gpu, 64)
            if isinstance(row.operation, Library)
        }
        assert given == {(name, why) for name in names} and found.fallbacks == ()


def tuned(monkeypatch: pytest.MonkeyPatch, keys: set[str] | None) -> None:
    """From now on gb10 has tuned entries for these problems, or for all (None)."""
    few = {"rows": 16, "tokens": 8, "depth": 64, "warps": 1, "stages": 3}
    many = {"rows": 64, "tokens": 16, "depth": 64}
    entries = {
        "experts": {
            1: {"path": "few", "gate_up": few, "down": few},
            512: {"path": "sorted", "gate_up": many, "down": many, "how": "predicted"},
        },
        "linear": {1: {"path": "few", "config": {}}, 64: {"path": "cublas"}},
        "attention": {},
        "route": {},
    }

    class File(dict[str, Any]):
        def __init__(self, name: str) -> None:
            self.entry = entries[name]

        def get(self, key: str, default: Any = None) -> Any:
            return self.entry if keys is None or key in keys else default

    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": File(name))
    for cached in (expert_paths.settled_path, dense_gpu._path_of):
        cached.cache_clear()


def test_torch_operators_are_a_fallback() -> None:
    assert planned("glm-4.5-air-fp8", "gb10").fallbacks == ()
    assert planned("kimi-k2.5-int4", "gb10", 8).fallbacks == ()
    gpu = find_gpu("gb10")
    for card, change, why in (
        ("kimi-k2.5-int4", {"kv_lora_rank": 256}, "attends with triton_paged, not with torch_reference"),
        ("qwen3.5-397b-a17b-nvfp4", {"linear_value_head_dim": 96}, "powers of two from 16 to 256, not 96"),
    ):
        (found,) = plan(open_source(source_of(card, **change), gpu), gpu, 4, EngineConfig()).fallbacks
        assert "_block of " in found and found.endswith(why), found
    whys = planned("firebox-tiny", "gb10").fallbacks
    assert [why.split(" falls back to torch operators: ")[0] for why in whys] == [
        "embedding of 1 layers",
        "attention_block of 4 layers",
        "dense_block of 1 layers",
        "moe_block of 3 layers",
        "head of 1 layers",
    ]
