"""An expert layer on this GPU, for tuning: random weights, several routings, and each half on its own.

The halves are launched as layers/experts.py does it, each on made-up inputs. The first tokens are the same at
any number of tokens, so that the oracle computes them once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from firebox.formats.layouts import arranged_columns
from firebox.hardware.base import Gpu
from firebox.kernels import (
    moe_arrange,
    moe_combine,
    moe_down,
    moe_down_few,
    moe_down_one,
    moe_gate_up,
    moe_gate_up_few,
    moe_gate_up_one,
    moe_sort,
    quantise_fp8,
)
from firebox.kernels._experts import FP8, Problem
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.layers._expert_store import ExpertStore
from firebox.layers._invented import relative_error, vary
from firebox.layers.expert_paths import FEW, ONE, SORTED, Path, default_path, requests
from firebox.layers.experts import Experts, Workspace
from firebox.tuning._launchers import launcher
from firebox.tuning.base import Candidate
from firebox.tuning.clock import Call
from firebox.tuning.estimate import GATE_UP

DOWN = "down"
UNSORTED = (ONE, FEW)
CHECKED_TOKENS = 4
SMALLEST_BLOCK = 16
FILLED_ROWS = 4096  # of h at a time
# Relative: bf16 and float16 sums against float32; FP8 activations (E4M3 rounds by 2.6 % RMS, twice).
PLAIN_LIMIT, FP8_LIMIT = 8e-3, 6e-2


def path_of(parts: Mapping[str, Candidate]) -> Path:
    """The parts as the engine's own path."""
    return Path(parts[GATE_UP].path, parts[GATE_UP].config, parts[DOWN].config, "tuning")


def tables_request(problem: Problem, tokens: int, gpu: Gpu) -> CompileRequest:
    """Of a first half that counts nothing, on its own: it writes the tables that any second half reads."""
    return moe_gate_up_few.request(problem, tokens, default_path(problem, FEW, tokens, gpu).gate_up, gpu)


class Weighted:
    """One layer's weights, the tokens that are checked, and what they must come to."""

    def __init__(self, problem: Problem, gpu: Gpu) -> None:
        self.problem, self.gpu = problem, gpu
        device = torch.device("cuda")
        self.generator = torch.Generator(device).manual_seed(1)
        store = ExpertStore(problem, device)
        store.invent(self.generator)
        for weights in (store.gate_up, store.down):
            vary((weights.scale, weights.row_scale), self.generator)
        self.gate_up, self.down = store.gate_up, store.down
        self.x, self.ids, self.weights = self.routed(CHECKED_TOKENS)
        shape = (CHECKED_TOKENS * problem.top_k, problem.inter)
        self._h = torch.randn(shape, generator=self.generator, device=device)
        self._products: dict[str, torch.Tensor] = {}

    def routed(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random x [tokens, hidden] bf16, and [tokens, top_k] different experts int32 with their weights;
        shared experts are every token's."""
        p, generator = self.problem, self.generator
        x = torch.randn(tokens, p.hidden, generator=generator, device="cuda").bfloat16()
        routed = p.experts - p.shared
        chances = torch.rand(tokens, routed, generator=generator, device="cuda")
        chosen = chances.topk(p.top_k - p.shared, dim=1).indices
        shared = torch.arange(routed, p.experts, device="cuda").expand(tokens, -1)
        ids = torch.cat((chosen, shared), dim=1)
        weights = torch.rand(tokens, p.top_k, generator=generator, device="cuda") + 0.1
        return x, ids.int(), weights / weights.sum(1, keepdim=True)

    def bench(self, tokens: int) -> ExpertBench:
        """For so many tokens."""
        return ExpertBench(self, tokens)

    # ---- the oracle

    @functools.cached_property
    def wanted_h(self) -> torch.Tensor:
        """[choices, inter] float32 of the checked tokens."""
        return moe_gate_up_few.reference(self.problem, self.x, self.gate_up, self.ids)

    def stored_h(self, like: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The second half's made-up input as a workspace stores it, in the type of `like`, in columns'
        order; and, with a `scale` [rows, groups], that [choices, groups]."""
        if scale is None:
            return self._h.to(like.dtype), self._h
        groups = self._h.unflatten(1, (scale.shape[1], -1))
        largest = groups.abs().amax(-1) / torch.finfo(like.dtype).max
        return (groups / largest.unsqueeze(-1)).flatten(1).to(like.dtype), largest

    def products(self, path: str, h: torch.Tensor) -> torch.Tensor:
        """Of the checked tokens' choices, from `h` [choices, inter] float32, the same at every call of a
        path."""
        if path not in self._products:
            p, order = self.problem, torch.arange(len(h), dtype=torch.int32, device="cuda")
            self._products[path] = moe_down.reference(p, h, self.down, self.ids, order, self.weights)
        return self._products[path]


@dataclass
class _Data:
    """One call's inputs and the memory between its launches. `blocks`: size of a block → the blocks."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    space: Workspace
    out: torch.Tensor
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    few_ready: bool = False
    sorted_ready: bool = False


class ExpertBench:
    """See tuning.base.Bench."""

    def __init__(self, layer: Weighted, tokens: int) -> None:
        self._layer, self._tokens, self.problem = layer, tokens, layer.problem
        # Together they read more than any L2 holds; many tokens do so at once.
        calls = 8 if tokens <= 8 else 4 if tokens <= 64 else 2 if tokens <= 256 else 1
        self._data = [self._make() for _ in range(calls)]
        checked, self._first = self._data[0], min(tokens, CHECKED_TOKENS)
        for mine, fixed in ((checked.x, layer.x), (checked.ids, layer.ids), (checked.weights, layer.weights)):
            mine[: self._first] = fixed[: self._first]

    def _make(self) -> _Data:
        x, ids, weights = self._layer.routed(self._tokens)
        space = Workspace(self.problem, self._tokens, "cuda")
        return _Data(x, ids, weights, space, torch.zeros_like(x))

    # ---- the halves

    def calls(self, candidate: Candidate) -> list[Call]:
        """One launch for each of the inputs."""
        return [self._call(candidate, data) for data in self._data]

    def _call(self, candidate: Candidate, data: _Data) -> Call:
        assert candidate.request is not None
        chosen = launcher(candidate.request)
        if candidate.path == ONE:
            return self._one(candidate, chosen, data)
        if candidate.path == FEW:
            return self._few(candidate, chosen, data)
        assert candidate.path == SORTED, f"no bench for {candidate.path}"
        return self._sorted(candidate, chosen, data)

    def _one(self, candidate: Candidate, chosen: Launcher, data: _Data) -> Call:
        p, h, layer = self.problem, data.space.h_few, self._layer
        if candidate.part == GATE_UP:
            return lambda: moe_gate_up_one.run(chosen, p, data.x, layer.gate_up, data.ids, h)
        self._prepare_few(data)
        return lambda: moe_down_one.run(chosen, p, h, layer.down, data.ids, data.weights, data.out)

    def _few(self, candidate: Candidate, chosen: Launcher, data: _Data) -> Call:
        p, space, layer = self.problem, data.space, self._layer
        if candidate.part == GATE_UP:
            return lambda: moe_gate_up_few.run(
                chosen, p, data.x, layer.gate_up, data.ids, space.h_few, space.table
            )
        self._prepare_few(data)
        half = (chosen, p, space.h_few, layer.down, data.ids, data.weights, space.table)
        if self._adds_apart(candidate):
            return lambda: moe_down_few.run(*half, space.y)
        return lambda: moe_down_few.run(*half, space.partial, data.out, space.counters)

    def _adds_apart(self, candidate: Candidate) -> bool:
        return candidate.path == FEW and moe_down_few.adds_apart(candidate.config, self._tokens)

    def _prepare_few(self, data: _Data) -> None:
        """The tables, which any tile writes, and h; the first half's calls write over it."""
        if data.few_ready:
            return
        p, space, gpu = self.problem, data.space, self._layer.gpu
        first_half = launcher(tables_request(p, self._tokens, gpu))
        moe_gate_up_few.run(first_half, p, data.x, self._layer.gate_up, data.ids, space.h_few, space.table)
        space.h_few.normal_(generator=self._layer.generator)
        data.few_ready = True

    def _sorted(self, candidate: Candidate, chosen: Launcher, data: _Data) -> Call:
        p, space, layer = self.problem, data.space, self._layer
        self._prepare_sorted(data)
        blocks = self._blocks(data, candidate.config.tokens)
        if candidate.part == GATE_UP:
            x = data.x if space.x is None else space.x
            return lambda: moe_gate_up.run(
                chosen, p, x, space.x_scale, layer.gate_up, space.order, blocks, space.h, space.h_scale
            )
        return lambda: moe_down.run(
            chosen, p, space.h, space.h_scale, layer.down, space.order, blocks, data.weights, space.y
        )

    def _prepare_sorted(self, data: _Data) -> None:
        """The order, changed activations and h, which the first half's calls write over. The order is not the
        same in every run of the sort, so it is made once."""
        if data.sorted_ready:
            return
        path = default_path(self.problem, SORTED, SMALLEST_BLOCK, self._layer.gpu)
        launchers = self._further_launchers(path)
        self._change(launchers, data)
        self._sort(launchers, path.block, data)
        self._fill_h(data)
        data.sorted_ready = True

    def _fill_h(self, data: _Data) -> None:
        for rows in data.space.h.split(FILLED_ROWS):
            random = torch.randn(rows.shape, generator=self._layer.generator, device="cuda")
            rows.copy_(random.to(rows.dtype))
        if data.space.h_scale is not None:
            data.space.h_scale.fill_(1.0)

    def _checked_rows(self, space: Workspace) -> torch.Tensor:
        """Where the checked tokens' choices lie, by place."""
        return torch.argsort(space.order)[: self._first * self.problem.top_k]

    def _blocks(self, data: _Data, block: int) -> torch.Tensor:
        """[most, 3] int32, as kernels/moe_sort.py would write them for the order that is there."""
        if block not in data.blocks:
            counts = torch.bincount(data.ids.flatten(), minlength=self.problem.experts).tolist()
            most = moe_sort.most_blocks(moe_sort.Problem(self.problem.experts, block), data.ids.numel())
            rows, first = [], 0
            for expert, count in enumerate(counts):
                rows += [(expert, first + n, min(block, count - n)) for n in range(0, count, block)]
                first += count
            rows += [(0, 0, 0)] * (most - len(rows))
            data.blocks[block] = torch.tensor(rows, dtype=torch.int32, device="cuda")
        return data.blocks[block]

    # ---- what surrounds them

    def further(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """Changing the activations, sorting, summing."""
        chosen = path_of(parts)
        launchers = self._further_launchers(chosen)

        def run(data: _Data) -> None:
            if path not in UNSORTED:
                self._change(launchers, data)
                self._sort(launchers, chosen.block, data)
            moe_combine.run(launchers["moe_combine"], data.space.y, data.out, data.space.ready)

        if not launchers:
            return []
        for data in self._data:
            data.sorted_ready = False  # there will be another order
            data.blocks.clear()
        return [functools.partial(run, data) for data in self._data]

    def _further_launchers(self, path: Path) -> dict[str, Launcher]:
        found = requests(self.problem, self._tokens, path, self._layer.gpu)
        further = {op: request for op, request in found.items() if op not in ("moe_gate_up", "moe_down")}
        return {op: launcher(request) for op, request in further.items()}

    def _sort(self, launchers: dict[str, Launcher], block: int, data: _Data) -> None:
        space, sort = data.space, moe_sort.Problem(self.problem.experts, block)
        blocks = space.blocks[: moe_sort.most_blocks(sort, data.ids.numel())]
        both = (launchers["moe_count"], launchers["moe_place"])
        moe_sort.run(both, data.ids, space.sort, space.order, blocks, space.ready_blocks)

    def _change(self, launchers: dict[str, Launcher], data: _Data) -> None:
        space = data.space
        if space.x is None:
            return
        if space.x_scale is not None:
            quantise_fp8.run(launchers["quantise_fp8"], data.x, space.x, space.x_scale)
        else:
            moe_arrange.run(launchers["moe_arrange"], data.x, space.x)

    def whole(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """The layer as the engine runs it, over one workspace."""
        layer, shared = self._layer, self._data[0].space
        paths = {self._tokens: path_of(parts)}
        experts = Experts(self.problem, layer.gate_up, layer.down, layer.gpu, shared, paths)
        for data in self._data:
            data.sorted_ready = data.few_ready = False
            data.blocks.clear()
        return [lambda d=d: experts(d.x, d.ids, d.weights, d.out) for d in self._data]  # type: ignore[misc]

    # ---- against the oracle

    def error(self, candidate: Candidate) -> tuple[float, float]:
        """Of the choices of the first tokens."""
        data, choices = self._data[0], self._first * self.problem.top_k
        call = self._call(candidate, data)
        if candidate.part == GATE_UP:
            found, wanted = self._run_gate_up(candidate, call, data), self._layer.wanted_h[:choices]
        else:
            found = self._run_down(candidate, call, data)
            wanted = self._products(candidate.path, data)[:choices]
            if len(found) < choices:  # they are added up
                wanted = wanted.unflatten(0, (self._first, -1)).sum(1)
        rounds = candidate.path == SORTED and self.problem.format in FP8
        return relative_error(found, wanted), FP8_LIMIT if rounds else PLAIN_LIMIT

    def _products(self, path: str, data: _Data) -> torch.Tensor:
        """From the h that the half is given."""
        space = data.space
        values, scale = self._layer.stored_h(
            *((space.h_few, None) if path in UNSORTED else (space.h, space.h_scale))
        )
        meant = values.float()
        if path not in UNSORTED and space.h_scale is not None:
            meant = (meant.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
        return self._layer.products(path, meant)

    def _run_gate_up(self, candidate: Candidate, call: Call, data: _Data) -> torch.Tensor:
        """h of the first tokens' choices, by place, in float32."""
        space, choices = data.space, self._first * self.problem.top_k
        if candidate.path in UNSORTED:
            before = space.h_few.clone()
            space.h_few.fill_(torch.nan)
            call()
            found = space.h_few[:choices].float()
            space.h_few.copy_(before)
            return found
        kept = space.h.clone(), None if space.h_scale is None else space.h_scale.clone()
        space.h.view(torch.uint8).fill_(0xFF)  # not a number, whatever the type
        call()
        found = self._rows_of_h(space)
        space.h.view(torch.uint8).copy_(kept[0].view(torch.uint8))  # the second half's input
        if space.h_scale is not None and kept[1] is not None:
            space.h_scale.copy_(kept[1])
        return found

    def _run_down(self, candidate: Candidate, call: Call, data: _Data) -> torch.Tensor:
        """The first tokens' sums, or, where others add up, their choices' products, by place."""
        space, choices = data.space, self._first * self.problem.top_k
        if candidate.path in UNSORTED:
            space.h_few[:choices] = self._layer.stored_h(space.h_few, None)[0][:choices]
        else:
            self._place_h(space)
        if candidate.path in UNSORTED and not self._adds_apart(candidate):
            space.partial.fill_(torch.nan)
            data.out.zero_()  # it is added to
            call()
            return data.out[: self._first].float()
        space.y.fill_(torch.nan)
        call()
        return space.y[:choices].float()

    def _place_h(self, space: Workspace) -> None:
        """The checked rows, where the order has them."""
        p, mine = self.problem, self._checked_rows(space)
        values, scale = self._layer.stored_h(space.h, space.h_scale)
        if p.arranged:
            values = values[:, arranged_columns(p.inter, p.group).to(values.device)]
        space.h.view(torch.uint8)[mine] = values[: len(mine)].view(torch.uint8)
        if space.h_scale is not None:
            space.h_scale[mine] = scale[: len(mine)]

    def _rows_of_h(self, space: Workspace) -> torch.Tensor:
        """The checked choices' rows by place, in float32, their columns in order."""
        mine, p = self._checked_rows(space), self.problem
        values = space.h[mine].float()
        if space.h_scale is not None:
            groups = values.unflatten(1, (space.h_scale.shape[1], -1))
            values = (groups * space.h_scale[mine].unsqueeze(-1)).flatten(1)
        if p.arranged:
            values = values[:, torch.argsort(arranged_columns(p.inter, p.group)).to(values.device)]
        return values
