"""An expert layer on this GPU, for tuning: random weights, several routings, and each half on its own.

The halves are launched as layers/experts.py does it, each on inputs that stock tiles made before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from firebox.formats.layouts import arranged_columns
from firebox.hardware.base import Gpu
from firebox.kernels import (
    moe_arrange,
    moe_combine,
    moe_down,
    moe_down_few,
    moe_gate_up,
    moe_gate_up_few,
    moe_sort,
    quantise_fp8,
)
from firebox.kernels._experts import FP8, Problem
from firebox.kernels.launch import Launcher
from firebox.layers._expert_store import ExpertStore
from firebox.layers._invented import relative_error, vary
from firebox.layers.experts import FEW, SORTED, Experts, Path, Workspace, default_path, requests
from firebox.tuning.base import Candidate
from firebox.tuning.clock import Call
from firebox.tuning.estimate import GATE_UP

DOWN = "down"
CHECKED_TOKENS = 4
SMALLEST_BLOCK = 16
# Relative: bf16 and float16 sums against float32; FP8 activations (E4M3 rounds by 2.6 % RMS, twice).
PLAIN_LIMIT, FP8_LIMIT = 8e-3, 6e-2


def path_of(parts: Mapping[str, Candidate]) -> Path:
    """The parts as the engine's own path."""
    return Path(parts[GATE_UP].path, parts[GATE_UP].config, parts[DOWN].config, "tuning")


class Weighted:
    """One layer's weights."""

    def __init__(self, problem: Problem, gpu: Gpu) -> None:
        self.problem, self.gpu = problem, gpu
        device = torch.device("cuda")
        self.generator = torch.Generator(device).manual_seed(1)
        store = ExpertStore(problem, device)
        store.invent(self.generator)
        for weights in (store.gate_up, store.down):
            vary((weights.scale, weights.row_scale), self.generator)
        self.gate_up, self.down = store.gate_up, store.down
        self._launchers: dict[str, Launcher] = {}

    def launcher(self, candidate: Candidate) -> Launcher:
        """One for the same code at any number of tokens."""
        assert candidate.request is not None
        return self._launchers.setdefault(candidate.code, Launcher(candidate.request))

    def bench(self, tokens: int) -> ExpertBench:
        """For so many tokens."""
        return ExpertBench(self, tokens)


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
        calls = 16 if tokens <= 8 else 8 if tokens <= 64 else 4 if tokens <= 1024 else 2
        self._data = [self._make() for _ in range(calls)]
        self._wanted: dict[str, torch.Tensor] = {}

    def _make(self) -> _Data:
        p, generator, tokens = self.problem, self._layer.generator, self._tokens
        x = torch.randn(tokens, p.hidden, generator=generator, device="cuda").bfloat16()
        ids = torch.rand(tokens, p.experts, generator=generator, device="cuda").topk(p.top_k, dim=1).indices
        weights = torch.rand(tokens, p.top_k, generator=generator, device="cuda") + 0.1
        weights /= weights.sum(1, keepdim=True)
        out = torch.zeros_like(x)
        return _Data(x, ids.int(), weights, Workspace(p, tokens, "cuda"), out)

    # ---- the halves

    def calls(self, candidate: Candidate) -> list[Call]:
        """One launch for each of the inputs."""
        launcher = self._layer.launcher(candidate)
        return [self._call(candidate, launcher, data) for data in self._data]

    def _call(self, candidate: Candidate, launcher: Launcher, data: _Data) -> Call:
        if candidate.path == FEW:
            return self._few(candidate, launcher, data)
        assert candidate.path == SORTED, f"no bench for {candidate.path}"
        return self._sorted(candidate, launcher, data)

    def _few(self, candidate: Candidate, launcher: Launcher, data: _Data) -> Call:
        p, space, layer = self.problem, data.space, self._layer
        if candidate.part == GATE_UP:
            return lambda: moe_gate_up_few.run(
                launcher, p, data.x, layer.gate_up, data.ids, space.h_few, space.table
            )
        self._prepare_few(data)
        return lambda: moe_down_few.run(
            launcher, p, space.h_few, layer.down, data.ids, data.weights, space.table, space.partial,
            data.out, space.counters,
        )  # fmt: skip

    def _prepare_few(self, data: _Data) -> None:
        """h and the tables, of stock tiles."""
        if data.few_ready:
            return
        p, layer, tokens = self.problem, self._layer, self._tokens
        path = default_path(p, FEW, tokens, layer.gpu)
        launcher = Launcher(requests(p, tokens, path, layer.gpu)["moe_gate_up"])
        moe_gate_up_few.run(launcher, p, data.x, layer.gate_up, data.ids, data.space.h_few, data.space.table)
        data.few_ready = True

    def _sorted(self, candidate: Candidate, launcher: Launcher, data: _Data) -> Call:
        p, space, layer = self.problem, data.space, self._layer
        self._prepare_sorted(data)
        blocks = self._blocks(data, candidate.config.tokens)
        if candidate.part == GATE_UP:
            x = data.x if space.x is None else space.x
            return lambda: moe_gate_up.run(
                launcher, p, x, space.x_scale, layer.gate_up, space.order, blocks, space.h, space.h_scale
            )
        return lambda: moe_down.run(
            launcher, p, space.h, space.h_scale, layer.down, space.order, blocks, data.weights, space.y
        )

    def _prepare_sorted(self, data: _Data) -> None:
        """The order, changed activations and h, of stock tiles. The order is not the same in every run of
        the sort, so it is made once."""
        if data.sorted_ready:
            return
        p, space, layer = self.problem, data.space, self._layer
        path = default_path(p, SORTED, SMALLEST_BLOCK, layer.gpu)
        launchers = self._further_launchers(path)
        self._sort(launchers, path.block, data)
        self._change(launchers, data)
        request = requests(p, self._tokens, path, layer.gpu)["moe_gate_up"]
        x = data.x if space.x is None else space.x
        blocks = self._blocks(data, path.block)
        moe_gate_up.run(
            Launcher(request), p, x, space.x_scale, layer.gate_up, space.order, blocks, space.h, space.h_scale
        )
        data.sorted_ready = True

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
        """Sorting, changing the activations, summing."""
        if path == FEW:
            return []
        chosen = path_of(parts)
        launchers = self._further_launchers(chosen)

        def run(data: _Data) -> None:
            self._sort(launchers, chosen.block, data)
            self._change(launchers, data)
            moe_combine.run(launchers["moe_combine"], data.space.y, data.out)

        for data in self._data:
            data.sorted_ready = False  # there will be another order
            data.blocks.clear()
        return [functools.partial(run, data) for data in self._data]

    def _further_launchers(self, path: Path) -> dict[str, Launcher]:
        found = requests(self.problem, self._tokens, path, self._layer.gpu)
        return {
            op: Launcher(request) for op, request in found.items() if op not in ("moe_gate_up", "moe_down")
        }

    def _sort(self, launchers: dict[str, Launcher], block: int, data: _Data) -> None:
        space, sort = data.space, moe_sort.Problem(self.problem.experts, block)
        blocks = space.blocks[: moe_sort.most_blocks(sort, data.ids.numel())]
        both = (launchers["moe_count"], launchers["moe_place"])
        moe_sort.run(both, data.ids, space.sort, space.order, blocks)

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

    # ---- the oracle

    def error(self, candidate: Candidate) -> tuple[float, float]:
        """Of the choices of the first tokens."""
        data = self._data[0]
        call = self._call(candidate, self._layer.launcher(candidate), data)
        first = min(self._tokens, CHECKED_TOKENS)
        if candidate.part == GATE_UP:
            found = self._run_gate_up(candidate, call, data, first)
            wanted = self._reference(GATE_UP, lambda: self._h(data, first))
        else:
            found = self._run_down(candidate, call, data, first)
            wanted = self._reference(f"{candidate.path} down", lambda: self._y(candidate.path, data, first))
        rounds = candidate.path == SORTED and self.problem.format in FP8
        return relative_error(found, wanted), FP8_LIMIT if rounds else PLAIN_LIMIT

    def _reference(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._wanted:
            self._wanted[name] = make()
        return self._wanted[name]

    def _run_gate_up(self, candidate: Candidate, call: Call, data: _Data, first: int) -> torch.Tensor:
        """h of the first tokens' choices, by place, in float32."""
        space, choices = data.space, first * self.problem.top_k
        if candidate.path == FEW:
            before = space.h_few.clone()
            space.h_few.fill_(torch.nan)
            call()
            found = space.h_few[:choices].float()
            space.h_few.copy_(before)
            return found
        kept = space.h.clone(), None if space.h_scale is None else space.h_scale.clone()
        space.h.view(torch.uint8).fill_(0xFF)  # not a number, whatever the type
        call()
        found = self._rows_of_h(space, choices)
        space.h.view(torch.uint8).copy_(kept[0].view(torch.uint8))  # of stock tiles: the second half's input
        if space.h_scale is not None and kept[1] is not None:
            space.h_scale.copy_(kept[1])
        return found

    def _run_down(self, candidate: Candidate, call: Call, data: _Data, first: int) -> torch.Tensor:
        """The first tokens' sums (few), or their choices' products, by place (sorted)."""
        space = data.space
        if candidate.path == FEW:
            space.partial.fill_(torch.nan)
            data.out.zero_()  # it is added to
            call()
            return data.out[:first].float()
        space.y.fill_(torch.nan)
        call()
        return space.y[: first * self.problem.top_k].float()

    def _rows_of_h(self, space: Workspace, choices: int) -> torch.Tensor:
        """The first choices' rows by place, in float32, their columns in order."""
        mine, p = torch.argsort(space.order)[:choices], self.problem
        values = space.h[mine].float()
        if space.h_scale is not None:
            groups = values.unflatten(1, (space.h_scale.shape[1], -1))
            values = (groups * space.h_scale[mine].unsqueeze(-1)).flatten(1)
        if p.arranged:
            values = values[:, torch.argsort(arranged_columns(p.inter, p.group)).to(values.device)]
        return values

    def _h(self, data: _Data, first: int) -> torch.Tensor:
        return moe_gate_up_few.reference(self.problem, data.x[:first], self._layer.gate_up, data.ids[:first])

    def _y(self, path: str, data: _Data, first: int) -> torch.Tensor:
        """From the h that the half is given."""
        p, space, layer = self.problem, data.space, self._layer
        choices, ids, weights = first * p.top_k, data.ids[:first], data.weights[:first]
        if path == FEW:
            h = space.h_few[:choices].float()
            return moe_down_few.reference(p, h, layer.down, ids, weights)
        h = self._rows_of_h(space, choices)
        order = torch.arange(choices, dtype=torch.int32, device="cuda")
        return moe_down.reference(p, h, layer.down, ids, order, weights)
