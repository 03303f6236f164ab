"""Kimi-K2, K2-Instruct-0905 and K2-Thinking: DeepSeek-V3's architecture under a name of its own.

Paper: Kimi K2, arXiv:2507.20534. Checkpoints: moonshotai/Kimi-K2-Instruct, moonshotai/Kimi-K2-Thinking. The
differences are all values of config.json: 64 heads and not 128, 384 experts and not 256 in one group and not
eight, one dense layer and not three, YaRN from 4,096 tokens with a ramp of no width (beta_fast 1), no MTP
layer.
"""

from __future__ import annotations

from typing import Any

from firebox.models import deepseek_v3
from firebox.models.deepseek_v3 import Config, Model

__all__ = ["TINY", "Config", "Model"]

TINY: dict[str, Any] = {
    **deepseek_v3.TINY,
    "model_type": "kimi_k2",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "n_routed_experts": 24,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "num_nextn_predict_layers": 0,
}
