"""Fills a model's slots: from the shards, tensor by tensor, or with random values of a like distribution
(`dummy`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from firebox.errors import CheckpointError, MissingTensor, UnknownTensor, WrongShape
from firebox.formats.base import Slot
from firebox.models.base import Model
from firebox.weights.checkpoint import Checkpoint


def load_weights(
    model: Model, checkpoint: Checkpoint, on_progress: Callable[[int, int], None] = lambda loaded, total: None
) -> None:
    """Copies every tensor of the checkpoint to its slot and lets the model finish. `on_progress(loaded_bytes,
    total_bytes)`.

    Raises CorruptShard, UnknownTensor, WrongShape, MissingTensor, each naming the tensor; nothing is served
    then.
    """
    if not checkpoint.shards:
        raise CheckpointError(
            f"{checkpoint.folder} has no safetensors files", hint="--load-format dummy fills random values"
        )
    slots = {slot.name: slot for slot in model.slots()}
    total_bytes, loaded_bytes, reported_bytes = checkpoint.total_bytes, 0, 0
    filled: set[str] = set()
    for name, tensor, shard in checkpoint.tensors():
        slot = slots.get(name)
        if slot is not None:
            _fill(slot, tensor)
            filled.add(name)
        elif model.unused(name) is None:
            raise UnknownTensor(f"{shard.name} holds {name}, which {checkpoint.model_type} does not have")
        loaded_bytes += tensor.nbytes
        if loaded_bytes - reported_bytes > total_bytes // 100:
            reported_bytes = loaded_bytes
            on_progress(loaded_bytes, total_bytes)
    _require_all(slots.values(), filled, checkpoint)
    model.finish()


def load_dummy(model: Model, seed: int = 0) -> None:
    """Random weights in the real shapes: norms near 1, biases near 0, matrices at 1/√in_features; not zeros,
    so that routing spreads."""
    generator = torch.Generator().manual_seed(seed)
    for slot in model.slots():
        values = torch.randn(slot.target.shape, generator=generator, dtype=torch.float32)
        if slot.target.dim() >= 2:
            values *= slot.target.shape[-1] ** -0.5
        else:
            values = values * 0.02 + (0.0 if slot.name.endswith("bias") else 1.0)
        slot.target.copy_(values)
    model.finish()


def _fill(slot: Slot, tensor: torch.Tensor) -> None:
    if tensor.shape != slot.target.shape:
        raise WrongShape(
            f"{slot.name} is {list(tensor.shape)}; config.json implies {list(slot.target.shape)}"
        )
    slot.target.copy_(tensor)


def _require_all(slots: Iterable[Slot], filled: set[str], checkpoint: Checkpoint) -> None:
    missing = [slot.name for slot in slots if slot.name not in filled]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTensor(f"{checkpoint.folder} lacks {missing[0]}{more}")
