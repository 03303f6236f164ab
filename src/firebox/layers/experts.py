"""The routed experts of a mixture-of-experts layer on an NVIDIA GPU: from hidden states and the router's
choices to the summed output, over the kernels of few tokens and those of many (expert_paths.py)."""

from __future__ import annotations

import functools

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import (
    _block_scaled,
    moe_arrange,
    moe_combine,
    moe_down,
    moe_down_few,
    moe_down_one,
    moe_down_scaled,
    moe_gate_up,
    moe_gate_up_few,
    moe_gate_up_one,
    moe_gate_up_scaled,
    moe_sort,
    quantise_fp8,
    quantise_groups,
)
from firebox.kernels._experts import NIBBLES, Problem, Weights, operand
from firebox.kernels.launch import Launcher
from firebox.layers.expert_paths import FEW, ONE, SCALED, SORTED, Path, like, requests, settled_path

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Workspace:
    """The memory between the launches for up to `max_tokens`; layers that run one after the other share
    it."""

    def __init__(self, problem: Problem, max_tokens: int, device: torch.device | str) -> None:
        p, few = problem, min(max_tokens, moe_gate_up_few.MAX_TOKENS)
        native, choices = moe_gate_up.quantised(p), max_tokens * p.top_k

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        group = moe_gate_up.x_group(p) or p.hidden
        self.h_few = empty(few * p.top_k, p.inter, dtype=DTYPES[operand(p)])
        added_up = min(few, moe_gate_up_few.COLUMNS_UP_TO) * p.top_k
        self.partial = empty(added_up, p.hidden, dtype=torch.float32)
        self.table = empty(max(few * p.top_k, p.experts), 1 + moe_gate_up_few.padded(few), dtype=torch.int32)
        self.counters = torch.zeros(p.hidden // 16, dtype=torch.int32, device=device)
        self.ready = torch.zeros(p.experts, dtype=torch.int32, device=device)
        inner = torch.float8_e4m3fn if native else DTYPES[p.dtype]
        self.h = empty(choices, p.inter, dtype=inner)
        self.y = empty(choices, p.hidden, dtype=DTYPES[p.dtype])
        self.order = empty(choices, dtype=torch.int32)
        self.blocks = empty(min(choices, choices // 16 + p.experts), 3, dtype=torch.int32)
        self.ready_blocks = empty(len(self.blocks), dtype=torch.int32)
        self.sort = moe_sort.scratch(moe_sort.Problem(p.experts, 16), device)
        self.x = self.x_scale = self.h_scale = None
        self.rounded_x = self.rounded_h = None
        if p.format in NIBBLES:
            kind = _block_scaled.kind_of(p)
            x, inner_h = (quantise_groups.Problem(columns, kind) for columns in (p.hidden, p.inter))
            self.rounded_x = quantise_groups.empty(x, max_tokens, device)
            self.rounded_h = quantise_groups.empty(inner_h, choices, device)
        if (native and not p.normed) or p.arranged:
            self.x = empty(max_tokens, p.hidden, dtype=inner)
        if native and not p.normed:
            self.x_scale = empty(max_tokens, p.hidden // group, dtype=torch.float32)
        if native:
            self.h_scale = empty(choices, p.inter // moe_gate_up.inner_group(p), dtype=torch.float32)


class Experts:
    """The routed experts of one layer; see above. `paths`: tokens → path, instead of what was measured."""

    def __init__(
        self,
        problem: Problem,
        gate_up: Weights,
        down: Weights,
        gpu: Gpu,
        workspace: Workspace,
        paths: dict[int, Path] | None = None,
    ) -> None:
        self.problem, self.gpu, self.workspace = problem, gpu, workspace
        self.gate_up, self.down = gate_up, down
        self._paths = paths or {}

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        out: torch.Tensor,
        codes: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`x` [tokens, hidden], `expert_ids` [tokens, top_k] int32, `routing_weights` the same float32 →
        `out` [tokens, hidden]. `codes`: x as FP8 and its scales, if the problem is `normed` and so many
        tokens' path rounds."""
        tokens = x.shape[0]
        if tokens == 0:
            return
        path, launchers = self._ready(tokens)
        choices = (expert_ids, routing_weights, out)
        if path.name == SORTED:
            self._sorted(path, launchers, *self._prepared(launchers, x, codes), *choices)
        else:
            run = {ONE: self._one, FEW: self._few, SCALED: self._scaled}[path.name]
            run(path, launchers, x, *choices)

    def _prepared(
        self,
        launchers: dict[str, Launcher],
        x: torch.Tensor,
        codes: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` as the kernels of many tokens read it, and its scales."""
        p, space = self.problem, self.workspace
        if moe_gate_up.quantised(p):
            assert (codes is not None) == p.normed, f"codes of a norm, or none: {p}"
            if codes is not None:
                return codes
        if space.x is None:
            return x, None
        changed = space.x[: x.shape[0]]
        if space.x_scale is not None:
            quantise_fp8.run(launchers["quantise_fp8"], x, changed, space.x_scale)
        else:
            moe_arrange.run(launchers["moe_arrange"], x, changed)
        return changed, space.x_scale

    def _ready(self, tokens: int) -> tuple[Path, dict[str, Launcher]]:
        path = self._paths.get(tokens) or settled_path(self.problem, tokens, self.gpu)
        return path, _launchers(self.problem, like(self.problem, tokens, path), path, self.gpu)

    def _one(
        self,
        path: Path,
        launchers: dict[str, Launcher],
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        p, h = self.problem, self.workspace.h_few
        moe_gate_up_one.run(launchers["moe_gate_up"], p, x, self.gate_up, expert_ids, h)
        moe_down_one.run(launchers["moe_down"], p, h, self.down, expert_ids, routing_weights, out)

    def _few(
        self,
        path: Path,
        launchers: dict[str, Launcher],
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        p, space = self.problem, self.workspace
        first = (launchers["moe_gate_up"], p, x, self.gate_up, expert_ids, space.h_few, space.table)
        half = (launchers["moe_down"], p, space.h_few, self.down, expert_ids, routing_weights, space.table)
        if not moe_down_few.adds_apart(path.down, len(x)):
            moe_gate_up_few.run(*first)
            moe_down_few.run(*half, space.partial, out, space.counters)
            return
        try:
            moe_gate_up_few.run(*first, space.ready)
            moe_down_few.run(*half, space.y, ready=space.ready, first_half=path.gate_up)
            moe_combine.run(launchers["moe_combine"], space.y, out, space.ready)
        except BaseException:
            space.ready.zero_()  # what was counted is of this layer
            raise

    def _sorted(
        self,
        path: Path,
        launchers: dict[str, Launcher],
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        p, space = self.problem, self.workspace
        blocks = self._sort(path, launchers, expert_ids)
        moe_gate_up.run(
            launchers["moe_gate_up"],
            p,
            x,
            x_scale,
            self.gate_up,
            space.order,
            blocks,
            space.h,
            space.h_scale,
            space.ready_blocks,
        )
        moe_down.run(
            launchers["moe_down"],
            p,
            space.h,
            space.h_scale,
            self.down,
            space.order,
            blocks,
            routing_weights,
            space.y,
            space.ready_blocks,
            path.gate_up,
        )
        moe_combine.run(launchers["moe_combine"], space.y, out)

    def _scaled(
        self,
        path: Path,
        launchers: dict[str, Launcher],
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        p, space, choices = self.problem, self.workspace, expert_ids.numel()
        blocks = self._sort(path, launchers, expert_ids)
        x_in, h_in = space.rounded_x, space.rounded_h
        assert x_in is not None and h_in is not None, f"{p.format} has no block-scaled product"
        quantise_groups.run(launchers["quantise_x"], x, x_in)
        moe_gate_up_scaled.run(launchers["moe_gate_up"], p, x_in, self.gate_up, space.order, blocks, space.h)
        quantise_groups.run(launchers["quantise_h"], space.h[:choices], h_in)
        moe_down_scaled.run(
            launchers["moe_down"], p, h_in, self.down, space.order, blocks, routing_weights, space.y
        )
        moe_combine.run(launchers["moe_combine"], space.y, out)

    def _sort(self, path: Path, launchers: dict[str, Launcher], expert_ids: torch.Tensor) -> torch.Tensor:
        """Fills the workspace's order; the blocks."""
        space, sort = self.workspace, moe_sort.Problem(self.problem.experts, path.block)
        blocks = space.blocks[: moe_sort.most_blocks(sort, expert_ids.numel())]
        both = (launchers["moe_count"], launchers["moe_place"])
        moe_sort.run(both, expert_ids, space.sort, space.order, blocks, space.ready_blocks)
        return blocks


@functools.cache
def _launchers(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> dict[str, Launcher]:
    return {op: Launcher(request) for op, request in requests(problem, tokens, path, gpu).items()}
