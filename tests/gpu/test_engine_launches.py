"""Nothing is launched that is not in the plan, on the GPU itself: prefill, decode from graphs, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.gpu_runner import GpuRunner
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.start import start
from firebox.find import load
from firebox.kernels import launch
from firebox.kernels.compile import CompileRequest
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of, rows

pytestmark = pytest.mark.gpu
COMMON = {"hidden_size": 256, "moe_intermediate_size": 128, "dtype": "bfloat16"}
SIZES = {
    "glm4_moe": {"head_dim": 64, "intermediate_size": 256, "num_nextn_predict_layers": 0},
    "deepseek_v3": {
        "intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "num_nextn_predict_layers": 0,
    },
    "qwen3_5_moe_text": {
        "head_dim": 64,
        "shared_expert_intermediate_size": 128,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
OWN = {
    "glm4_moe": {"rotate_and_write"},
    "deepseek_v3": {"write_latent"},
    "qwen3_5_moe_text": {"decode_heads", "convolve_chunks", "solve_chunks", "walk_chunks", "norm_rows"},
}


@pytest.mark.parametrize("model_type", list(SIZES))
def test_every_launch_is_in_the_plan(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("models", model_type).TINY | COMMON | SIZES[model_type]
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen: list[CompileRequest] = []
    monkeypatch.setattr(launch, "OBSERVERS", [seen.append])
    engine = EngineConfig(device="cuda", max_batch_tokens=128, prefill_chunk_tokens=70, context_length=512)
    model = ModelConfig(model=str(tmp_path), load_format="dummy", dtype="bfloat16")
    scheduler, runner, ready = start(Config(model=model, engine=engine))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    others = (
        {},
        {"logprobs": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"logprobs": 4, "prompt_logprobs": 2},
        {"temperature": 0.8, "repetition_penalty": 1.2, "seed": 4},
    )
    for i, count in enumerate((1, 3, 12, 17, 40, 120, 440)):
        its_own = replace(params, **others[i % len(others)])
        scheduler.add(Request(i, [5 + j % 300 for j in range(count)], its_own))
    while (plan := scheduler.plan()) is not None:
        scheduler.apply(plan, runner.run(plan))
    assert isinstance(runner, GpuRunner)
    gpu = runner.gpu  # as it was probed then: how much memory is free is a part of it
    layers = layers_of(runner.model, Setting(gpu, 1, torch.bfloat16, ready.page_tokens))  # type: ignore[arg-type]
    planned = [row.request for _, row in rows(layers, gpu, 128) if row.request is not None]
    assert sorted({request.kernel.__name__ for request in seen if request not in planned}) == []
    kernels = {request.kernel.__name__ for request in seen}
    assert kernels >= OWN[model_type] | {"decode", "extend", "route", "linear_rows"}
