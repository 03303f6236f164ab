"""Small checkpoints written by transformers itself, and its own answers: an oracle that no one here wrote."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

STAND_INS = {"kimi_k2": "deepseek_v3"}  # a model type that transformers has under another name only


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, shard_bytes: int | None = None, seed: int = 0
) -> Path:
    """A random checkpoint of `config`, as `save_pretrained` writes it; in several shards with
    `shard_bytes`."""
    torch.manual_seed(seed)
    known = _known(config)
    model = _auto(known).from_config(known)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "norm" in name
            ):  # transformers starts norms at exactly 1 and biases at 0, which would hide them
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:  # large enough that the next token depends on the prompt
                parameter.normal_(std=2.0 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    if config["model_type"] in STAND_INS:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": config["model_type"]}))
    return folder


def load_reference(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as transformers runs it in `dtype`."""
    known = _known(json.loads((Path(folder) / "config.json").read_text()))
    model: PreTrainedModel = _auto(known).from_pretrained(folder, config=known, dtype=dtype)
    return model.eval()


def _known(config: dict[str, Any]) -> PreTrainedConfig:
    """The config as transformers knows it."""
    model_type = STAND_INS.get(config["model_type"], config["model_type"])
    known: PreTrainedConfig = AutoConfig.for_model(**copy.deepcopy(config) | {"model_type": model_type})
    return known


def _auto(config: PreTrainedConfig) -> Any:
    """The class that makes its models: one that sees too is no causal language model to transformers."""
    return (
        AutoModelForCausalLM
        if type(config) in AutoModelForCausalLM._model_mapping
        else AutoModelForImageTextToText
    )


@torch.inference_mode()
def reference_greedy(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy continuation by transformers, end-of-sequence ignored."""
    ids = torch.tensor([list(prompt_ids)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[int] = out[0, len(prompt_ids) :].tolist()
    return found


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """log_softmax of the logits at every position, [tokens, vocab] float32."""
    return model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
