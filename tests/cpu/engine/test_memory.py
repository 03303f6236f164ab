"""The memory budget: what a model needs beside weights and caches, by hand, and who took what, on a GPU that
is played by numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import firebox
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine import memory
from firebox.engine.budget import MemoryLine, Resolved
from firebox.engine.gpu_sampler import scratch_bytes
from firebox.engine.memory import Meter, graph_nodes_bytes, needs, token_bytes
from firebox.engine.outline import facts
from firebox.find import load
from firebox.hardware.base import find_gpu
from firebox.hardware.probe import GpuMemory, probe_cpu
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of, workspace_bytes
from firebox.text.folder import resolve_folder
from firebox.weights.checkpoint import open_checkpoint
from tests.support.engine import InProcessEngine
from tests.support.planning import opened
from tests.support.small_models import small_config

H200 = find_gpu("h200")
CARDS = sorted(path.parent.name for path in Path(firebox.__file__).parent.glob("assets/cards/*/config.json"))


def test_what_gpt_oss_needs_beside_its_weights() -> None:
    """Per token 4 · 2,880 numbers and the widest layer: qkv of 5,120, q and attention's output of 4,096 each,
    in bf16; what o writes is the residual stream, and logits are those of requests."""
    model = opened("gpt-oss-120b").model
    layers = layers_of(model, Setting(H200))
    assert token_bytes(model, layers) == 2 * (4 * 2880 + 5120 + 2 * 4096)
    found = needs(model, layers, H200, [10, 70, 20], tokens=2048, rows=64, graphs=True)
    logits = 201_088 * 4
    step = 2048 * token_bytes(model, layers) + 2 * 64 * logits
    drawing = scratch_bytes(201_088, H200, 64)
    assert 32 * 201_088 * 10 < drawing < 33 * 201_088 * 10, "of 32 rows that filter at once"
    assert found.workspace == workspace_bytes(layers, H200, 2048) + step + drawing
    assert found.graphs == graph_nodes_bytes(64, 36) + 64 * logits
    assert graph_nodes_bytes(64, 36) == 64 * 36 * 12 * 4096
    assert found.loader == 140, "the largest weight twice"
    assert needs(model, layers, H200, [], tokens=1, rows=1, graphs=False).graphs == 0


class Played:
    """A GPU's memory, as a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.held, self.peak = 1000, 0, 0
        monkeypatch.setattr(memory, "gpu_memory", self.now)
        monkeypatch.setattr(memory, "forget_gpu_peak", self.forget)

    def now(self) -> GpuMemory:
        return GpuMemory(self.free, self.held, self.peak, self.held)

    def forget(self) -> None:
        self.peak = self.held

    def take(self, size: int, passing: int = 0) -> None:
        self.held += size
        self.free -= size + passing
        self.peak = max(self.peak, self.held + passing)


def settings(*lines: tuple[str, int]) -> Resolved:
    budget = tuple(MemoryLine(what, size, "counted") for what, size in lines)
    return Resolved("bfloat16", "bf16", 1, 1, 1, 1, 16, 1, 0, 0, 1, (), budget)


def test_memory_is_ascribed_to_what_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Played(monkeypatch)
    gpu.take(5, passing=700)  # before: nobody's
    meter = Meter(H200)
    gpu.take(400, passing=30)
    meter.took("weights", peak="loader peak")
    gpu.take(200)
    meter.took("KV pages")
    gpu.take(7, passing=90)
    meter.took("graphs", peak="workspace")
    meter.moves(40, "weights", "workspace")
    meter.moves(50, "KV pages", "window pages")
    planned = settings(
        ("weights", 350), ("KV pages", 150), ("window pages", 50), ("graphs", 10), ("workspace", 100),
        ("loader peak", 60), ("reserve", 280), ("states", 3),
    )  # fmt: skip
    lines = meter.beside(planned, "1 captured so far")
    assert {line.what: line.measured_bytes for line in lines} == {
        "weights": 360, "KV pages": 150, "window pages": 50, "graphs": 7, "workspace": 130,
        "loader peak": 30, "reserve": None, "states": None, "all": 400 + 30 + 200 + 7 + 90,
    }  # fmt: skip
    everything = lines[-1]
    assert everything.what == "all"
    assert everything.budget_bytes == 350 + 150 + 50 + 10 + 100 + 3, "without loader and reserve"
    (graphs,) = [line for line in lines if line.what == "graphs"]
    assert graphs.why == "counted; 1 captured so far"


def test_a_cpu_is_measured_in_all(tmp_path: Path) -> None:
    """Loading fills the model's weights, which are resident then."""
    tiny = load("models", "glm4_moe").TINY | {"hidden_size": 512, "vocab_size": 20_000}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    ready = InProcessEngine(tmp_path, load_format="dummy", kv_pages=32, context_length=64).ready
    lines = {line.what: line for line in ready.memory}
    assert lines["weights"].budget_bytes == ready.weights_bytes > 60e6
    assert lines["KV pages"].budget_bytes == 33 * 16 * ready.kv_bytes_per_token
    assert lines["weights"].measured_bytes is None
    assert lines["all"].budget_bytes == lines["weights"].budget_bytes + lines["KV pages"].budget_bytes
    measured = lines["all"].measured_bytes
    assert measured is not None and 0.9 * ready.weights_bytes < measured < 4 * ready.weights_bytes
    assert lines["reserve"].why.startswith("1 - mem_fraction 0.85 of") and probe_cpu().kind == "cpu"


def test_graphs_of_recurrent_models_are_budgeted_too(tmp_path: Path) -> None:
    """Their decode steps are captured like others."""
    config = small_config("qwen3_5_moe")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(model=str(tmp_path), load_format="dummy", dtype="bfloat16")
    gpu, checkpoint = find_gpu("gb10"), open_checkpoint(tmp_path)
    with_graphs, without = (
        facts(checkpoint, Config(model=model, engine=EngineConfig(cuda_graph=graphs)), gpu)
        for graphs in ("decode", "off")
    )
    assert with_graphs.state_bytes > 0, "the case is about recurrent layers"
    assert with_graphs.graphs_bytes > without.graphs_bytes == 0


@pytest.mark.parametrize("card", CARDS)
def test_every_card_can_be_budgeted_for_a_gpu(card: str) -> None:
    """Whatever its layers are made of: each line of the budget is counted before anything is loaded."""
    folder = resolve_folder(card)
    model = ModelConfig(model=str(folder), load_format="dummy", dtype="bfloat16")
    found = facts(open_checkpoint(folder), Config(model=model, engine=EngineConfig()), H200)
    assert min(found.weights_bytes, found.workspace_bytes, found.graphs_bytes, found.loader_bytes) > 0
