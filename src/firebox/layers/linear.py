"""A linear map whose weight may be several checkpoint modules stacked row-wise (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from firebox.formats import bf16, fp8_channel
from firebox.formats.base import Cut, Format, PlainSlot, Slots, StoredSlot, WeightSlot
from firebox.hardware.base import Gpu
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.dense_gpu import LinearKernels

# What layers give to torch, by intention and no matter what kernels accept: none of these is a fallback.
DENSE = "dequantised weights were asked for"
ONE_ROW = "has one row, a dot product for each token: a library's"
INTENDED = (DENSE, ONE_ROW)
INNER_UNIT = 16  # columns of an MLP that any kernel takes


def grown(size: int, unit: int) -> int:
    """`size` up to a multiple of `unit`."""
    return -(-size // unit) * unit


def fitted(inner: torch.Tensor, down: Linear) -> torch.Tensor:
    """`inner` [tokens, n] as wide as `down` takes it, where only one of an MLP's layers has kernels: what is
    added or left out is zero."""
    missing = down.in_features - inner.shape[-1]
    return F.pad(inner, (0, missing)) if missing else inner


class Linear:
    """y = x · weightᵀ (+ bias) (+ residual). `parts`: module path → rows, in the order they are stacked; each
    part has its own format, which its path decides. `requantisable`: unquantised parts may become FP8
    (--requantize); not so the few numbers that gate others. `cuts`: how tensor parallelism divides each part;
    a bias is divided with the output features, and kept whole otherwise.

    On an NVIDIA GPU the weight stays as it is stored, for kernels that read it so, unless `dense`, one of
    INTENDED, says why torch is to compute with it, or the parts' formats are not those of one kernel.
    Elsewhere it is dequantised as it is loaded. With `build.requantise` unquantised parts become FP8 while
    they are packed, and the layer is one in FP8 from the beginning, unless no kernel would read it.

    `residual`: calls add one; `out_dtype`: of y, by default the compute dtype, for kernels only. `unit`: for
    kernels, a share that is cut is grown with zeros to a multiple of this: rows of y that are 0, columns of x
    that do not count (GLM-4.5-Air at tp 8: 1,368 columns of an MLP). `normed`: x is a norm's, which writes
    FP8 codes for kernels that multiply them (norm_gpu.py).
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        requantisable: bool = True,
        cuts: Sequence[Cut | None] = (),
        dense: str | None = None,
        residual: bool = False,
        out_dtype: torch.dtype | None = None,
        unit: int = 1,
        normed: bool = False,
    ) -> None:
        assert unit == 1 or not bias, "a bias is not grown"
        self.parts, self._unit = parts, unit
        self.cuts = tuple(cuts) or (None,) * len(parts)
        self._build, self._columns = build, in_features
        self._of_checkpoint = [build.format_of(path) for path in parts]
        self._requantisable = requantisable and build.requantisable
        self._residual, self._out_dtype, self._normed = residual, out_dtype, normed
        rows = sum(parts.values())
        self.bias = build.empty(rows) if bias else None
        self._has_bias = bias
        self._dense = dense
        self._formats = self._kept_formats()
        self.refusal = (
            "kernels of whole blocks pack dequantised weights"
            if build.shared is None
            else self.refused(build.gpu)
        )
        self.weight = build.empty(rows, in_features) if self.refusal else torch.empty(0, device="meta")
        self._stored: dict[int, Any] = {}  # part → layers._pack.Packed
        self._kernels: LinearKernels | None = None

    def slots(self) -> Slots:
        """Each part's weight, in its format, and its `.bias`."""
        first = 0
        for i, ((path, rows), format, cut) in enumerate(
            zip(self.parts.items(), self._formats, self.cuts, strict=True)
        ):
            if self.refusal is None:
                stored, shape, device = self._of_checkpoint[i], (rows, self._columns), self._build.device
                keep, invent = partial(self._keep, i, path), partial(self._invent, i, path)
                yield StoredSlot(path, stored, shape, device, keep, invent, cut=cut, kept=format)
            else:
                target = self.weight[first : first + rows]
                yield WeightSlot(path, format, target, requantisable=self._requantisable, cut=cut)
            if self.bias is not None:
                along = cut if cut is not None and cut.axis == 0 else None
                yield PlainSlot(f"{path}.bias", self.bias[first : first + rows], cut=along)
            first += rows

    def finish(self) -> None:
        """All slots are filled: stacks what was stored and binds the kernels."""
        if self.refusal is None and self._stored:
            from firebox.layers import _pack

            self._bind(_pack.stack([self._stored[i] for i in range(len(self.parts))], self.bias))
            self._stored.clear()

    def tie(self, weight: torch.Tensor | Linear) -> None:
        """Takes another layer's `weight` [rows, columns] for its own, or all that layer does, once it is
        finished."""
        if isinstance(weight, Linear):
            self._kernels = weight._kernels
            return
        if self.refusal is not None:
            self.weight = weight
            return
        from firebox.kernels._linear import Weights
        from firebox.layers._pack import Packed

        bias = None if self.bias is None else self.bias.float()
        self._bind(Packed(weight.shape[0], weight.shape[1], "bf16", 0, Weights(weight, bias=bias)))

    @property
    def in_features(self) -> int:
        """Columns that x must have."""
        return self._share(1)[1] if self.refusal is None else self._columns

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        codes: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`x` [tokens, in_features] → [tokens, rows], grown ones included; in `out` where that is given. With
        kernels the sum may take the residual's place, and a norm gives `codes` of x."""
        if self._kernels is None:
            y = F.linear(x, self.weight, self.bias)
            y = y if residual is None else residual + y
            return y if out is None else out.copy_(y)
        rows = self._kernels.problem.rows
        if out is None:
            out = residual if residual is not None else x.new_empty(x.shape[0], rows, dtype=self._out_dtype)
        self._kernels(x.contiguous(), out, residual, codes)
        return out

    @property
    def weights(self) -> Any:
        """What its kernels read (kernels/_linear.py)."""
        assert self._kernels is not None, "a layer without kernels"
        return self._kernels.weights

    @property
    def format(self) -> str:
        """Of its weights; of several, all."""
        return " and ".join(sorted({format.name for format in self._formats}))

    def refused(self, gpu: Gpu, tp: int = 1) -> str | None:
        """Why no kernel of `gpu` reads one of `tp` shares as it is stored, or None."""
        if self._dense is not None:
            return self._dense
        if self._build.dtype not in KERNEL_DTYPES:
            return f"kernels compute in bfloat16, not {self._build.dtype}"
        from firebox.kernels import _linear
        from firebox.kernels._experts import BLOCK
        from firebox.layers import _pack

        rows, columns = self._share(tp)
        if len({_pack.kind(format, columns) for format in self._formats}) > 1:
            return "the parts are in different formats"
        if self.format == "fp8_block" and any(part % BLOCK for part in rows[:-1]):
            return f"stacked parts are not whole blocks of {BLOCK} rows"
        if sum(rows) == 0 or columns == 0:
            return "has no weight"
        why = next(filter(None, map(_pack.refusal, self._formats)), None)
        return why or _linear.refuse(self.problem(tp), gpu)

    def problem(self, tp: int = 1, format: Format | None = None) -> Any:
        """The kernels' problem (kernels/_linear.py) of one of `tp` shares. `format`: of a weight that is
        another layer's, instead of its own."""
        from firebox.kernels import _experts, _linear
        from firebox.layers import _pack

        rows, columns = self._share(tp)
        name, group = _pack.kind(format or self._formats[0], columns)
        dtype = KERNEL_DTYPES[self._build.dtype]
        out = "f32" if self._out_dtype == torch.float32 else dtype
        normed = self._normed and name in _experts.FP8
        return _linear.Problem(
            sum(rows), columns, name, group, self._has_bias, self._residual, dtype, out, normed
        )

    def operation(self, name: str, setting: Setting) -> Operation:
        """What it launches, for the plan: its kernels, or torch's where they refuse."""
        from firebox.kernels.plan import Library, Operation
        from firebox.layers import dense_gpu

        why = self.refused(setting.gpu, setting.tp)
        if why is not None:
            return Library(name, self.format, dense_gpu, why)
        return Operation(name, self.format, dense_gpu, self.problem(setting.tp))

    def _share(self, tp: int) -> tuple[list[int], int]:
        """Each part's rows, and the columns, of one of `tp` ranks, as kernels have them."""

        def share(cut: Cut | None, size: int) -> int:
            return size if cut is None else grown(cut.share(size, tp), self._unit)

        along = [cut if cut is not None and cut.axis == 0 else None for cut in self.cuts]
        rows = [share(cut, n) for n, cut in zip(self.parts.values(), along, strict=True)]
        across = next((cut for cut in self.cuts if cut is not None and cut.axis == 1), None)
        return rows, share(across, self._columns)

    def _kept_formats(self) -> list[Format]:
        """Each part's: the checkpoint's, or FP8 for what --requantize changes."""
        self._formats = self._of_checkpoint
        changed = [self._requantisable and self._build.requantises(path) for path in self.parts]
        if any(changed):
            pairs = zip(changed, self._of_checkpoint, strict=True)
            self._formats = [fp8_channel.Format() if becomes else format for becomes, format in pairs]
            if self.refused(self._build.gpu) is not None:
                return self._of_checkpoint
        return self._formats

    def _keep(self, part: int, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        from firebox.layers import _pack

        format, rows = self._formats[part], self.parts[path]
        if format != self._of_checkpoint[part]:
            assert self._build.requantise is not None
            tensors = self._build.requantise(path, tensors["weight"])
        packed = _pack.pack(format, tensors, rows, self._columns, self._build.dtype)
        grown_rows, columns = self._share(1)
        self._stored[part] = _pack.padded(packed, grown_rows[part], columns)

    def _invent(self, part: int, path: str, generator: torch.Generator) -> None:
        from firebox.kernels._linear import Weights
        from firebox.layers import _pack
        from firebox.layers._invented import invented

        if self._formats[part] != self._of_checkpoint[part]:  # as a checkpoint's, so that the error is said
            lead, columns = (self.parts[path],), self._columns
            weight, *_ = invented("bf16", 0, lead, columns, generator, self._build.dtype)
            self._keep(part, path, {"weight": weight})
            return
        all_rows, columns = self._share(1)
        rows, (name, group) = all_rows[part], _pack.kind(self._formats[part], columns)
        made = invented(name, group, (rows,), columns, generator, self._build.dtype)
        self._stored[part] = _pack.Packed(rows, columns, name, group, Weights(*made))

    def _bind(self, packed: Any) -> None:
        from firebox.layers import _pack

        assert self._build.shared is not None
        problem = self.problem(format=None if packed.format != "bf16" else bf16.Format())
        of_weights = replace(
            _pack.problem(packed, residual=self._residual, dtype=problem.dtype, out_dtype=problem.out_dtype),
            normed=problem.normed,
        )
        assert problem == of_weights, f"planned {problem}, loaded {of_weights}"
        self._kernels = self._build.shared.linear(problem, packed.weights)
