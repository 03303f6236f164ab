"""Packed training windows: all documents in a new order each epoch, joined and cut into equal windows.

    one row    | doc 7 (its end) | doc 2 | doc 9 (its start) |      window + 2 tokens
    segments   | 0 0 0 0 0 0 0 0 | 1 1 1 | 2 2 2 2 2 2 2 2 2 |      one number a document

Attention stays inside a document, and so do the targets: a row's last two tokens serve only as targets x[t+1]
and x[t+2]. Every epoch holds all source files and a fresh `chat_share` of conversations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tools.train_tiny.spec import Recipe

IGNORED = -100
Arrays = dict[str, np.ndarray]  # the content of tokens.npz


@dataclass(frozen=True)
class Batch:
    """ids, next_ids, targets, draft_targets: [rows, window]; mask: [rows, 1, window, window] bool.

    `inside` [rows, window] bool: x[t], x[t+1] and x[t+2] are of one document. `repeats` [2, few rows, window]
    belongs to the last rows: times and offsets of repeats.py.
    """

    ids: Tensor
    next_ids: Tensor
    targets: Tensor
    draft_targets: Tensor
    inside: Tensor
    mask: Tensor
    repeats: Tensor | None = None


def documents(arrays: Arrays, name: str) -> list[np.ndarray]:
    """The documents of tokens.npz called `name`, each an array of ids."""
    return np.split(arrays[f"{name}_ids"], np.cumsum(arrays[f"{name}_lengths"])[:-1])


def make_batch(rows: Tensor, segments: Tensor) -> Batch:
    """rows, segments: [rows, window + 2] integers, already on the device."""
    window = rows.shape[1] - 2
    ids, next_ids, after = rows[:, :window], rows[:, 1:-1], rows[:, 2:]
    same_1, same_2 = segments[:, :window] == segments[:, 1:-1], segments[:, :window] == segments[:, 2:]
    same = segments[:, :window, None] == segments[:, None, :window]
    mask = (same & torch.ones_like(same[0]).tril())[:, None]
    targets, draft_targets = next_ids.where(same_1, IGNORED), after.where(same_2, IGNORED)
    return Batch(ids, next_ids, targets, draft_targets, same_2, mask)


def batches(arrays: Arrays, recipe: Recipe, window: int, device: str, seed: int) -> Iterator[Batch]:
    """Training batches without end, of `recipe.batch_tokens` tokens each."""
    random = np.random.default_rng(seed)
    files, chats = documents(arrays, "file"), documents(arrays, "chat")
    rows_per_batch = recipe.batch_tokens // window
    while True:
        ids, segments = _epoch(files, chats, recipe.chat_share, random)
        start = int(random.integers(window))
        count = (len(ids) - start) // (window + 2)
        shape = (count, window + 2)
        rows = torch.from_numpy(ids[start : start + count * (window + 2)].reshape(shape)).to(device)
        numbers = torch.from_numpy(segments[start : start + count * (window + 2)].reshape(shape)).to(device)
        order = torch.from_numpy(random.permutation(count)).to(device)
        for chosen in order.split(rows_per_batch):
            if len(chosen) == rows_per_batch:
                yield make_batch(rows[chosen].long(), numbers[chosen])


def _epoch(
    files: list[np.ndarray], chats: list[np.ndarray], chat_share: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments) of one pass."""
    quota = chat_share / (1 - chat_share) * sum(map(len, files))
    picked = [chats[i] for i in random.permutation(len(chats))]
    ends = np.cumsum([len(chat) for chat in picked])
    chosen = files + picked[: int(np.searchsorted(ends, quota))]
    chosen = [chosen[i] for i in random.permutation(len(chosen))]
    segments = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(document) for document in chosen])
    return np.concatenate(chosen).astype(np.int32), segments
