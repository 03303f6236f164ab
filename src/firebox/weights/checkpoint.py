"""A model folder in Hugging Face's layout: config.json, generation_config.json, and safetensors shards with
or without an index.

Nothing in a folder is executed: no pickle, no remote code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from firebox.errors import CheckpointError, ConfigError, CorruptShard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Checkpoint:
    """A folder's parsed files. `shards`: the safetensors files in reading order; empty when there is only a
    config.json."""

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    shards: tuple[Path, ...]

    @property
    def model_type(self) -> str:
        """The architecture's name: the file in models/."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{self.folder / 'config.json'} has no model_type")
        return model_type

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's section of config.json: the whole of it, or of a model that sees too what its
        `text_config` says (null says nothing), and for the rest the whole. How the weights are quantised is
        the whole's to say, if it says so: a checkpoint that was quantised again may keep the old section."""
        nested = self.config.get("text_config") or {}
        said = {key: value for key, value in nested.items() if value is not None}
        if any(self.config.get(key) for key in QUANTIZATION):
            said = {key: value for key, value in said.items() if key not in QUANTIZATION}
        return self.config | said

    @property
    def dtype(self) -> str:
        """The compute dtype that config.json names ("torch_dtype" before transformers 5); float32 if it names
        none."""
        config = self.text_config
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids: generation_config.json's, else config.json's; possibly none."""
        for source in (self.generation_config, self.text_config):
            found = source.get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
        return frozenset()

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.stat().st_size for shard in self.shards)

    def names(self) -> dict[str, str]:
        """Every tensor's name → the file name of its shard, from the shards' headers, which are read once.
        Raises CorruptShard, naming the file."""
        return dict(self._names)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for shard in self.shards:
            with _opened(shard) as file:
                found |= dict.fromkeys(file.keys(), shard.name)
        return found

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted tensors, one at a time, as they are stored, shard by shard. Raises CorruptShard, naming
        the file."""
        for shard in self.shards:
            with _opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name in wanted:
                        yield name, file.get_tensor(name)


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptShard(f"{shard}: {error}", hint="download the file again") from error


def first_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same with a configuration of the first `layers` layers and no drafting layer: for made-up weights.
    Raises ConfigError for more than there are, or none."""
    config = copy.deepcopy(checkpoint.config)
    nested = config.get("text_config")
    inner = nested if isinstance(nested, dict) and "num_hidden_layers" in nested else config
    there = inner.get("num_hidden_layers")
    if not isinstance(there, int) or not 1 <= layers <= there:
        raise ConfigError(f"--layers {layers}", hint=f"the model has {there} layers")
    inner["num_hidden_layers"] = layers
    if isinstance(inner.get("layer_types"), list):
        inner["layer_types"] = inner["layer_types"][:layers]
    for drafting in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        inner.pop(drafting, None)
    return replace(checkpoint, config=config)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a folder's JSON files and finds its shards. Raises CheckpointError or CorruptShard."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(
            f"{folder} has no config.json", hint="MODEL is a folder in Hugging Face's layout"
        )
    if (quantization := _read_json(folder / "hf_quant_config.json")) and not config.get(
        "quantization_config"
    ):
        config["quantization_config"] = quantization  # modelopt's older place
    generation_config = _read_json(folder / "generation_config.json") or {}
    return Checkpoint(folder, config, generation_config, _shards(folder))


def _shards(folder: Path) -> tuple[Path, ...]:
    index = _read_json(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to file names")
        shards = tuple(folder / name for name in sorted(set(weight_map.values())))
    else:
        shards = tuple(path for path in (folder / SINGLE,) if path.exists())
    for shard in shards:
        if not shard.exists():
            raise CorruptShard(f"{shard} is missing; {INDEX} names it", hint="download the file again")
    return shards


def _read_json(path: Path) -> dict[str, Any] | None:
    """The parsed file, or None if there is none. Raises CheckpointError if it is not a JSON object."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found
