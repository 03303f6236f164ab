"""Nothing is launched that is not in the plan, on the GPU itself: prefill, decode from graphs, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.gpu_runner import GpuRunner
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.start import start
from firebox.kernels import launch
from firebox.kernels.compile import CompileRequest
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of, rows
from firebox.models import glm4_moe

pytestmark = pytest.mark.gpu
SIZES = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_nextn_predict_layers": 0,
    "dtype": "bfloat16",
}


def test_every_launch_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(glm4_moe.TINY | SIZES))
    seen: list[CompileRequest] = []
    monkeypatch.setattr(launch, "OBSERVERS", [seen.append])
    engine = EngineConfig(device="cuda", max_batch_tokens=128, prefill_chunk_tokens=70, context_length=512)
    model = ModelConfig(model=str(tmp_path), load_format="dummy", dtype="bfloat16")
    scheduler, runner, ready = start(Config(model=model, engine=engine))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for i, count in enumerate((1, 3, 12, 17, 40, 120, 440)):
        scheduler.add(Request(i, [5 + j % 300 for j in range(count)], params))
    while (plan := scheduler.plan()) is not None:
        scheduler.apply(plan, runner.run(plan))
    assert isinstance(runner, GpuRunner)
    gpu = runner.gpu  # as it was probed then: how much memory is free is a part of it
    layers = layers_of(runner.model, Setting(gpu, 1, torch.bfloat16, ready.page_tokens))  # type: ignore[arg-type]
    planned = [row.request for _, row in rows(layers, gpu, 128) if row.request is not None]
    assert sorted({request.kernel.__name__ for request in seen if request not in planned}) == []
    assert {request.kernel.__name__ for request in seen} >= {"decode", "extend", "route", "linear_rows"}
