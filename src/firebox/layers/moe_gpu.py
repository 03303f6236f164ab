"""A mixture-of-experts layer on an NVIDIA GPU, from residual stream to residual stream:

    rms_norm → linear (the router's logits, float32) → moe_route → the experts' kernels, which add x

The first three are one launch for one token, where that was measured to be faster (route_gpu.py).
Shared experts are further experts that every token takes, if they have the routed ones' format and width;
otherwise two linear layers and silu_mul. Weights stay in their format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from firebox.formats import gptq
from firebox.formats.base import Cut, Format, FormatOf, KeptSlot, OneOf, PlainSlot, Slot, Slots, StoredSlot
from firebox.formats.layouts import interleave
from firebox.hardware.base import Gpu
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES, tensor_bytes
from firebox.layers.linear import INNER_UNIT, grown

if TYPE_CHECKING:
    from firebox.kernels.cpu_moe_block import Problem
    from firebox.kernels.plan import Operation, Setting
    from firebox.layers.linear import Linear
    from firebox.layers.moe_names import MoeNames
    from firebox.layers.norm import RMSNorm


class Layer(Protocol):
    """What is read of a layers.moe.MoeBlock."""

    problem: Problem
    names: MoeNames
    format_of: FormatOf
    requantises: Callable[[str], bool]
    kept_groups: int
    shared_gate_up: Linear
    shared_down: Linear
    shared_gate: Linear

    @property
    def expert_formats(self) -> set[Format]:
        """Of an expert's matrices."""
        ...

    def inner_share(self, tp: int) -> int:
        """Columns of an expert on one of `tp` GPUs."""
        ...


def refusal(gpu: Gpu, p: Problem, formats: set[Format]) -> str | None:
    """Why the kernels of `gpu` cannot run such a layer, or None."""
    if p.dtype not in KERNEL_DTYPES:
        return f"hidden states are {str(p.dtype).removeprefix('torch.')}; kernels know bfloat16 and float16"
    if len(formats) > 1:
        return "the matrices of an expert are in different formats"
    from firebox.kernels import moe_gate_up_few, moe_route
    from firebox.layers import _pack

    format = next(iter(formats))
    if isinstance(format, gptq.Format) and format.desc_act:
        return "gptq with columns in another order than their groups (desc_act)"
    if _pack.kind(format, p.hidden) != _pack.kind(format, p.inter):
        return f"{format.name} with one scale a row; kernels know groups"
    why = _pack.refusal(format) or moe_gate_up_few.accepts(_experts_problem(p, format, gpu), gpu)
    return why or moe_route.accepts(_route_problem(p, 0), gpu)


def operations(layer: Layer, setting: Setting) -> tuple[Operation, ...] | str:
    """What such a layer launches on one of `setting.gpus`, for the plan; or why the kernels cannot run it."""
    from firebox.kernels import moe_route
    from firebox.kernels.plan import Operation, Single
    from firebox.layers import dense_gpu, expert_paths, norm_gpu, route_gpu

    p = layer.problem
    share = _share(layer, setting)
    formats = layer.expert_formats
    why = refusal(setting.gpu, share, formats)
    if why is not None:
        return why
    dtype, format = KERNEL_DTYPES[p.dtype], next(iter(formats))
    fused = _fused_in(layer, setting)
    # Tokens of other GPUs come without their codes.
    routed = _experts_problem(share, format, setting.gpu, fused, normed=setting.ep == 1)
    norm = norm_gpu.Problem(_norm_problem(p), (router_problem(p),), (routed,))
    route = _route_problem(p, fused, layer.kept_groups)
    both = _norm_route_problem(p, norm, route, setting.gpu)
    in_one = (Operation("norm_route", dtype, route_gpu, both),) if both else ()
    gate = (layer.shared_gate.operation("shared_gate", setting),) if p.shared_gate else ()
    return (
        *in_one,
        Operation("norm", dtype, norm_gpu, norm),
        Operation("router", "bf16", dense_gpu, router_problem(p)),
        *gate,
        Single("route", "f32", moe_route, route),
        *(() if fused or not p.shared_experts else _shared_operations(layer, setting)),
        Operation("experts", format.name, expert_paths, routed, times=setting.groups),
    )


def _share(layer: Layer, setting: Setting) -> Problem:
    """Of the routed experts on one of `setting.gpus`. A token's choices may all lie there."""
    p, inter = layer.problem, layer.inner_share(setting.expert_tp)
    experts = p.experts // setting.ep
    return dataclasses.replace(p, inter=inter, experts=experts, top_k=min(p.top_k, experts))


def _fused_in(layer: Layer, setting: Setting) -> int:
    """`fused_experts`; none with the routed ones divided: every GPU has its share of a shared expert."""
    if setting.ep > 1:
        return 0
    return fused_experts(layer.problem, layer.names, layer.format_of, layer.requantises)


def shared_width(layer: Layer, setting: Setting) -> int:
    """Columns of the shared expert as one GPU keeps them, for the count of its memory: a share grows where no
    tile divides it. As they are where no kernel runs the layer."""
    p, share, formats = layer.problem, _share(layer, setting), layer.expert_formats
    shared = p.shared_experts * p.inter // setting.tp
    if refusal(setting.gpu, share, formats) is not None:
        return shared
    if _fused_in(layer, setting):
        return int(_experts_problem(share, next(iter(formats)), setting.gpu).inter)
    return grown(shared, INNER_UNIT)


def routed_bytes(layer: Layer, setting: Setting) -> int | None:
    """Of a layer's routed experts as one GPU keeps them, or None where no kernel runs the layer."""
    from firebox.layers._expert_store import ExpertStore

    share, formats = _share(layer, setting), layer.expert_formats
    if refusal(setting.gpu, share, formats) is not None:
        return None
    problem = _experts_problem(share, next(iter(formats)), setting.gpu)
    store = ExpertStore(problem, torch.device("meta"))
    return tensor_bytes(store.gate_up) + tensor_bytes(store.down)


def _shared_operations(layer: Layer, setting: Setting) -> Iterator[Operation]:
    from firebox.kernels import silu_mul
    from firebox.kernels.plan import Single

    share = dataclasses.replace(layer.problem, inter=layer.problem.inter // setting.tp)
    yield layer.shared_gate_up.operation("shared_gate_up", setting)
    yield Single("shared_silu_mul", KERNEL_DTYPES[share.dtype], silu_mul, _activation_problem(share))
    yield layer.shared_down.operation("shared_down", setting)


def fused_experts(
    p: Problem, names: MoeNames, format_of: FormatOf, requantises: Callable[[str], bool]
) -> int:
    """How many shared experts are further experts to the kernels: one, if it has the routed ones'
    format and keeps it: --requantize changes shared experts, not routed ones."""
    paths = [f"{names.shared}.{part}" for part in (names.gate, names.up, names.down)]
    alike = {format_of(path) for path in paths} == {format_of(names.down_of(0))}
    return int(p.shared_experts == 1 and alike and not any(map(requantises, paths)))


def router_problem(p: Problem) -> Any:
    """The router is never quantised, never cut, and its logits are float32."""
    from firebox.kernels import _linear

    dtype = KERNEL_DTYPES[p.dtype]
    return _linear.Problem(p.experts, p.hidden, "bf16", bias=p.biases, dtype=dtype, out_dtype="f32")


def _norm_problem(p: Problem) -> Any:
    from firebox.kernels import rms_norm

    return rms_norm.Problem(p.hidden, p.eps, dtype=KERNEL_DTYPES[p.dtype])


def _activation_problem(p: Problem) -> Any:
    from firebox.kernels import silu_mul

    wide, dtype = grown(p.shared_experts * p.inter, INNER_UNIT), KERNEL_DTYPES[p.dtype]
    return silu_mul.Problem(wide, p.activation, p.limit or 7.0, p.alpha or 1.702, dtype=dtype)


def _experts_problem(p: Problem, format: Format, gpu: Gpu, shared: int = 0, *, normed: bool = False) -> Any:
    from firebox.kernels import _experts
    from firebox.layers import _pack, expert_paths

    name, group = _pack.kind(format, p.hidden)
    further: dict[str, Any] = {"int4_columns": group} if name in _experts.INTEGERS else {}
    if p.activation == "clamped_swiglu":
        further |= {"limit": p.limit, "alpha": p.alpha}
    return _experts.widened(expert_paths.stored_as(_experts.Problem(
        p.hidden, p.inter, p.experts + shared, p.top_k + shared, name, p.activation,
        biases=p.biases, dtype=KERNEL_DTYPES[p.dtype], residual=True, shared=shared,
        normed=normed and name in _experts.FP8, **further,
    ), gpu))  # fmt: skip


def _route_problem(p: Problem, shared: int, kept_groups: int = 1) -> Any:
    from firebox.kernels import moe_route

    return moe_route.Problem(
        p.experts, p.top_k, p.scoring, p.renormalise, p.routed_scale, p.expert_groups, kept_groups, shared,
        shared > 0 and p.shared_gate,
    )  # fmt: skip


def _norm_route_problem(p: Problem, norm: Any, route: Any, gpu: Gpu) -> Any:
    """None where the two and the router between them are not one launch."""
    from firebox.kernels import moe_norm_route
    from firebox.layers import route_gpu

    problem = moe_norm_route.Problem(norm.norm, route, p.biases)
    return None if moe_norm_route.accepts(problem, gpu) else route_gpu.Problem(norm, problem)


class MoeKernels:
    """See above. Made with the layer, filled through `slots`, bound by `finish`."""

    def __init__(
        self, build: Build, p: Problem, names: MoeNames, kept_groups: int, cuts: tuple[Cut, Cut]
    ) -> None:
        from firebox.layers._expert_store import ExpertStore

        self._build, self._p, self._names, self._cuts = build, p, names, cuts
        self._format = build.format_of(names.down_of(0))
        self.fused = fused_experts(p, names, build.format_of, build.requantises)
        self.problem = _experts_problem(p, self._format, build.gpu, self.fused, normed=True)
        self._route = _route_problem(p, self.fused, kept_groups)
        self._store: Any = ExpertStore(self.problem, build.device)

    # ---- filling

    def slots(self, interleaved: bool) -> Slots:
        """The routed experts' tensors and a fused shared expert's."""
        yield from self.routed_slots(interleaved)
        if self.fused:
            yield from self._of(self._p.experts, self._names.shared)

    def routed_slots(self, interleaved: bool) -> Slots:
        """One by one or all in one."""
        if interleaved:
            yield from self._all_stored()
        elif self._names.fused and self._format.name == "bf16":
            yield OneOf((tuple(self._one_by_one()), tuple(self._all_plain())))
        else:
            yield from self._one_by_one()

    def _one_by_one(self) -> Iterator[Slot]:
        for e in range(self._p.experts):
            yield from self._of(e, self._names.expert.format(e=e))

    def _of(self, e: int, path: str) -> Iterator[Slot]:
        p, names, (rows, columns) = self._p, self._names, self._cuts
        for part, shape, cut in (
            (names.gate, (p.inter, p.hidden), rows),
            (names.up, (p.inter, p.hidden), rows),
            (names.down, (p.hidden, p.inter), columns),
        ):
            keep = partial(self._keep, e, (names.gate, names.up, names.down).index(part), shape)
            invent = partial(self._invent, e, part)
            yield StoredSlot(f"{path}.{part}", self._format, shape, self._build.device, keep, invent, cut=cut)

    def _keep(self, e: int, part: int, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> None:
        from firebox.kernels._experts import NIBBLES
        from firebox.layers import _pack

        nibbles = self.problem.format in NIBBLES
        packed = _pack.pack(self._format, tensors, *shape, self._build.dtype, nibbles, self.problem.unit)
        wide, hidden = self.problem.inter, self._p.hidden
        if part == 2:
            self._store.keep_down(e, _pack.padded(packed, hidden, wide))
        else:
            self._store.keep_half(e, part, _pack.padded(packed, wide, hidden))

    def _invent(self, e: int, part: str, generator: torch.Generator) -> None:
        if e == 0 and part == self._names.gate:  # the first slot fills all experts
            self._store.invent(generator)

    def _all_plain(self) -> Iterator[Slot]:
        """Unquantised: [experts, 2 · inter, hidden], gate rows first, and [experts, hidden, inter]."""
        p, (rows, columns), fused = self._p, self._cuts, self._names.fused
        for part, shape, keep, cut in (
            ("gate_up_proj", (p.experts, 2 * p.inter, p.hidden), self._keep_gates, rows),
            ("down_proj", (p.experts, p.hidden, p.inter), self._keep_downs, columns),
        ):
            yield KeptSlot(f"{fused}.{part}", shape, self._build.device, keep, cut)

    def _keep_gates(self, tensor: torch.Tensor) -> None:
        for e, matrix in enumerate(tensor):
            gate, up = matrix.chunk(2)
            self._keep_plain(e, 0, gate)
            self._keep_plain(e, 1, up)

    def _keep_downs(self, tensor: torch.Tensor) -> None:
        for e, matrix in enumerate(tensor):
            self._keep_plain(e, 2, matrix)

    def _keep_plain(self, e: int, part: int, matrix: torch.Tensor) -> None:
        self._keep(e, part, (matrix.shape[0], matrix.shape[1]), {"weight": matrix})

    def _all_stored(self) -> Iterator[Slot]:
        """gpt-oss: gate and up rows in turn; MXFP4, its parts behind an underscore, or bf16 transposed."""
        p, (rows, columns), fused, device = self._p, self._cuts, self._names.fused, self._build.device
        for part, shape, keep, cut in (
            ("gate_up_proj", (p.experts, 2 * p.inter, p.hidden), self._keep_pair, rows),
            ("down_proj", (p.experts, p.hidden, p.inter), self._keep_down, columns),
        ):
            path = f"{fused}.{part}"
            invent = partial(self._invent, 0 if part == "gate_up_proj" else 1, self._names.gate)
            if self._format.name == "bf16":
                stored = (shape[0], shape[2], shape[1])
                yield KeptSlot(path, stored, device, partial(self._keep_transposed, keep), cut, invent)
            else:
                yield StoredSlot(path, self._format, shape, device, keep, invent, separator="_", cut=cut)
        gate_up, down = self._store.gate_up.bias, self._store.down.bias
        in_turn, in_runs = (p.experts, 2 * p.inter), partial(_in_runs, self.problem.inter)
        yield PlainSlot(f"{fused}.gate_up_proj_bias", gate_up, in_turn, in_runs, cut=rows)
        yield PlainSlot(f"{fused}.down_proj_bias", down)

    def _keep_transposed(self, keep: Any, tensor: torch.Tensor) -> None:
        keep({"weight": tensor.transpose(1, 2)})

    def _keep_pair(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for e in range(self._p.experts):
            of_expert = {name: tensor[e] for name, tensor in tensors.items()}
            for half in (0, 1):
                rows = {name: tensor[half::2] for name, tensor in of_expert.items()}
                self._keep(e, half, (self._p.inter, self._p.hidden), rows)

    def _keep_down(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for e in range(self._p.experts):
            of_expert = {name: tensor[e] for name, tensor in tensors.items()}
            self._keep(e, 2, (self._p.hidden, self._p.inter), of_expert)

    # ---- running

    def finish(
        self, norm: RMSNorm, router: Linear, correction_bias: torch.Tensor,
        shared: tuple[Linear, Linear, Linear],
    ) -> None:  # fmt: skip
        """Binds. `shared`: gate and up, down, and the gate of both, as far as the layer has them."""
        from firebox.kernels import moe_route, silu_mul
        from firebox.layers import norm_gpu

        p, device = self._p, self._build.shared
        assert device is not None
        self._norm_weight, self._router, self._correction = norm.weight, router, correction_bias
        self._shared = shared
        behind = norm_gpu.Problem(_norm_problem(p), (router_problem(p),), (self.problem,))
        self._norm = norm_gpu.NormKernels(behind, self._build.gpu)
        in_one = _norm_route_problem(p, behind, self._route, self._build.gpu)
        self._in_one = (in_one, device.routes()) if in_one else None
        self._choose = device.launcher(moe_route, self._route)
        self._experts = device.experts(self.problem, self._store.gate_up, self._store.down)
        if p.shared_experts and not self.fused:
            self._activate = device.launcher(silu_mul, _activation_problem(p))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden], which becomes the result."""
        h, codes, ids, weights = self._routed(x)
        if self._p.shared_experts and not self.fused:
            self._add_shared(h, x)
        self._experts(h, ids, weights, x, codes)
        return x

    def _routed(self, x: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """The normed rows, their FP8 codes or None, their experts and the weights of these."""
        from firebox.kernels import moe_route
        from firebox.layers import route_gpu

        correction = self._correction if self._p.scoring == "sigmoid" else None
        if self._in_one is not None:
            (problem, space), gpu = self._in_one, self._build.gpu
            config = route_gpu.config_of(problem, gpu, len(x))
            if config is not None:
                given = (x, self._norm_weight, self._router.weights, correction)
                return route_gpu.run(problem, config, gpu, space, *given)
        h, codes = self._norm(x, self._norm_weight)
        logits = self._router(h)
        gate = self._gate(h) if self.fused else None
        ids = x.new_empty(x.shape[0], self._route.choices, dtype=torch.int32)
        weights = x.new_empty(ids.shape, dtype=torch.float32)
        moe_route.run(self._choose, logits, correction, gate, ids, weights)
        return h, codes, ids, weights

    def _gate(self, h: torch.Tensor) -> torch.Tensor | None:
        """Of the shared expert, [tokens] float32, before the sigmoid."""
        return self._shared[2](h).float().flatten() if self._p.shared_gate else None

    def _add_shared(self, h: torch.Tensor, x: torch.Tensor) -> None:
        from firebox.kernels import silu_mul

        gate_up, down, _ = self._shared
        inner = h.new_empty(h.shape[0], down.in_features)
        both = gate_up(h)
        assert both.shape[1] == 2 * inner.shape[1], (both.shape, inner.shape)
        silu_mul.run(self._activate, both, out=inner)
        y, gate = down(inner), self._gate(h)
        x += y if gate is None else y * F.sigmoid(gate).unsqueeze(-1).to(y.dtype)


def _in_runs(wide: int, bias: torch.Tensor) -> torch.Tensor:
    """`bias` [experts, 2 · inter], gate and up in turn → [experts, 2 · wide] as the kernels read it, zeros
    behind."""
    halves = (bias[:, half::2].float() for half in (0, 1))
    grown = (F.pad(half, (0, wide - half.shape[1])).unsqueeze(-1) for half in halves)
    return interleave(*grown).squeeze(-1)
