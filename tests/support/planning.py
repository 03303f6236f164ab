"""Cards opened for planning, once each, with changes to their config.json where a test asks for them."""

from __future__ import annotations

import functools
from typing import Any

from firebox.config import EngineConfig
from firebox.hardware.base import find_gpu
from firebox.planning.fit import Fit, Opened, Source, open_source, plan
from firebox.text.folder import bundled
from firebox.weights.checkpoint import open_checkpoint

FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def source_of(card: str, **changes: Any) -> Source:
    """A card without its weights; `changes` to its config.json, `dtype` to what it computes in."""
    checkpoint = open_checkpoint(bundled()[card])
    dtype = changes.pop("dtype", checkpoint.dtype)
    return Source(card, checkpoint.model_type, {**checkpoint.text_config, **changes}, dtype)


@functools.cache
def opened(card: str) -> Opened:
    """A card as it is; its operations are named alike on every GPU."""
    return open_source(source_of(card), find_gpu("gb10"))


def planned(card: str, gpu: str, tp: int = 1, **engine: Any) -> Fit:
    """Memory and roof, nothing compiled."""
    return plan(opened(card), find_gpu(gpu), tp, EngineConfig(**engine))
