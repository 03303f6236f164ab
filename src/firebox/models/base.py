"""The contract of a model. A model is a file in this room; its name is the checkpoint's `model_type`.

Config.from_hf(config)     what the code relies on in config.json; UnsupportedModel names what it lacks
Model(config, build)       the layers, with uninitialised weights
TINY                       a config.json of the same architecture, small enough for tests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from firebox.cache.specs import CacheSpec
from firebox.errors import UnsupportedModel
from firebox.layers.base import Slots
from firebox.layers.rope import Yarn, mscale
from firebox.step import Step


class Model(Protocol):
    """What the engine and the loader see of a model."""

    cache_specs: tuple[CacheSpec | None, ...]
    attention_backend: Any  # the module of attention/ that plans each step; None where no layer needs one

    def slots(self) -> Slots:
        """Every checkpoint tensor the model reads, and where it goes."""
        ...

    def unused(self, name: str) -> str | None:
        """Why a checkpoint tensor is not read, or None if it should be."""
        ...

    def finish(self) -> None:
        """All slots are filled: kernels may pack their weights."""
        ...

    def __call__(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        """`token_ids` [tokens] int64 → hidden states [tokens, hidden]; writes the step's cache."""
        ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, hidden] → [rows, vocab] float32."""
        ...


def require(config: Mapping[str, Any], key: str, *supported: Any) -> None:
    """UnsupportedModel unless `config[key]` is absent or one of `supported`."""
    if key in config and config[key] not in supported:
        raise UnsupportedModel(
            f"config.json has {key} = {config[key]!r}; this code supports {', '.join(map(repr, supported))}"
        )


def need(config: Mapping[str, Any], *keys: str, kind: Callable[[Any], Any] = int) -> Any:
    """The first of `keys` that the config has (the same value under its older and newer names), as `kind`;
    else UnsupportedModel."""
    for key in keys:
        if config.get(key) is not None:
            return kind(config[key])
    raise UnsupportedModel(f"config.json has no {keys[0]!r}")


def rotary(config: Mapping[str, Any], default_theta: float) -> tuple[float, Yarn | None]:
    """The rotary base and its stretching, from `rope_parameters` (transformers 5) or the older `rope_theta`
    and `rope_scaling`. Raises UnsupportedModel for a kind other than "default" and "yarn", and for a yarn
    that lacks its factor or its original context."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(found.get("rope_theta", config.get("rope_theta", default_theta)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise UnsupportedModel(
            f"config.json asks for rope type {kind!r}; this code supports 'default', 'yarn'"
        )
    factor = need(found, "factor", kind=float)
    attention_factor = found.get("attention_factor")
    if attention_factor is None:
        some, all_dim = found.get("mscale"), found.get("mscale_all_dim")
        attention_factor = (
            mscale(factor, some) / mscale(factor, all_dim) if some and all_dim else mscale(factor)
        )
    return theta, Yarn(
        factor=factor,
        original_positions=need(found, "original_max_position_embeddings"),
        attention_factor=float(attention_factor),
        beta_fast=float(found.get("beta_fast") or 32.0),
        beta_slow=float(found.get("beta_slow") or 1.0),
        truncate=bool(found.get("truncate", True)),
    )
