"""The ledger: one row per distinct choice, fallbacks marked, and --strict that refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine import outline as engine_outline
from firebox.engine import start as engine_start
from firebox.engine.ledger import ledger_rows, refuse_fallbacks, refuse_untuned
from firebox.engine.messages import LedgerRow
from firebox.errors import ConfigError
from firebox.find import load
from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned
from firebox.kernels.plan import Setting
from firebox.kernels.select import Choice
from firebox.layers import dense_gpu, expert_paths
from tests.support.dry import model_of
from tests.support.engine import InProcessEngine

FAST = ModuleType("firebox.kernels.fast")
WON = Choice("head", FAST, "accepts the problem", {"slow": "is slow", "torch": "slower"})
ASKED = Choice("moe_block", None, "asked for", {"fast": "torch was asked for"})
FELL = Choice("dense_block", None, "no kernel accepts", {"fast": "wants more memory", "slow": "is slow"})


def test_a_row_says_what_runs_and_why() -> None:
    assert ledger_rows([WON], 2048, "float32") == [
        LedgerRow(
            op="head",
            tokens=(1, 2048),
            kernel="fast",
            format="float32",
            why="accepts the problem",
            losers={"slow": "is slow", "torch": "slower"},
            fallback=False,
        )
    ]


def test_only_what_nobody_asked_for_is_a_fallback() -> None:
    rows = ledger_rows([WON, ASKED, FELL], 64, "bfloat16")
    assert [(row.op, row.kernel, row.fallback) for row in rows] == [
        ("head", "fast", False),
        ("moe_block", "torch", False),
        ("dense_block", "torch", True),
    ]


def test_layers_that_choose_alike_share_a_row_in_the_order_the_model_met_them() -> None:
    mixed = Choice("dense_block", FAST, "accepts the problem", {})
    rows = ledger_rows([FELL, WON, FELL, mixed, WON, FELL], 64, "float32")
    assert [(row.op, row.kernel) for row in rows] == [
        ("dense_block", "torch"),
        ("head", "fast"),
        ("dense_block", "fast"),
    ]


def test_strict_refuses_a_fallback_and_says_what_stood_in_the_way() -> None:
    refuse_fallbacks(ledger_rows([WON, ASKED], 64, "float32"))
    refuse_fallbacks([])
    with pytest.raises(ConfigError) as caught:
        refuse_fallbacks(ledger_rows([WON, FELL], 64, "float32"))
    message = str(caught.value)
    assert message == "--strict: dense_block falls back to torch (fast wants more memory; slow is slow)"
    assert "--explain" in str(caught.value.hint)


# ---- through the engine's start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(load("models", "glm4_moe").TINY))
    return tmp_path


def start(folder: Path, **settings: object) -> list[LedgerRow]:
    return InProcessEngine(
        folder, load_format="dummy", kv_pages=32, context_length=64, **settings
    ).ready.ledger


def test_the_engine_reports_one_row_per_operation(folder: Path) -> None:
    rows = start(folder, max_batch_tokens=128, strict=True)
    assert sorted((row.op, row.kernel) for row in rows) == [
        ("attention_block", "cpu_attention_block"),
        ("dense_block", "cpu_dense_block"),
        ("head", "cpu_head"),
        ("moe_block", "cpu_moe_block"),
    ]
    assert {(row.tokens, row.format, row.fallback) for row in rows} == {((1, 128), "float32", False)}
    assert all(row.losers["torch"] for row in rows)


def test_strict_refuses_bfloat16_on_a_cpu_and_lax_marks_it(folder: Path) -> None:
    rows = start(folder, dtype="bfloat16")
    assert all(row.fallback and row.kernel == "torch" and row.format == "bfloat16" for row in rows)
    assert all("bfloat16" in " ".join(row.losers.values()) for row in rows)
    with pytest.raises(ConfigError, match=r"--strict: (\w+) falls back to torch \(cpu_\1 .*bfloat16"):
        start(folder, dtype="bfloat16", strict=True)


def test_strict_lets_a_wish_pass(folder: Path) -> None:
    rows = start(folder, attention_backend="torch_reference", moe_backend="torch", strict=True)
    wished = {row.op: row for row in rows if row.kernel == "torch"}
    assert set(wished) == {"attention_block", "moe_block"}
    assert {row.why for row in wished.values()} == {"asked for"}
    assert "torch was asked for" in wished["moe_block"].losers["cpu_moe_block"]


def test_group_limited_routing_is_a_fallback_of_its_operation_alone(folder: Path) -> None:
    tiny = load("models", "glm4_moe").TINY | {"n_group": 4, "topk_group": 2}
    (folder / "config.json").write_text(json.dumps(tiny))
    assert [row.op for row in start(folder) if row.fallback] == ["moe_block"]
    with pytest.raises(ConfigError, match=r"--strict: moe_block falls back.*4"):
        start(folder, strict=True)


@pytest.mark.parametrize(
    ("setting", "wanted", "words"),
    [
        ("moe_backend", "nonsense", ["nonsense", "moe_block"]),
        ("moe_backend", "cpu_head", ["cpu_head", "moe_block"]),
        ("attention_backend", "nonsense", ["nonsense", "attention"]),
    ],
)
def test_a_wish_that_cannot_be_granted(folder: Path, setting: str, wanted: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        start(folder, **{setting: wanted})
    assert all(word in str(caught.value) for word in words) and caught.value.hint


# ---- --strict and tiles


SMALL = {"hidden_size": 256, "head_dim": 64, "dtype": "bfloat16", "moe_intermediate_size": 128}
FEW = {"rows": 16, "tokens": 8, "depth": 64}
MANY = {"rows": 64, "tokens": 16, "depth": 64}
EXPERTS = {
    1: {"path": "few", "gate_up": FEW, "down": FEW},
    64: {"path": "sorted", "gate_up": MANY, "down": MANY},
}
LINEAR = {1: {"path": "few", "config": {}}, 64: {"path": "cublas"}}


def test_strict_refuses_default_tiles_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing entries by name; with entries for all, measured or not, it starts."""
    gb10 = find_gpu("gb10")
    model = model_of("qwen3_moe", gb10, **SMALL)
    files: dict[str, dict[str, object]] = {"experts": {}, "linear": {}, "attention": {}}
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": files[name])

    setting = Setting(gb10)
    layers = [*(layer for block in model.blocks for layer in block), model.head]
    operations = [operation for layer in layers for operation in layer.operations(setting)]
    linears = {o.name: dense_gpu.key(o.problem) for o in operations if o.source is dense_gpu}
    (routed,) = {_tuned.key(o.problem) for o in operations if o.name == "experts"}

    def refused(sentence: str) -> None:
        forget()
        with pytest.raises(ConfigError) as caught:
            refuse_untuned(model, setting, 100)
        assert str(caught.value) == f"--strict: {sentence}"
        assert "fit --strict lists all" in str(caught.value.hint)

    missing = "{} runs default tiles: tuned/nvidia_gb10/{}.json has no entry for {!r}"
    refused(missing.format("qkv", "linear", linears["qkv"]) + f", and {len(linears)} more")
    files["linear"] = dict.fromkeys(linears.values(), LINEAR)
    refused(missing.format("experts", "experts", routed))
    files["experts"] = {routed: EXPERTS}
    forget()
    refuse_untuned(model, setting, 100)
    forget()


def forget() -> None:
    """Paths that were chosen from other files."""
    for cached in (expert_paths.settled_path, dense_gpu._path_of):
        cached.cache_clear()


def test_the_engine_asks_before_it_loads(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    gb10 = find_gpu("gb10")
    model = model_of("qwen3_moe", gb10, **SMALL)
    monkeypatch.setattr(engine_start, "device_of", lambda wanted, dtype: (gb10, "asked for"))
    monkeypatch.setattr(engine_outline, "make_model", lambda checkpoint, build: model)
    engine = EngineConfig(kv_pages=32, context_length=64, strict=True)
    config = Config(
        model=ModelConfig(model=str(folder), dtype="bfloat16", load_format="dummy"), engine=engine
    )
    with pytest.raises(
        ConfigError, match=r"--strict: qkv runs default tiles: tuned/nvidia_gb10/linear\.json"
    ):
        engine_start.start(config)
