"""Fills a model's slots from the shards, tensor by tensor; dummy.py does without them.

Names are checked against the shards' headers before anything is read. A tensor is read when its turn in its
shard comes, and its slot is filled as soon as all of the slot's tensors are there, so that the host holds one
tensor and the slots that are half complete.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from firebox.errors import CheckpointError, MissingTensor, UnknownTensor, UnsupportedFormat, WrongShape
from firebox.formats.base import OneOf, Slot, TensorSpec
from firebox.models.base import Model
from firebox.weights.checkpoint import Checkpoint


def load_weights(
    model: Model,
    checkpoint: Checkpoint,
    on_progress: Callable[[int, int], None] = lambda loaded, total: None,
    on_filled: Callable[[Slot], None] = lambda slot: None,
) -> None:
    """Fills every slot from the checkpoint and lets the model finish. `on_progress(loaded_bytes,
    total_bytes)`; `on_filled` sees each slot when its target is full, and may change it.

    Raises CorruptShard, UnknownTensor, MissingTensor, WrongShape, UnsupportedFormat (a wrong dtype), each
    naming the tensor, and what `on_filled` raises; nothing is served then.
    """
    if not checkpoint.shards:
        raise CheckpointError(
            f"{checkpoint.folder} has no safetensors files", hint="--load-format dummy fills random values"
        )
    present = checkpoint.names()
    slots = chosen_slots(model, present)
    owner = {name: slot for slot in slots for name in slot.tensors}
    _require_known(model, checkpoint, owner, present)
    _require_all(slots, checkpoint, present)

    with _large_blocks_go_back():
        _fill(checkpoint, owner, present, on_progress, on_filled)
    model.finish()


def _fill(
    checkpoint: Checkpoint,
    owner: dict[str, Slot],
    present: dict[str, str],
    on_progress: Callable[[int, int], None],
    on_filled: Callable[[Slot], None],
) -> None:
    waiting = Counter(id(owner[name]) for name in present if name in owner)
    held: dict[int, dict[str, torch.Tensor]] = {}
    shard = ""
    total_bytes, loaded_bytes, reported_bytes = checkpoint.total_bytes, 0, 0
    for name, tensor in checkpoint.tensors(owner):
        if present[name] != shard:  # a tensor that still waits would keep all of its shard in memory
            shard = present[name]
            held = {key: {n: part.clone() for n, part in parts.items()} for key, parts in held.items()}
        slot = owner[name]
        _check(name, tensor, slot.tensors[name])
        pieces = held.setdefault(id(slot), {})
        pieces[name] = tensor
        if len(pieces) == waiting[id(slot)]:
            slot.fill(held.pop(id(slot)))
            on_filled(slot)
        loaded_bytes += tensor.nbytes
        if loaded_bytes - reported_bytes > total_bytes // 100:
            reported_bytes = loaded_bytes
            on_progress(loaded_bytes, total_bytes)
    assert not held, list(held)


@contextlib.contextmanager
def _large_blocks_go_back() -> Iterator[None]:
    """glibc keeps freed blocks of up to 32 MiB on its heap, and holes of just a weight's size do not fit the
    next one: without this the copies made while dequantising pile up (measured: 14 of them for 24 weights).
    Elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    trim_threshold, mmap_threshold, mebibyte = -1, -3, 2**20
    mallopt(mmap_threshold, mebibyte)
    try:
        yield
    finally:  # the engine's own tensors are better off on the heap: the largest values glibc adapts to
        mallopt(mmap_threshold, 32 * mebibyte)
        mallopt(trim_threshold, 64 * mebibyte)


def chosen_slots(model: Model, present: dict[str, str] | None) -> list[Slot]:
    """The model's slots, each OneOf replaced by the layout that the checkpoint has (the first if none fits,
    or `present` is None)."""
    slots: list[Slot] = []
    for entry in model.slots():
        if isinstance(entry, OneOf):
            fits = (
                layout for layout in entry.layouts if present is not None and not _missing(layout, present)
            )
            slots += next(fits, entry.layouts[0])
        else:
            slots.append(entry)
    return slots


def _missing(slots: Iterable[Slot], present: dict[str, str]) -> list[str]:
    return [
        name
        for slot in slots
        for name, spec in slot.tensors.items()
        if name not in present and not spec.optional
    ]


def _require_known(
    model: Model, checkpoint: Checkpoint, owner: dict[str, Slot], present: dict[str, str]
) -> None:
    for name, shard in present.items():
        if name not in owner and model.unused(name) is None:
            raise UnknownTensor(f"{shard} holds {name}, which {checkpoint.model_type} does not have")


def _require_all(slots: list[Slot], checkpoint: Checkpoint, present: dict[str, str]) -> None:
    missing = _missing(slots, present)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTensor(f"{checkpoint.folder} lacks {missing[0]}{more}")


def _check(name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    shape = tuple(tensor.shape)
    if shape != spec.shape and not (spec.shape == () and tensor.numel() == 1):
        raise WrongShape(f"{name} is {list(shape)}; config.json implies {list(spec.shape)}")
    if tensor.dtype not in spec.dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
        raise UnsupportedFormat(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}; its format stores {wanted}"
        )
