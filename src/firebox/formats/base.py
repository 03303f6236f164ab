"""The contract of a weight format, and the slots through which a checkpoint's tensors reach a layer.

A format is a file in this room; its name is the key. The file holds one frozen dataclass `Format` with the
methods of the protocol below; its fields are what checkpoints vary (group size, spelling, …).
`formats.select` reads them from a config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16, torch.float32)  # any of them, in 16 bits as a rule


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as the checkpoint stores it, in one of `dtypes`, the usual one first. A scalar (`shape` ())
    may be stored as [1] or [1, 1] too. `optional`: it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    optional: bool = False


class Format(Protocol):
    """One weight format. A weight is a matrix [rows, columns] = [out_features, in_features]."""

    @property
    def name(self) -> str:
        """The file's name."""
        ...

    def tensors(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """What the checkpoint stores for one weight: the tensor name's last part → spec."""
        ...

    def dequantise(self, tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """The host oracle: the weight [rows, columns] in float32, exactly what the stored codes and scales
        mean."""
        ...

    def cut_unit(self, axis: int) -> int:
        """Tensor parallelism may cut rows (axis 0) or columns (axis 1) only at multiples of this."""
        ...


FormatOf = Callable[[str], Format]  # a module's path, such as "model.layers.0.mlp.down_proj" → its format


UNEVEN = 1 / 8  # by which the largest of unequal shares may be above the mean


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism divides a weight: along `axis`, 0 for output features (rows), 1 for input
    features (columns), into equal shares of `count` indivisible pieces (heads, columns of an MLP). `label`:
    what config.json calls the count. `shared`: with more ranks than pieces, several ranks keep the same piece
    (KV heads). `runs`: output features of the weights that are stacked in this one, each divided by itself;
    empty: it is one. `unit`: of pieces, what a format wants to stay together in this weight and in those that
    are divided alike. Where that leaves no equal shares, some ranks have a unit more (gpt-oss at tp 4: 23,
    23, 22 and 22 of 90 groups), unless the largest share were more than UNEVEN above the mean.
    """

    axis: int
    count: int
    label: str
    shared: bool = False
    runs: tuple[int, ...] = ()
    unit: int = 1

    def pieces(self, tp: int) -> int | None:
        """How many of the pieces one of `tp` ranks has at most, or None if they cannot be shared out."""
        if self.count % self.unit == 0 and self.count % (tp * self.unit):
            most = -(-self.count // (tp * self.unit)) * self.unit
            if self.unit > 1 and most * tp <= self.count * (1 + UNEVEN):
                return most
        if self.count % tp == 0:
            return self.count // tp
        return 1 if self.shared and tp % self.count == 0 else None

    def share(self, size: int, tp: int) -> int:
        """Of `size` features, the largest share of one of `tp` ranks; the cut allows it."""
        pieces = self.pieces(tp)
        assert pieces is not None, (self, tp)
        return size // self.count * pieces if size else 0


class Slot(Protocol):
    """Some of a checkpoint's tensors and the memory they go to."""

    @property
    def target(self) -> torch.Tensor:
        """The memory."""
        ...

    @property
    def cut(self) -> Cut | None:
        """How tensor parallelism divides it; None: every rank has all of it."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Full tensor name → what it must look like."""
        ...

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Takes all of `tensors` that the checkpoint has, shapes and dtypes checked. Called once."""
        ...


@dataclass(frozen=True)
class PlainSlot:
    """One unquantised tensor that goes as it is to `target`, which has its shape. Widening is exact;
    narrowing rounds to nearest even. `arrange` (with `stored`, the shape before it) is for checkpoints that
    store it in another order. `optional`: the checkpoint may lack it, and then `target` stays as it is."""

    name: str
    target: torch.Tensor
    stored: tuple[int, ...] | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    optional: bool = False
    cut: Cut | None = None

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The one tensor."""
        return {self.name: TensorSpec(self.stored or tuple(self.target.shape), optional=self.optional)}

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Copies."""
        tensor = found[self.name]
        self.target.copy_(tensor if self.arrange is None else self.arrange(tensor))


@dataclass(frozen=True)
class WeightSlot:
    """A weight in a format, dequantised into `target`: [rows, columns], or [experts, rows, columns] where the
    checkpoint stores all experts in one tensor. The tensors' names are `module + separator + part`. `arrange`
    (with `stored`, rows and columns before it) is for checkpoints that store the matrix in another order; it
    maps one dequantised matrix. `requantisable`: --requantize may store it in FP8 where it is unquantised.
    """

    module: str
    format: Format
    target: torch.Tensor
    separator: str = "."
    stored: tuple[int, int] | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    requantisable: bool = False
    cut: Cut | None = None

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The format's tensors under this module's name, with the experts' dimension in front if there is
        one."""
        parts = self.format.tensors(*self._matrix)
        return {
            self.module + self.separator + part: replace(spec, shape=self._stacked(spec))
            for part, spec in parts.items()
        }

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Dequantises, one matrix at a time."""
        prefix = len(self.module) + len(self.separator)
        specs = self.tensors
        pieces = {name[prefix:]: tensor.reshape(specs[name].shape) for name, tensor in found.items()}
        if self.target.dim() == 2:
            self.target.copy_(self._matrix_of(pieces))
            return
        for expert, matrix in enumerate(self.target):
            matrix.copy_(self._matrix_of({part: tensor[expert] for part, tensor in pieces.items()}))

    @property
    def _matrix(self) -> tuple[int, int]:
        rows, columns = self.target.shape[-2:]
        return self.stored or (rows, columns)

    def _stacked(self, spec: TensorSpec) -> tuple[int, ...]:
        return (*self.target.shape[:-2], *spec.shape)

    def _matrix_of(self, pieces: Mapping[str, torch.Tensor]) -> torch.Tensor:
        matrix = self.format.dequantise(pieces, *self._matrix)
        return matrix if self.arrange is None else self.arrange(matrix)


@dataclass(frozen=True)
class StoredSlot:
    """A weight that stays in its format, for kernels that read it so. `shape`: [rows, columns], or [experts,
    rows, columns] where the checkpoint stores all experts in one tensor. `keep` takes the format's tensors by
    the last part of their names; `invent` makes some up on `device`, of about the size that training leaves
    (`--load-format dummy`). `kept`: the format that `keep` turns it into, where that is another one
    (--requantize)."""

    module: str
    format: Format
    shape: tuple[int, ...]
    device: torch.device
    keep: Callable[[Mapping[str, torch.Tensor]], None]
    invent: Callable[[torch.Generator], None]
    separator: str = "."
    cut: Cut | None = None
    kept: Format | None = None

    @property
    def target(self) -> torch.Tensor:
        """The weight's shape, without memory."""
        return torch.empty(self.shape, dtype=torch.bfloat16, device="meta")

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """As WeightSlot's."""
        parts = self.format.tensors(*self.shape[-2:])
        return {
            self.module + self.separator + part: replace(spec, shape=(*self.shape[:-2], *spec.shape))
            for part, spec in parts.items()
        }

    @property
    def stored_bytes(self) -> int:
        """Of all its tensors as they are kept: unquantised numbers in 16 bits, whatever the checkpoint's; an
        activation's optional scale is not."""
        format = self.kept or self.format
        return math.prod(self.shape[:-2]) * sum(
            math.prod(spec.shape) * (2 if format.name == "bf16" else spec.dtypes[0].itemsize)
            for spec in format.tensors(*self.shape[-2:]).values()
            if not spec.optional
        )

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Hands them over, on the device."""
        prefix, specs = len(self.module) + len(self.separator), self.tensors
        self.keep({n[prefix:]: t.to(self.device).reshape(specs[n].shape) for n, t in found.items()})


@dataclass(frozen=True)
class KeptSlot:
    """One unquantised tensor of `shape`, such as all experts' in one, that `keep` takes as it is; `invent` as
    StoredSlot's."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    keep: Callable[[torch.Tensor], None]
    cut: Cut | None
    invent: Callable[[torch.Generator], None] = lambda generator: None

    @property
    def target(self) -> torch.Tensor:
        """The tensor's shape, without memory."""
        return torch.empty(self.shape, dtype=torch.bfloat16, device="meta")

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The one tensor."""
        return {self.name: TensorSpec(self.shape)}

    @property
    def stored_bytes(self) -> int:
        """Of the tensor."""
        return self.target.nbytes

    def fill(self, found: Mapping[str, torch.Tensor]) -> None:
        """Hands it over, on the device."""
        self.keep(found[self.name].to(self.device))


@dataclass(frozen=True)
class OneOf:
    """Layouts in which checkpoints store the same weights (one tensor per expert, or all experts in one): the
    loader takes the first of which the checkpoint has every tensor that must be there."""

    layouts: Sequence[Sequence[Slot]]


Slots = Iterator[Slot | OneOf]
