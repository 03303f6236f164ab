"""The contract of a model. A model is a file in this room; its name is the checkpoint's `model_type`.

Config.from_hf(config)     what the code relies on in config.json; UnsupportedModel names what it lacks
Model(config, build)       the layers, with uninitialised weights
TINY                       a config.json of the same architecture, small enough for tests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from firebox.cache.specs import CacheSpec
from firebox.errors import UnsupportedModel
from firebox.layers.base import OneOf, Slot, Slots
from firebox.layers.decoder import Decoder
from firebox.layers.moe import MoeBlock
from firebox.layers.mtp import MtpLayer
from firebox.layers.rope import Yarn, mscale
from firebox.step import Step


class Model(Protocol):
    """What the engine and the loader see of a model."""

    cache_specs: tuple[CacheSpec | None, ...]
    attention_backend: Any  # the module of attention/ that plans each step; None where no layer needs one
    mtp: tuple[MtpLayer, ...]  # what the checkpoint holds of it; no step runs it

    @property
    def not_capturable(self) -> str:
        """Why no CUDA graph can hold a step of it, or ""."""
        ...

    @property
    def mtp_cache_specs(self) -> tuple[CacheSpec, ...]:
        """One per MTP layer."""
        ...

    @property
    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """Each layer's scales of keys and values, for a cache that has them."""
        ...

    @property
    def mtp_kv_scales(self) -> tuple[tuple[float, float], ...]:
        """The same of each MTP layer."""
        ...

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
        """`token_ids` [tokens] int64 → hidden states [rows, hidden] of those that the step wants; writes its
        cache."""
        ...

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [rows, hidden] → [rows, vocab] float32, in `out` where that is given."""
        ...


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has. `active`: those that one token's step multiplies with, so without the
    experts that were not chosen and without the embedding, of which it reads one row. `embedding`: 0 if the
    output matrix is the same one. MTP layers and what sees images are in none of them."""

    total: int
    active: int
    embedding: int


def parameters(model: Decoder) -> Parameters:
    """Counts a model's slots, which it has until `finish`; on the meta device that costs nothing."""
    total = _numbers(model.slots()) - sum(_numbers(layer.slots()) for layer in model.mtp)
    idle = 0
    for _, mlp in model.blocks:
        if isinstance(mlp, MoeBlock):
            p = mlp.problem
            biases = 2 * p.inter + p.hidden if p.biases else 0
            idle += (p.experts - p.top_k) * (3 * p.hidden * p.inter + biases)
    embedding = 0 if model.head.tied else model.embedding.weight.numel()
    return Parameters(total, total - idle - embedding, embedding)


def decode_bytes(model: Decoder, stored_bytes: Callable[[Slot], int]) -> int:
    """Bytes of weights that one token's step reads: of the routed experts those that were chosen, of the
    embedding nothing unless it is the output matrix too, of MTP layers nothing. `stored_bytes`: of one slot's
    tensors. Like `parameters`, before `finish`."""

    def total(slots: Slots) -> int:
        return _total(slots, stored_bytes)

    found = total(model.slots()) - sum(total(layer.slots()) for layer in model.mtp)
    found -= 0 if model.head.tied else total(model.embedding.slots())
    for _, mlp in model.blocks:
        if isinstance(mlp, MoeBlock):
            experts, chosen = mlp.problem.experts, mlp.problem.top_k
            found -= total(mlp.expert_slots()) * (experts - chosen) // experts
    return found


def _numbers(slots: Slots) -> int:
    return _total(slots, lambda slot: slot.target.numel())


def _total(slots: Slots, count: Callable[[Slot], int]) -> int:
    layouts = (entry.layouts[0] if isinstance(entry, OneOf) else (entry,) for entry in slots)
    return sum(count(slot) for layout in layouts for slot in layout)


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


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5), or the older `rope_scaling`; empty if the config has neither.
    Raises UnsupportedModel for parameters that differ from layer to layer."""
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for kind, nested in found.items():
        if isinstance(nested, Mapping):
            raise UnsupportedModel(
                f"config.json has rotary parameters of its own for {kind!r} layers; "
                "this code supports the same ones in every layer"
            )
    return found


def rotary(config: Mapping[str, Any], default_theta: float) -> tuple[float, Yarn | None]:
    """The rotary base and its stretching, from `rope_parameters(config)` and the older `rope_theta`. Raises
    UnsupportedModel for a kind other than "default" and "yarn"."""
    found = rope_parameters(config)
    theta = found.get("rope_theta") or config.get("rope_theta") or default_theta
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise UnsupportedModel(
            f"config.json asks for rope type {kind!r}; this code supports 'default', 'yarn'"
        )
    factor = need(found, "factor", kind=float)
    attention_factor = found.get("attention_factor")
    if attention_factor is None:
        one, all_dim = (float(found.get(key) or 0.0) for key in ("mscale", "mscale_all_dim"))
        both = one and all_dim
        attention_factor = mscale(factor, one) / mscale(factor, all_dim) if both else mscale(factor)
    return float(theta), Yarn(
        factor=factor,
        original_positions=need(found, "original_max_position_embeddings"),
        attention_factor=float(attention_factor),
        beta_fast=float(found.get("beta_fast") or 32.0),
        beta_slow=float(found.get("beta_slow") or 1.0),
        truncate=bool(found.get("truncate", True)),
    )
