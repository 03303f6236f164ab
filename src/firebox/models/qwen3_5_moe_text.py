"""Qwen3.5's language model alone (`Qwen3_5MoeForCausalLM`), as transformers writes it: qwen3_5_moe without
the vision tower, its tensors under `model.` and not `model.language_model.`, its config.json without a
text_config."""

from __future__ import annotations

from typing import Any

from firebox.models import qwen3_5_moe
from firebox.models.qwen3_5_moe import Config, Model

__all__ = ["TINY", "Config", "Model"]

TINY: dict[str, Any] = {**qwen3_5_moe.TINY["text_config"], "architectures": ["Qwen3_5MoeForCausalLM"]}
