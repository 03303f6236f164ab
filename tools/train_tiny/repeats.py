"""Against endless repetition: rows in which a passage repeats, with a loss that makes repeats less likely.

Small models that decode greedily fall into loops, because every repeat makes the next one more likely. As in
DITTO (https://arxiv.org/abs/2206.02369) some training rows are made of one passage over and over. There the
target is not the next token but the model's own distribution from the passage's first time, in which the
repeated token's chance is halved for each repeat so far, at most five times:

    q = p_first;  q[x] *= 2^-n;  q /= sum(q)        loss = cross entropy(q, p)

Inside a word, where nothing else fits, q stays near 1; where a line could go on differently, the model learns
to. (The published loss, -log(1 - |p - 0.5 p'|), does not say what should come instead; here it taught the
model to answer with ids that never occur in text.)

    piece   | real text | passage | passage | passage | ...   each piece is a document of its own (segment)
    times   | 0 ... 0     0 ... 0   1 ... 1   2 ... 2         n, where the target is a repeat
    offsets | 0 ... 0     0 ... 0   8 ... 8   16 .. 16        how far back the first time is
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tools.train_tiny.batches import IGNORED, Batch, make_batch
from tools.train_tiny.spec import END_ID

PIECE_TOKENS = 512
MOST_HALVINGS = 5


class Repeats:
    """Makes repeat rows from the training files; `line_starts` [vocab]: ids that begin with a line end."""

    def __init__(self, file_ids: np.ndarray, line_starts: np.ndarray, seed: int):
        self.ids = file_ids.astype(np.int64)
        self.starts = np.flatnonzero(line_starts[file_ids])
        self.random = np.random.default_rng(seed)

    def put_into(self, batch: Batch, rows: int) -> Batch:
        """`batch` with its last `rows` rows replaced, and `repeats` set for them."""
        window = batch.ids.shape[1]
        count = -(-(window + 2) // PIECE_TOKENS)
        made = [[self._piece() for _ in range(count)] for _ in range(rows)]
        ids, times, offsets = np.stack(
            [np.concatenate(row, axis=1) for row in made], axis=1
        )  # [rows, ..] each
        ids, repeats = ids[:, : window + 2], np.stack([times, offsets])[:, :, 1 : window + 1]
        segments = np.repeat(np.arange(count), PIECE_TOKENS)[None, : window + 2].repeat(rows, axis=0)
        device = batch.ids.device
        new = make_batch(torch.from_numpy(ids).to(device), torch.from_numpy(segments).to(device))
        new = replace(new, targets=torch.full_like(new.targets, IGNORED))
        new = replace(new, draft_targets=torch.full_like(new.draft_targets, IGNORED))
        joined = {
            name: torch.cat([getattr(batch, name)[:-rows], getattr(new, name)])
            for name in ("ids", "next_ids", "targets", "draft_targets", "inside", "mask")
        }
        return Batch(**joined, repeats=torch.from_numpy(repeats).to(device))

    def _piece(self) -> np.ndarray:
        """[3, PIECE_TOKENS]: ids, times, offsets."""
        start, end = self._passage()
        period = end - start
        lead = min(
            int(self.random.integers(1, 192)), start
        )  # at least the token that predicts the passage's first
        again = np.tile(self.ids[start:end], -(-PIECE_TOKENS // period))
        ids = np.concatenate([self.ids[start - lead : start], again])[:PIECE_TOKENS]
        times = np.maximum(0, np.arange(PIECE_TOKENS) - lead) // period
        return np.stack([ids, times, times * period])

    def _passage(self) -> tuple[int, int]:
        """(start, end) in the training text: one to four whole lines, or a few tokens from anywhere."""
        while True:
            if self.random.random() < 0.6:
                first = int(self.random.integers(len(self.starts) - 4))
                start, end = int(self.starts[first]), int(self.starts[first + self.random.integers(1, 5)])
            else:
                start = int(self.random.integers(len(self.ids) - 24))
                end = start + int(self.random.integers(2, 24))
            if 2 <= end - start <= 128 and END_ID not in self.ids[start:end]:
                return start, end


def repeat_loss(logits: Tensor, next_ids: Tensor, repeats: Tensor) -> Tensor:
    """The mean loss over the repeats: logits [rows, window, vocab] fp32, next_ids [rows, window]."""
    times, offsets = repeats
    first = torch.arange(logits.shape[1], device=logits.device) - offsets  # [rows, window]
    aim = logits.detach().softmax(-1).gather(1, first[:, :, None].expand_as(logits))
    halvings = times.clamp(max=MOST_HALVINGS)[:, :, None].float()
    aim = aim * torch.zeros_like(aim).scatter_(-1, next_ids[:, :, None], -halvings).exp2_()
    aim = aim / aim.sum(-1, keepdim=True)
    losses = -(aim * logits.log_softmax(-1)).sum(-1)
    return losses[times > 0].mean()
