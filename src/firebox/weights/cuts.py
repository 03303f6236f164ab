"""May tensor parallelism cut this model into so many shares? Asked before anything is loaded, of a model on
the meta device too.

A weight says how it is divided (formats.base.Cut), its format at which multiples it may be cut (`cut_unit`):
a scale covers a block or a group of weights, a word holds several, and half of either is of no use.

    q, k, v, gate, up, output matrix, embedding    along their output features: heads, MLP columns, tokens
    o, down                                        along their input features: what the former put out
    norms, routers, latent projections             not at all: every rank has them whole

Shares are equal, but for the columns of routed experts, which groups may divide nearly so (Cut.unit).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firebox.errors import ConfigError, FireboxError, UnsupportedFormat
from firebox.formats.base import Cut, Slot, WeightSlot
from firebox.models.base import Model
from firebox.weights.load import chosen_slots

SIZES = (1, 2, 4, 8, 16)


def check_cuts(model: Model, tp: int) -> None:
    """Raises ConfigError where heads or other indivisible pieces cannot be shared out equally among `tp`
    ranks, UnsupportedFormat where a share is not a multiple of what the format allows; both name the first
    module, the rule with its numbers, and the sizes that work. The model has its slots until `finish`."""
    if tp < 1:
        raise ConfigError(f"tensor parallelism over {tp} ranks", hint="at least 1")
    slots = chosen_slots(model, None)
    refusals = [error for slot in slots if (error := refusal(slot, tp)) is not None]
    if refusals:
        first, more = refusals[0], len(refusals) - 1
        others = f", and {more} more" if more else ""
        works = ", ".join(map(str, _working(slots)))
        raise type(first)(f"{first}{others}", hint=f"tensor-parallel sizes that work: {works}")


def working_sizes(model: Model) -> tuple[int, ...]:
    """Those of 1, 2, 4, 8 and 16 into which the model can be cut."""
    return _working(chosen_slots(model, None))


def refusal(slot: Slot, tp: int) -> FireboxError | None:
    """Why this weight cannot be cut into `tp` shares, or None."""
    cut = slot.cut
    if cut is None or tp == 1:
        return None
    module = slot.module if isinstance(slot, WeightSlot) else next(iter(slot.tensors))
    pieces = pieces_of(cut, tp)
    if pieces is None:
        otherwise = f", and {tp} is not a multiple of it" if cut.shared else ""
        return ConfigError(f"{module}: {cut.label} {cut.count} / {tp} is not a whole number{otherwise}")
    if pieces == cut.count or not isinstance(slot, WeightSlot):
        return None
    unit, format = slot.format.cut_unit(cut.axis), slot.format.name
    for size in cut.runs or (_size(slot.target, cut.axis),):
        share = size // cut.count * pieces
        if share % unit:
            return UnsupportedFormat(f"{module}: {_rule(cut, size, share, unit, format)}")
    return None


def _working(slots: Sequence[Slot]) -> tuple[int, ...]:
    return tuple(tp for tp in SIZES if all(refusal(slot, tp) is None for slot in slots))


def pieces_of(cut: Cut, tp: int) -> int | None:
    """How many of the pieces a rank has, or None if they cannot be shared out equally."""
    return cut.pieces(tp)


def _size(target: torch.Tensor, axis: int) -> int:
    """Output or input features of one matrix."""
    return target.shape[-2 if axis == 0 else -1]


def _rule(cut: Cut, size: int, share: int, unit: int, format: str) -> str:
    width = size // cut.count
    whole = f"{cut.label} {cut.count}" + (f" · {width}" if width > 1 else "")
    if unit >= size:
        return f"{whole} lies within one group of {format}, which cannot be cut"
    return f"{whole} / {size // share} = {share} is not a multiple of {unit} ({format})"
