"""The contract of a KV format: how a layer's cache stores a row of keys, of values, or of a latent layer's
compressed keys and values. A format is a file in this room; its name is the key.

DTYPE                    of the stored elements; a row takes DTYPE.itemsize bytes for each
SCALED                   is a row divided by its layer's scale before it is stored?
encode(rows, scale)      what the layer computed → what is stored
decode(stored, scale)    what is stored → what attention computes with, in float32

A stored element depends on its own value and its layer's scale alone, so that a row is the same to the bit
whether prefill, a chunk or a decode step wrote it, next to whatever other tokens.

A checkpoint may hold a scale for a layer's keys and one for its values, for caches in FP8:

    self_attn.k_scale          self_attn.v_scale           compressed-tensors (its `kv_cache_scheme`)
    self_attn.k_proj.k_scale   self_attn.v_proj.v_scale    modelopt (its `kv_cache_quant_algo`)
    self_attn.attn.k_scale     self_attn.attn.v_scale      saved out of a vLLM process
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from firebox.errors import UnsupportedFormat
from firebox.formats.base import Cut, TensorSpec

NO_SCALES = (1.0, 1.0)  # a layer's scales of keys and values where none are known


class KvFormat(Protocol):
    """One format's module (see above)."""

    @property
    def DTYPE(self) -> torch.dtype:
        """Of the stored elements."""
        ...

    @property
    def SCALED(self) -> bool:
        """Does `scale` mean anything?"""
        ...

    def encode(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """`rows`, any shape and float dtype → the same shape in DTYPE."""
        ...

    def decode(self, stored: torch.Tensor, scale: float) -> torch.Tensor:
        """`stored`, any shape in DTYPE → the same shape in float32."""
        ...


@dataclass(frozen=True)
class ScaleSlot:
    """One scale, of a layer's keys or of its values, under any of the names that checkpoints give it. Where
    the checkpoint has none, `target` [1] stays as it is. Every rank has it."""

    names: tuple[str, ...]
    target: torch.Tensor
    cut: Cut | None = None

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Each name, for one number."""
        return dict.fromkeys(self.names, TensorSpec((), optional=True))

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Takes the number. Raises UnsupportedFormat if it cannot be a scale, or two names disagree."""
        values = {name: float(tensor) for name, tensor in found.items()}
        for name, value in values.items():
            if not 0.0 < value < float("inf"):
                raise UnsupportedFormat(f"{name} is {value}; a scale of the KV cache is a positive number")
        if len(set(values.values())) > 1:
            raise UnsupportedFormat(f"two scales for one cache: {values}")
        self.target.fill_(next(iter(values.values())))


def scale_slots(attention: str, scales: torch.Tensor, *, values: bool = True) -> Iterator[ScaleSlot]:
    """The slots of a layer's `scales` [2] float32: of keys, then of values. `attention`: the module's path.
    `values` False: there is one scale only, for a row that is both (a latent layer's)."""
    for index, letter in enumerate("kv" if values else "k"):
        part = f"{letter}_scale"
        names = (f"{attention}.{part}", f"{attention}.attn.{part}", f"{attention}.{letter}_proj.{part}")
        yield ScaleSlot(names, scales[index : index + 1])


def require_fp8_scales(config: Mapping[str, Any]) -> None:
    """UnsupportedFormat if this config.json says that the checkpoint's scales are for a cache in something
    other than FP8 with one scale a tensor."""
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    scheme = quantization.get("kv_cache_scheme") or {}
    algorithm = quantization.get("quantization", quantization).get("kv_cache_quant_algo")
    differs = {
        key: scheme[key]
        for key, said in (("num_bits", 8), ("type", "float"), ("strategy", "tensor"), ("symmetric", True))
        if scheme.get(key) not in (None, said)
    }
    if differs or algorithm not in (None, "FP8"):
        said = differs or {"kv_cache_quant_algo": algorithm}
        raise UnsupportedFormat(
            f"the checkpoint's scales are for a KV cache with {said}, not for --kv-cache-dtype fp8",
            hint="--kv-cache-dtype bf16",
        )
