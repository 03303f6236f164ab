"""A model on the meta device, taken apart: which weights it has, how many of each kind, and how many bytes a
share of one takes as it is stored.

A model has tens of thousands of slots and a few dozen kinds of them, so slots are counted once and all
arithmetic is done on one of each kind.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from firebox.config import kv_format_of
from firebox.errors import UnsupportedFormat, UnsupportedModel
from firebox.find import load, names
from firebox.formats.base import OneOf, Slot, Slots, TensorSpec, WeightSlot
from firebox.formats.kv.base import KvFormat, require_fp8_scales
from firebox.formats.select import formats_of
from firebox.hardware.base import Gpu
from firebox.kernels.plan import Setting
from firebox.layers import moe_gpu
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.linear import INNER_UNIT, grown
from firebox.layers.moe import MoeBlock
from firebox.weights.cuts import pieces_of, refusal

DENSE_MLP = "dense_mlp"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What planning needs of a model folder. `config`: the language model's section of config.json; `dtype`:
    what it computes in; `stored`: the names of its tensors, None where there is only a config.json;
    `requantise`: as --requantize fp8 leaves it."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    dtype: str
    stored: frozenset[str] | None = None
    requantise: bool = False


@dataclass(frozen=True)
class Part:
    """Weights of one purpose over all layers. `slots`: one of each kind, and how many there are; `read`: a
    decode step reads them; `block`, `layers`: of routed experts, one of the layers that are alike, and how
    many those are; `shared_of`: of their routers and shared experts, one of the layers."""

    name: str
    slots: tuple[tuple[Slot, int], ...]
    read: bool = True
    block: MoeBlock | None = None
    layers: int = 0
    shared_of: MoeBlock | None = None

    def shard_bytes(self, tp: int, ep: int = 1) -> int:
        """On one of the GPUs of kernels.plan.Setting, as the checkpoint stores it."""
        if self.block is None:
            return sum(count * shard_bytes(slot, tp) for slot, count in self.slots)
        return sum(count * shard_bytes(slot, max(1, tp // ep)) for slot, count in self.slots) // ep

    def kept_bytes(self, setting: Setting) -> int:
        """The same as the kernels' layers keep it: with what widths that no tile divides are grown by."""
        if self.block is not None:
            kept = moe_gpu.routed_bytes(self.block, setting)
            return self.shard_bytes(setting.tp, setting.ep) if kept is None else kept * self.layers
        wide = self._grown(setting)
        return sum(count * shard_bytes(slot, setting.tp, wide) for slot, count in self.slots)

    def _grown(self, setting: Setting) -> Callable[[int], int]:
        """The width of an MLP's share → the one that is kept."""
        if self.shared_of is not None:
            kept = moe_gpu.shared_width(self.shared_of, setting)
            return lambda width: kept
        return lambda width: grown(width, INNER_UNIT) if self.name == DENSE_MLP else width


@dataclass(frozen=True)
class Opened:
    """A model without memory: what it was built with, whose choices name its operations, and its weights."""

    source: Source
    model: Decoder
    build: Build
    parts: tuple[Part, ...]


def kv_dtype(source: Source, asked: str) -> torch.dtype:
    """Of a stored number of keys and values under `--kv-cache-dtype`. Raises ConfigError,
    UnsupportedFormat."""
    kv = cast(KvFormat, load("formats.kv", kv_format_of(asked, source.dtype)))
    if kv.SCALED:
        require_fp8_scales(source.config)
    return kv.DTYPE


def open_source(source: Source, gpu: Gpu) -> Opened:
    """Builds the model on the meta device. The few bytes of an FP8 cache's scales are not among its parts.
    Raises UnsupportedModel, UnsupportedFormat; ConfigError for a GPU that cannot `requantise`."""
    if source.model_type not in names("models"):
        raise UnsupportedModel(
            f"{source.name} is a {source.model_type!r}", hint=f"supported: {', '.join(names('models'))}"
        )
    if source.dtype not in DTYPES:
        raise UnsupportedFormat(
            f"{source.name} computes in {source.dtype}", hint=f"supported: {', '.join(DTYPES)}"
        )
    build = Build(
        gpu=gpu,
        device=torch.device("meta"),
        dtype=DTYPES[source.dtype],
        kv_dtype=DTYPES[source.dtype],
        max_positions=1,
        format_of=functools.cache(formats_of(source.config)),  # slots are walked more than once
        stored=source.stored,
        requantise=_not_called if source.requantise else None,
    )
    module = load("models", source.model_type)
    model: Decoder = module.Model(module.Config.from_hf(source.config), build)
    return Opened(source, model, build, parts_of(model))


def _not_called(module: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
    raise AssertionError(f"{module} of a plan was loaded")


def parts_of(model: Decoder) -> tuple[Part, ...]:
    """All of a model's weights. Of weights that checkpoints store in one of several layouts, the first
    counts. MTP layers are loaded, and read by no step yet."""
    kinds: dict[Hashable, Slot] = {}

    def part(name: str, counted: Counter[Hashable], **more: Any) -> Part:
        return Part(name, tuple((kinds[kind], count) for kind, count in counted.items()), **more)

    attention, dense, beside_mtp = (Counter[Hashable]() for _ in range(3))
    for first, second in model.blocks:
        attention += _count(first.slots(), kinds)
        if not isinstance(second, MoeBlock):
            dense += _count(second.slots(), kinds)
    sparse = [second for _, second in model.blocks if isinstance(second, MoeBlock)]
    of_mtp = [layer.mlp for layer in model.mtp if isinstance(layer.mlp, MoeBlock)]
    for layer in model.mtp:
        beside_mtp += _count(layer.slots(), kinds)
    for block in of_mtp:
        beside_mtp -= _count(block.slots(), kinds)
    embedding, head = (_count(part.slots(), kinds) for part in (model.embedding, model.head))
    return (
        part("embedding", embedding, read=model.head.tied),
        part("attention", attention),
        part(DENSE_MLP, dense),
        *_sparse(sparse, kinds, part, ("router_and_shared", "experts")),
        part("head", head),
        part("mtp", beside_mtp, read=False),
        *_sparse(of_mtp, kinds, part, ("mtp", "mtp"), read=False),
    )


def _sparse(
    blocks: Sequence[MoeBlock], kinds: dict[Hashable, Slot], part: Callable[..., Part],
    names: tuple[str, str], **more: Any,
) -> Iterator[Part]:  # fmt: skip
    """MoE layers: routers, norms and shared experts, then the routed experts of those that are alike."""
    rest, experts = Counter[Hashable](), dict[Hashable, tuple[MoeBlock, int, Counter[Hashable]]]()
    for block in blocks:
        rest += _count(block.other_slots(), kinds)
        routed = _counted(block.counted_expert_slots(), kinds)
        key = (block.problem, frozenset(routed.items()))
        _, layers, _ = experts.get(key, (block, 0, routed))
        experts[key] = (block, layers + 1, routed)
    if blocks:
        yield part(names[0], rest, shared_of=blocks[0], **more)
    for block, layers, routed in experts.values():
        counted = Counter({kind: n * layers for kind, n in routed.items()})
        yield part(names[1], counted, block=block, layers=layers, **more)


def first_layout(slots: Slots) -> Iterator[Slot]:
    """Each OneOf replaced by its first layout."""
    for entry in slots:
        yield from entry.layouts[0] if isinstance(entry, OneOf) else (entry,)


def refused(parts: Iterable[Part], tp: int, ep: int = 1) -> str | None:
    """Why the model cannot be divided so among GPUs (kernels.plan.Setting), or None: the first reason."""
    if tp % ep and ep % tp:
        return f"one of {tp} and {ep} must be a multiple of the other"
    for part in parts:
        experts = 0 if part.block is None else part.block.problem.experts
        if experts % ep:
            return f"{experts} experts / {ep} is not a whole number"
        shares = max(1, tp // ep) if experts else tp
        for slot, _ in part.slots:
            why = refusal(slot, shares)
            if why is not None:
                return str(why)
    return None


def shard_bytes(slot: Slot, tp: int, wide: Callable[[int], int] = lambda kept: kept) -> int:
    """Bytes of one slot on one of `tp` GPUs, which its cut allows: codes and scales as the checkpoint stores
    them, unquantised numbers in the dtype they are computed in. An activation's optional scale is not
    counted. `wide`: the pieces that it keeps → what they are grown to."""
    whole, kept = (slot.cut.count, pieces_of(slot.cut, tp)) if slot.cut is not None else (1, 1)
    assert kept is not None, (slot, tp)
    kept = kept if slot.cut is None else wide(kept)
    if not isinstance(slot, WeightSlot) or slot.format.name == "bf16":
        return slot.target.nbytes // whole * kept
    sizes = list(slot.stored or slot.target.shape[-2:])
    if slot.cut is not None:
        sizes[slot.cut.axis] = sizes[slot.cut.axis] // whole * kept
    specs = (spec for spec in slot.format.tensors(*sizes).values() if not spec.optional)
    return math.prod(slot.target.shape[:-2]) * sum(map(_spec_bytes, specs))


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtypes[0].itemsize


def _count(slots: Slots, kinds: dict[Hashable, Slot]) -> Counter[Hashable]:
    return _counted(((slot, 1) for slot in first_layout(slots)), kinds)


def _counted(slots: Iterable[tuple[Slot, int]], kinds: dict[Hashable, Slot]) -> Counter[Hashable]:
    counted: Counter[Hashable] = Counter()
    for slot, count in slots:
        target, format, stored = slot.target, getattr(slot, "format", None), getattr(slot, "stored", None)
        kind = (format, stored, target.shape, target.dtype, slot.cut)
        kinds.setdefault(kind, slot)
        counted[kind] += count
    return counted
