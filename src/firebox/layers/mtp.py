"""A multi-token-prediction (MTP) layer: one more block behind the last, which guesses the token after the
next one. Papers: DeepSeek-V3, arXiv:2412.19437, section 2.2; GLM-4.5, arXiv:2508.06471.

    x' = block(projection(cat(enorm(embed(next token)), hnorm(h))))       the embedding comes first
    logits of the token after that = head(norm(x'))

h is what the output matrix reads of the model: the hidden state after the final norm. Row t of a step has the
model's h at t, the token at t + 1 and position t. To draft further, norm(x') takes the place of h.
DeepSeek-V3, GLM-4.x and Qwen3.5 agree in all of this; names differ, and Qwen3.5's norms store weight − 1.

Embedding and output matrix are the model's own, as the papers define it. Checkpoints may repeat both inside
the layer (`copies`); those are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from firebox.attention.base import CacheSpec
from firebox.formats.base import OneOf, PlainSlot, Slots, WeightSlot
from firebox.layers.base import Block, Build
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.norm import RMSNorm
from firebox.step import Step

COPIED = "the MTP layer uses the model's own embedding and output matrix"
NOT_ANNOUNCED = "config.json announces no MTP layer"


@dataclass(frozen=True)
class MtpNames:
    """How a checkpoint names the parts of one layer, its block left out. `copies`: what the names of repeated
    embeddings and output matrices begin with."""

    projection: str
    enorm: str
    hnorm: str
    norm: str
    copies: tuple[str, ...] = ()

    @classmethod
    def appended(cls, layer: str) -> MtpNames:
        """The names that DeepSeek-V3 and GLM share. `layer`: the path of the layer behind the last."""
        return cls(
            projection=f"{layer}.eh_proj",
            enorm=f"{layer}.enorm",
            hnorm=f"{layer}.hnorm",
            norm=f"{layer}.shared_head.norm",
            copies=(f"{layer}.embed_tokens.", f"{layer}.shared_head.head."),
        )


class MtpLayer:
    """See above. `block`: the architecture's attention and MLP. `embedding` and `head`: the model's. `spec`:
    what the block's attention caches; its store stands in `step.caches` behind those of the model's layers.
    `choices` of `build` do not grow: the ledger is about what the engine runs."""

    def __init__(
        self,
        build: Build,
        names: MtpNames,
        block: Block,
        embedding: Embedding,
        head: Head,
        spec: CacheSpec,
        *,
        norm_plus_one: bool = False,
    ) -> None:
        build, model_norm = apart(build), head.norm
        hidden, eps = model_norm.weight.shape[0], model_norm.eps
        self.names, self.spec, self.embedding = names, spec, embedding
        self.attention, self.mlp = block
        self.enorm, self.hnorm, self.norm = (
            RMSNorm(build, name, hidden, eps, plus_one=norm_plus_one)
            for name in (names.enorm, names.hnorm, names.norm)
        )
        self.projection = build.empty(hidden, 2 * hidden)
        self._format = build.format_of(names.projection)
        tied = head.linear if head.linear.refusal is None else head.linear.weight
        self.head = Head(build, self.norm, head.name, head.vocab, tied)
        self._model_norm = model_norm

    def slots(self) -> Slots:
        """The norms', the projection's and the block's tensors. The projection may be unquantised whatever
        the config says: DeepSeek-V3 in FP8 and Qwen3.5 in NVFP4 store it so, and name no exception."""
        yield from self.enorm.slots()
        yield from self.hnorm.slots()
        path = self.names.projection
        as_stored = WeightSlot(path, self._format, self.projection)
        yield OneOf(((as_stored,), (PlainSlot(f"{path}.weight", self.projection),)))
        yield from self.attention.slots()
        yield from self.mlp.slots()
        yield from self.head.slots()

    def unused(self, name: str) -> str | None:
        """Why a checkpoint tensor is not read: it repeats one of the model's."""
        return COPIED if name.startswith(self.names.copies) else None

    def finish(self) -> None:
        """Lets the block and the head bind their kernels."""
        self.attention.finish()
        self.mlp.finish()
        self.head.finish()

    def of_model(self, x: torch.Tensor) -> torch.Tensor:
        """The model's hidden states [tokens, hidden] → the h of the first draft."""
        return self._model_norm(x)

    def of_draft(self, x: torch.Tensor) -> torch.Tensor:
        """This layer's hidden states [tokens, hidden] → the h of the next draft."""
        return self.norm(x)

    def __call__(self, next_ids: torch.Tensor, h: torch.Tensor, step: Step) -> torch.Tensor:
        """`next_ids` [tokens] int64: the token after each row's; `h` [tokens, hidden] → x' of the same shape;
        writes the step's cache."""
        both = torch.cat((self.enorm(self.embedding(next_ids)), self.hnorm(h)), dim=-1)
        x: torch.Tensor = self.mlp(self.attention(F.linear(both, self.projection), step))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, hidden] → [rows, vocab] float32 for the token after the next; the norm is in here."""
        return self.head(x)


def apart(build: Build) -> Build:
    """`build` with a list of choices of its own, and weights that stay as the checkpoint has them: no step
    reads them, so --requantize has nothing to gain here."""
    return dataclasses.replace(build, choices=[], requantisable=False)


def stored_layers(build: Build, announced: int, prefix: Callable[[int], str]) -> int:
    """How many of the `announced` MTP layers to build: all that stand before the last of which the checkpoint
    has a tensor, so that one with holes is missing something; all where its names are not known. `prefix(i)`:
    what the names of layer i begin with."""
    if build.stored is None:
        return announced
    there = [i for i in range(announced) if any(name.startswith(prefix(i)) for name in build.stored)]
    return max(there, default=-1) + 1
