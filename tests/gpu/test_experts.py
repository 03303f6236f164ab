"""The expert layer on a real GPU: every format, every number of tokens that finds another path, against
float32 on dequantised weights. Needs torch, Triton and pytest, nothing of the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import (
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
from firebox.kernels._block_scaled import GROUPS, KINDS, Rounded
from firebox.kernels._experts import FORMATS, FOUR_BIT, FP8, INT4_ZERO, INTEGERS, MXFP4, NIBBLES, Problem
from firebox.kernels.launch import Launcher
from firebox.layers import expert_paths
from firebox.layers import experts as expert_layers
from firebox.layers.expert_paths import FEW, ONE, SCALED, SORTED, Path, default_path, path_of, requests
from firebox.layers.experts import Experts, Workspace
from tests.support.experts import random_routing, random_weights, relative_error

pytestmark = pytest.mark.gpu

MAX_TOKENS = 300
# Rounding: hidden states are exact, h is rounded to bf16 (2⁻⁹ at most, 0.0017 RMS) or float16, the output to
# bf16 (0.0017). A 4-bit weight times its scale is rounded to bf16 once more in either half (integers, nvfp4;
# 0.0053 was seen with few columns). FP8 activations: two roundings to E4M3, each 0.026 RMS, the second of
# which SwiGLU's product doubles at most in part.
FEW_LIMIT = {
    **dict.fromkeys(FORMATS, 4e-3),
    **dict.fromkeys((*INTEGERS, "nvfp4", "nvfp4_nibbles"), 6e-3),
}
SORTED_LIMIT = FEW_LIMIT | dict.fromkeys(FP8, 6e-2)
# Block-scaled: the same two roundings, to the kind's codes (kernels/quantise_groups.py: 0.095 and 0.027 RMS),
# of which SwiGLU's product meets the first twice: 0.16 and 0.044 in float32, with the reference's rounding.
SCALED_LIMIT = {"nvfp4_nibbles": 0.2, "mxfp4_nibbles": 0.06}
LIMITS = {ONE: FEW_LIMIT, FEW: FEW_LIMIT, SORTED: SORTED_LIMIT, SCALED: SCALED_LIMIT}


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


def problem(format: str, **changes: object) -> Problem:
    gpt_oss = {"biases": True, "activation": "clamped_swiglu"} if format in MXFP4 else {}
    sizes = {"hidden": 512, "inter": 256, "experts": 24, "top_k": 3} | gpt_oss | changes
    return Problem(format=format, **sizes)


class Layer:
    """An expert layer with random weights, its inputs and its oracle."""

    def __init__(self, problem: Problem, gpu: Gpu, max_tokens: int = MAX_TOKENS, **paths: object) -> None:
        self.problem, self.generator = problem, torch.Generator("cuda").manual_seed(0)
        self.gate_up = random_weights(problem, 2 * problem.inter, problem.hidden, self.generator, "cuda")
        self.down = random_weights(problem, problem.hidden, problem.inter, self.generator, "cuda")
        self.workspace = Workspace(problem, max_tokens, "cuda")
        self.gpu = gpu

    def error(self, tokens: int, path: Path | None = None, expert_ids: torch.Tensor | None = None) -> float:
        """Of one run with fresh inputs, a NaN-filled workspace and guarded output rows."""
        p, space = self.problem, self.workspace
        for scratch in (space.h_few, space.partial, space.y, space.x_scale, space.h_scale):
            if scratch is not None:
                scratch.fill_(float("nan"))
        for rounded in (space.rounded_x, space.rounded_h):
            for part in () if rounded is None else vars(rounded).values():
                if part is not None:
                    part.view(torch.uint8).fill_(0xFF)  # NaN, or the highest code
        experts = Experts(p, self.gate_up, self.down, self.gpu, space, {tokens: path} if path else None)
        x = torch.randn(tokens, p.hidden, generator=self.generator, device="cuda").bfloat16()
        ids, weights = random_routing(p, tokens, self.generator, "cuda")
        if expert_ids is not None:
            ids = expert_ids
        out = torch.full((tokens + 2, p.hidden), float("nan"), dtype=torch.bfloat16, device="cuda")
        out[tokens:] = 7.0
        experts(x, ids, weights, out[:tokens])
        assert (out[tokens:] == 7.0).all(), "rows behind the output were written"
        for counters in (space.counters, space.ready, space.sort.counts):
            assert not counters.any(), "counters are not zero again"
        h = moe_gate_up_few.reference(p, x, self.gate_up, ids)
        return relative_error(out[:tokens], moe_down_few.reference(p, h, self.down, ids, weights))


LAYOUTS = [*((name, False) for name in FORMATS), *((name, True) for name in FOUR_BIT)]  # and in panels


@pytest.mark.parametrize(("format", "panels"), LAYOUTS)
def test_every_number_of_tokens_from_1_to_300(format: str, panels: bool, gpu: Gpu) -> None:
    layer = Layer(problem(format, panels=panels), gpu)
    for tokens in range(1, MAX_TOKENS + 1):
        found = layer.error(tokens)
        path = path_of(layer.problem, tokens, gpu).name
        assert found < LIMITS[path][format], (tokens, path, found)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33, 64])
def test_few_and_sorted_agree_with_the_oracle_on_both_sides(format: str, tokens: int, gpu: Gpu) -> None:
    layer = Layer(problem(format), gpu)
    p = layer.problem
    few = Path(FEW, moe_gate_up_few.default(p, tokens, gpu), moe_down_few.default(p, tokens, gpu), "test")
    assert layer.error(tokens, few) < FEW_LIMIT[format]
    for block in (16, 32, 64):
        many = Path(SORTED, moe_gate_up.default(p, block, gpu), moe_down.default(p, block, gpu), "test")
        assert layer.error(tokens, many) < SORTED_LIMIT[format]


@pytest.mark.parametrize(("format", "panels"), LAYOUTS)
@pytest.mark.parametrize(
    ("hidden", "inter", "top_k", "every"), [(512, 256, 3, 2), (2048, 768, 8, 4), (640, 384, 9, 5)]
)
def test_one_token_by_tiles_of_whole_rows(
    hidden: int, inter: int, top_k: int, every: int, format: str, panels: bool, gpu: Gpu
) -> None:
    """By every second, fourth or fifth tile of each half: compiling them is what takes time."""
    layer = Layer(problem(format, hidden=hidden, inter=inter, top_k=top_k, panels=panels), gpu, 1)
    spaces = [list(module.search_space(layer.problem, 1, gpu)) for module in (moe_gate_up_one, moe_down_one)]
    for i in range(0, max(map(len, spaces)), every):
        path = Path(ONE, *(tiles[i % len(tiles)] for tiles in spaces), "test")
        assert layer.error(1, path) < FEW_LIMIT[format], path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [5, 16, 64, 130])
def test_all_tokens_to_the_same_experts(format: str, tokens: int, gpu: Gpu) -> None:
    layer = Layer(problem(format), gpu)
    same = torch.tensor([[23, 0, 11]], dtype=torch.int32, device="cuda").expand(tokens, 3).contiguous()
    limit = LIMITS[path_of(layer.problem, tokens, gpu).name][format]
    assert layer.error(tokens, expert_ids=same) < limit


@pytest.mark.parametrize(
    ("format", "panels"), [*((name, False) for name in FORMATS), *((name, True) for name in FOUR_BIT)]
)
@pytest.mark.parametrize("tokens", [7, 9, 30, 128])
def test_passes_side_by_side_and_tiles_in_a_row(format: str, panels: bool, tokens: int, gpu: Gpu) -> None:
    """The last expert is every token's, so its later passes have programs of their own; every 97th tile
    of the space, and of those with several tiles a program."""
    layer = Layer(problem(format, hidden=640, inter=384, experts=40, panels=panels), gpu, 128)
    p, generator = layer.problem, torch.Generator("cuda").manual_seed(1)
    ids, _ = random_routing(replace(p, experts=39), tokens, generator, "cuda")
    ids[:, -1] = 39
    ups, downs = (list(m.search_space(p, tokens, gpu)) for m in (moe_gate_up_few, moe_down_few))
    some = downs[::97] + [tile for tile in downs if tile.tiles > 1][::97]
    assert tokens <= moe_gate_up_few.COLUMNS_UP_TO or any(tile.tiles > 1 for tile in some)
    for i, down in enumerate(some):
        path = Path(FEW, ups[97 * i % len(ups)], down, "test")
        assert layer.error(tokens, path, ids) < FEW_LIMIT[format], path


@pytest.mark.parametrize("tokens", [5, 16, 64])
def test_the_second_half_reads_no_expert_before_the_first_is_done_with_it(tokens: int, gpu: Gpu) -> None:
    """What it would read too early is no number. The products come out as they do one launch at a time."""
    layer = Layer(problem("fp8_block", hidden=4096, inter=512, experts=128, top_k=8), gpu, tokens)
    p, space = layer.problem, layer.workspace
    down = replace(moe_down_few.default(p, tokens, gpu), apart=True)
    path = Path(FEW, moe_gate_up_few.default(p, tokens, gpu), down, "test")
    experts = Experts(p, layer.gate_up, layer.down, gpu, space, {tokens: path})
    assert "ready" in requests(p, tokens, path, gpu)["moe_down"].signature
    x = torch.randn(tokens, p.hidden, generator=layer.generator, device="cuda").bfloat16()
    ids, weights = random_routing(p, tokens, layer.generator, "cuda")
    first = Launcher(moe_gate_up_few.request(p, tokens, path.gate_up, gpu))
    moe_gate_up_few.run(first, p, x, layer.gate_up, ids, space.h_few, space.table)
    second = Launcher(moe_down_few.request(p, tokens, down, gpu))
    moe_down_few.run(second, p, space.h_few, layer.down, ids, weights, space.table, space.y)
    wanted, out = space.y.clone(), torch.empty_like(x)
    for _ in range(200):
        space.h_few.fill_(float("nan"))
        experts(x, ids, weights, out)
        assert torch.equal(space.y, wanted)


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "mxfp4"])
def test_the_second_half_reads_no_block_before_the_first_is_done_with_it(
    format: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of many tokens, sorted into small blocks."""
    tokens = 300
    layer = Layer(problem(format, hidden=4096, inter=512, experts=128, top_k=8), gpu, tokens)
    p, space = layer.problem, layer.workspace
    path = default_path(p, SORTED, 16, gpu)
    experts = Experts(p, layer.gate_up, layer.down, gpu, space, {tokens: path})
    x = torch.randn(tokens, p.hidden, generator=layer.generator, device="cuda").bfloat16()
    ids, weights = random_routing(p, tokens, layer.generator, "cuda")
    out = torch.empty_like(x)

    def counted() -> bool:
        expert_layers._launchers.cache_clear()
        return "ready" in requests(p, tokens, path, gpu)["moe_down"].signature

    with monkeypatch.context() as patched:
        patched.setattr(expert_paths, "COUNTED_UP_TO", 0)
        assert not counted()
        experts(x, ids, weights, out)
    wanted = space.y.clone()
    assert counted()
    for _ in range(200):
        space.h.view(torch.uint8).fill_(0xFF)  # not a number, whatever the type
        if space.h_scale is not None:
            space.h_scale.fill_(float("nan"))
        experts(x, ids, weights, out)
        assert torch.equal(space.y, wanted)


def test_a_layer_that_fails_leaves_no_count_behind(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(problem("bf16"), gpu, 16)
    p, space = layer.problem, layer.workspace
    path = default_path(p, FEW, 16, gpu)

    def fail(*_: object, **__: object) -> None:
        torch.cuda.synchronize()
        assert space.ready.any(), "nothing was counted: the test shows nothing"
        raise RuntimeError("no second half")

    with monkeypatch.context() as patched:
        patched.setattr(moe_down_few, "run", fail)
        with pytest.raises(RuntimeError, match="no second half"):
            layer.error(16, path)
    assert layer.error(16, path) < FEW_LIMIT["bf16"]


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("tokens", [130, 1000])
def test_sums_in_units_of_the_step(format: str, tokens: int, gpu: Gpu) -> None:
    """Tiles of 128 numbers a thread; one that does not fit this GPU is no fault. Blocks' scales differ by a
    thousand from one step to the next, and some are zero."""
    layer = Layer(problem(format, hidden=1024, inter=512, experts=24), gpu, tokens)
    p, scale = layer.problem, layer.gate_up.scale
    ups = list(moe_gate_up.search_space(p, 128, gpu))
    downs = [t for t in moe_down.search_space(p, 128, gpu) if moe_gate_up.rescaled(t, every_step=True)]
    assert downs
    if scale is not None:
        ups = [tile for tile in ups if moe_gate_up.rescaled(tile, every_step=True)]
        scale[..., ::2] *= 1e-3
        scale[3:5, 0] = 0.0
    some, right = downs[::2], 0
    for i, down in enumerate(some):
        path = Path(SORTED, ups[i % len(ups)], down, "test")
        try:
            found = layer.error(tokens, path)
        except triton.runtime.errors.OutOfResources:
            continue
        assert found < SORTED_LIMIT[format], path
        right += 1
    assert right > len(some) // 2


def test_sorted_tiles_with_fewer_registers(gpu: Gpu) -> None:
    """Than the assembler would take, of gpt-oss's widths."""
    layer = Layer(problem("mxfp4", hidden=2880, inter=1472, experts=12, panels=True), gpu, 300)
    p = layer.problem
    ups, downs = (
        [tile for tile in half.search_space(p, 64, gpu) if tile.registers and tile.depth == 128]
        for half in (moe_gate_up, moe_down)
    )
    assert {tile.warps for tile in (*ups, *downs)} == {4, 8}
    for up, down in zip(ups, downs, strict=False):
        for tokens in (70, 300):
            found = layer.error(tokens, Path(SORTED, up, down, "test"))
            assert found < SORTED_LIMIT["mxfp4"], (tokens, up, down, found)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4_group"])
def test_products_of_a_busy_gpu(format: str, gpu: Gpu) -> None:
    """gpt-oss's widths, and three programs a multiprocessor that multiply beside each other: where nothing
    waits for a product, its operand is overwritten before it is read (kernels/_wgmma.py)."""
    layer = Layer(problem(format, hidden=2880, inter=2880, experts=16, top_k=4, panels=True), gpu, 1024)
    in_use = path_of(layer.problem, 1024, gpu)
    tile = moe_gate_up.Config(rows=128, tokens=64, depth=128, warps=4, stages=3, tma=False)
    wide = replace(tile, rows=256, tokens=128, warps=16, registers=128)
    for each in (in_use, Path(SORTED, tile, tile, "test"), Path(SORTED, wide, wide, "test")):
        for _ in range(4):
            assert layer.error(1024, each) < SORTED_LIMIT[format], each


@pytest.mark.parametrize("format", FORMATS)
def test_odd_widths(format: str, gpu: Gpu) -> None:
    """Widths that leave a remainder behind the pipeline's steps: gpt-oss's 2,880 in small, GLM's 384, 192."""
    unit = 128 if format == "fp8_block" else 64
    for hidden, inter in ((5 * unit, 3 * unit), (unit * 3, unit)):
        layer = Layer(problem(format, hidden=hidden, inter=inter), gpu)
        for tokens in (1, 6, 20, 200):
            path = path_of(layer.problem, tokens, gpu).name
            assert layer.error(tokens) < LIMITS[path][format], (
                hidden,
                inter,
                tokens,
            )


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", *INTEGERS])
@pytest.mark.parametrize(("hidden", "inter"), [(512, 256), (320, 192), (2880, 2880), (5120, 384)])
def test_weights_in_panels(format: str, hidden: int, inter: int, gpu: Gpu) -> None:
    """One panel a step, two and half a one; what is left behind the last step; with and without TMA."""
    layer = Layer(problem(format, hidden=hidden, inter=inter, panels=True), gpu)
    p = layer.problem
    for tokens in (1, 2, 8, 9, 16, 33, 64):
        gate_up, down = moe_gate_up_few.default(p, tokens, gpu), moe_down_few.default(p, tokens, gpu)
        for depth, tma in ((gate_up.depth, False), (128, True), (64, True), (64, False)):
            tiles = [replace(tile, depth=min(depth, tile.depth), tma=tma) for tile in (gate_up, down)]
            for i, tile in enumerate(tiles):  # groups as columns are of whole units
                if tile.tokens < moe_gate_up_few.COLUMNS_UP_TO:
                    tiles[i] = replace(tile, depth=max(tile.depth, p.unit))
            found = layer.error(tokens, Path(FEW, *tiles, "test"))
            assert found < FEW_LIMIT[format], (tokens, depth, tma, found)
    for tokens, block in ((20, 16), (200, 32), (300, 64)):
        for tma in (False, True):
            tiles = (replace(half.default(p, block, gpu), tma=tma) for half in (moe_gate_up, moe_down))
            found = layer.error(tokens, Path(SORTED, *tiles, "test"))
            assert found < SORTED_LIMIT[format], (tokens, block, tma, found)


@pytest.mark.parametrize(
    ("format", "panels"),
    [
        *((format, False) for format in FOUR_BIT),
        *((format, True) for format in FOUR_BIT if format not in NIBBLES),
    ],
)
def test_groups_as_columns_of_the_product(format: str, panels: bool, gpu: Gpu) -> None:
    """Tiles of fewer than 8 tokens: one that looks for them, lists of several passes, one token's whole
    width."""
    layer = Layer(problem(format, panels=panels), gpu)
    p = layer.problem
    for tokens in (1, 2, 7, 9, 40):
        for width, depth in ((1, 256), (2, 128), (4, 128)):
            gate_up = replace(moe_gate_up_few.default(p, tokens, gpu), tokens=width, depth=depth)
            down = replace(moe_down_few.default(p, tokens, gpu), tokens=width, depth=depth)
            found = layer.error(tokens, Path(FEW, gate_up, down, "test"))
            assert found < FEW_LIMIT[format], (tokens, width, depth, found)
    whole = replace(moe_down_few.default(p, 1, gpu), tokens=1, depth=0, stages=1)
    assert layer.error(1, Path(FEW, moe_gate_up_few.default(p, 1, gpu), whole, "test")) < FEW_LIMIT[format]


@pytest.mark.parametrize("format", ["bf16", "fp8_channel", "mxfp4"])
def test_many_experts_and_choices(format: str, gpu: Gpu) -> None:
    layer = Layer(problem(format, experts=512, top_k=16, hidden=256, inter=128), gpu)
    for tokens in (1, 16, 64, 300):
        path = path_of(layer.problem, tokens, gpu).name
        assert layer.error(tokens) < LIMITS[path][format], tokens


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("format", INTEGERS)
def test_integers_in_larger_groups(format: str, group: int, gpu: Gpu) -> None:
    for hidden, inter in ((512, 256), (384, 128), (640, 384)):
        layer = Layer(problem(format, int4_columns=group, hidden=hidden, inter=inter), gpu)
        for tokens in (1, 2, 8, 9, 16, 33, 64, 65, 200, 300):
            assert layer.error(tokens) < SORTED_LIMIT[format], (hidden, inter, tokens)


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize(("hidden", "inter"), [(512, 256), (320, 192), (192, 64), (2880, 2880), (5120, 384)])
def test_the_block_scaled_path(format: str, hidden: int, inter: int, gpu: Gpu) -> None:
    """All of it, at any number of tokens; on a GPU without the instruction it is emulated."""
    layer = Layer(problem(format, hidden=hidden, inter=inter), gpu)
    for tile in (16, 32, 64):
        path = default_path(layer.problem, SCALED, tile, gpu)
        for tokens in (1, 2, 31, 33, 100, 300):
            found = layer.error(tokens, path)
            assert found < SCALED_LIMIT[format], (tile, tokens, found)


@pytest.mark.parametrize(("format", "kind"), [(format, kind) for format in KINDS for kind in KINDS[format]])
@pytest.mark.parametrize(("hidden", "inter"), [(512, 256), (320, 192), (2880, 2880)])
def test_block_scaled_products_of_what_was_rounded(
    format: str, kind: str, hidden: int, inter: int, gpu: Gpu
) -> None:
    """Against the oracle on the very numbers that are multiplied, so that only the output's rounding is left;
    on a GPU without the instruction Triton may multiply in bf16, which holds all of them exactly."""
    p = problem(format, hidden=hidden, inter=inter)
    layer, tokens, block = Layer(p, gpu), 77, 32
    x = torch.randn(tokens, hidden, generator=layer.generator, device="cuda").bfloat16()
    ids, weights = random_routing(p, tokens, layer.generator, "cuda")
    sort = moe_sort.Problem(p.experts, block)
    order = torch.empty(ids.numel(), dtype=torch.int32, device="cuda")
    blocks = torch.empty(moe_sort.most_blocks(sort, ids.numel()), 3, dtype=torch.int32, device="cuda")
    launchers = tuple(Launcher(request) for request in moe_sort.requests(sort, gpu))
    moe_sort.run(launchers, ids, moe_sort.scratch(sort, "cuda"), order, blocks)
    given, meant = _rounded(kind, x, gpu)
    h = torch.full((ids.numel(), inter), float("nan"), dtype=torch.bfloat16, device="cuda")
    request = moe_gate_up_scaled.request(p, moe_gate_up_scaled.default(p, block, gpu), gpu, kind=kind)
    moe_gate_up_scaled.run(Launcher(request), p, given, layer.gate_up, order, blocks, h)
    wanted = moe_gate_up_scaled.reference(p, meant, layer.gate_up, ids, order)
    assert relative_error(h, wanted) < 3e-3
    given, meant = _rounded(kind, h, gpu)
    y = torch.full((ids.numel(), hidden), float("nan"), dtype=torch.bfloat16, device="cuda")
    request = moe_down_scaled.request(p, moe_down_scaled.default(p, block, gpu), gpu, kind=kind)
    moe_down_scaled.run(Launcher(request), p, given, layer.down, order, blocks, weights, y)
    wanted = moe_down_scaled.reference(p, meant, layer.down, ids, order, weights)
    assert relative_error(y, wanted) < 3e-3


def _rounded(kind: str, x: torch.Tensor, gpu: Gpu) -> tuple[Rounded, torch.Tensor]:
    p = quantise_groups.Problem(x.shape[1], kind)
    room = quantise_groups.empty(p, x.shape[0] + 1, "cuda")
    parts = [part for part in (room.q, room.scales, room.row_scale) if part is not None]
    for part in parts:
        part.view(torch.uint8).fill_(0xEE)
    to = Rounded(*(None if part is None else part[:-1] for part in (room.q, room.scales, room.row_scale)))
    quantise_groups.run(Launcher(quantise_groups.request(p, gpu)), x, to)
    assert all((part[-1].view(-1).view(torch.uint8) == 0xEE).all() for part in parts), "a row too many"
    return to, quantise_groups.dequantised(p, to)


@pytest.mark.parametrize("columns", [64, 384, 2880, 5120, 7168])
@pytest.mark.parametrize("kind", GROUPS)
def test_rounding_by_groups(kind: str, columns: int, gpu: Gpu) -> None:
    x = torch.randn(40, columns, device="cuda") * torch.logspace(-6, 4, 40, device="cuda").unsqueeze(1)
    x[3], x[5, 7] = 0.0, float("nan")
    x = x.bfloat16()
    p = quantise_groups.Problem(columns, kind)
    _rounded(kind, x[:0], gpu)  # which writes nothing
    to, meant = _rounded(kind, x, gpu)
    assert meant[5].isnan().any() and meant[torch.arange(40) != 5].isfinite().all() and not meant[3].any()
    rows = torch.arange(40, device="cuda") != 5
    wanted = quantise_groups.reference(p, x[rows])
    scales = to.scales[rows, : columns // p.group]
    if wanted.row_scale is None or to.row_scale is None:  # powers of two: exact
        assert torch.equal(scales.view(torch.uint8), wanted.scales.view(torch.uint8))
        assert torch.equal(to.q[rows].view(torch.uint8), wanted.q.view(torch.uint8))
        return
    torch.testing.assert_close(to.row_scale[rows], wanted.row_scale, rtol=1e-6, atol=0)
    exact = (
        x[rows].double().unflatten(-1, (-1, p.group)).abs().amax(-1)
        / 6
        / wanted.row_scale.double().unsqueeze(-1)
    )
    off, least = ((s.double() - exact).abs() for s in (scales, wanted.scales))
    assert (off <= least + 1e-6 * exact).all(), "another scale only where it is just as near"
    same = (scales.view(torch.uint8) == wanted.scales.view(torch.uint8)).repeat_interleave(p.group // 2, -1)
    differ = (to.q[rows] != wanted.q)[same]
    assert differ.float().mean() <= 3e-3, "a division's last bit turns a tie now and then, no more"


def test_block_scaled_sums_are_the_same_at_every_run(gpu: Gpu) -> None:
    """And from a CUDA graph: nothing is allocated, nothing waits for the host."""
    for format in KINDS:
        layer = Layer(problem(format), gpu)
        p = layer.problem
        experts = Experts(
            p, layer.gate_up, layer.down, gpu, layer.workspace, {200: default_path(p, SCALED, 32, gpu)}
        )
        x = torch.randn(200, p.hidden, generator=layer.generator, device="cuda").bfloat16()
        ids, weights = random_routing(p, 200, layer.generator, "cuda")
        outs = [torch.empty_like(x) for _ in range(4)]
        for out in outs:
            experts(x, ids, weights, out)
        torch.cuda.synchronize()
        graph, replayed = torch.cuda.CUDAGraph(), torch.empty_like(x)
        with torch.cuda.graph(graph):
            experts(x, ids, weights, replayed)
        graph.replay()
        assert all(torch.equal(outs[0], out) for out in (*outs[1:], replayed)), format


def test_no_tokens(gpu: Gpu) -> None:
    layer = Layer(problem("bf16"), gpu)
    out = torch.full((1, 512), 7.0, dtype=torch.bfloat16, device="cuda")
    experts = Experts(layer.problem, layer.gate_up, layer.down, gpu, layer.workspace)
    nothing = torch.empty(0, 3, device="cuda")
    experts(out[:0], nothing.int(), nothing, out[:0])
    assert (out == 7.0).all()


def test_the_same_sum_at_every_run(gpu: Gpu) -> None:
    """Atomics decide who works when, never what is added to what."""
    layer = Layer(problem("fp8_channel"), gpu)
    p = layer.problem
    experts = Experts(p, layer.gate_up, layer.down, gpu, layer.workspace)
    for tokens in (1, 8, 16, 200):
        x = torch.randn(tokens, p.hidden, generator=layer.generator, device="cuda").bfloat16()
        ids, weights = random_routing(p, tokens, layer.generator, "cuda")
        outs = [torch.empty_like(x) for _ in range(8)]
        for out in outs:
            experts(x, ids, weights, out)
        assert all(torch.equal(outs[0], out) for out in outs[1:]), tokens


@pytest.mark.parametrize("tokens", [0, 1, 5, 100, 341, 342, 4096])
@pytest.mark.parametrize(("experts", "block"), [(8, 16), (160, 64), (512, 32)])
def test_sorting(tokens: int, experts: int, block: int, gpu: Gpu) -> None:
    p = moe_sort.Problem(experts, block)
    launchers = tuple(Launcher(request) for request in moe_sort.requests(p, gpu))
    generator = torch.Generator("cuda").manual_seed(tokens)
    scratch = moe_sort.scratch(p, "cuda")
    for _ in range(2):  # the counters must be ready for a second time
        ids = torch.randint(0, experts, (tokens, 3), generator=generator, device="cuda", dtype=torch.int32)
        order = torch.full((tokens * 3 + 1,), -1, dtype=torch.int32, device="cuda")
        most = moe_sort.most_blocks(p, tokens * 3)
        blocks = torch.full((most + 1, 3), -7, dtype=torch.int32, device="cuda")
        moe_sort.run(launchers, ids, scratch, order[:-1], blocks[:-1])
        assert order[-1] == -1 and (blocks[-1] == -7).all(), "behind the end was written"
        order, blocks = order[:-1], blocks[:-1]
        of_expert, wanted = moe_sort.reference(p, ids)
        assert [tuple(entry) for entry in blocks.tolist() if entry[2] > 0] == wanted
        assert (blocks[:, 2] >= 0).all()
        first, places = 0, order.tolist()
        for mine in of_expert:
            assert sorted(places[first : first + len(mine)]) == mine
            first += len(mine)


@pytest.mark.parametrize("group", [0, 128])
def test_quantising(group: int, gpu: Gpu) -> None:
    p = quantise_fp8.Problem(5120, group)
    launcher = Launcher(quantise_fp8.request(p, gpu))
    x = (
        torch.randn(37, 5120, device="cuda").bfloat16()
        * torch.logspace(-6, 4, 37, device="cuda").unsqueeze(1).bfloat16()
    )
    x[3] = 0.0
    q = torch.full((38, 5120), float("nan"), device="cuda").to(torch.float8_e4m3fn)
    wanted_q, wanted_scale = quantise_fp8.reference(p, x)
    scale = torch.full((38, *wanted_scale.shape[1:]), float("nan"), device="cuda")
    for rows in (0, 37):
        quantise_fp8.run(launcher, x[:rows], q[:rows], scale[:rows])
        assert q[rows:].float().isnan().all() and scale[rows:].isnan().all(), "a row behind was written"
    q, scale = q[:-1], scale[:-1]
    assert torch.equal(scale, wanted_scale)
    # the division may round the other way in its last bit, and a tie's code with it
    assert (q.float() != wanted_q.float()).float().mean() < 1e-3


def test_a_broken_scale_is_seen(gpu: Gpu) -> None:
    """The limits above can fail: one wrong group scale in a hundred is more than they allow."""
    for format in (*FOUR_BIT, "fp8_block"):
        layer = Layer(problem(format), gpu)
        assert layer.gate_up.scale is not None
        good = layer.error(4)
        scale = layer.down.scale.view(
            torch.uint8 if layer.down.scale.element_size() == 1 else layer.down.scale.dtype
        )
        broken = scale.flatten()[::50]
        saved = broken.clone()
        weights = layer.down.scale.clone()
        broken.copy_(saved + 1 if format in MXFP4 else saved + 2**7 if format == INT4_ZERO else saved * 2)
        x_error = _against(layer, weights)
        assert good < FEW_LIMIT[format] < x_error, (format, good, x_error)


def _against(layer: Layer, true_scale: torch.Tensor) -> float:
    """The error of the layer as it is now against the oracle with `true_scale` in its second matrix."""
    p = layer.problem
    x = torch.randn(4, p.hidden, generator=layer.generator, device="cuda").bfloat16()
    ids, weights = random_routing(p, 4, layer.generator, "cuda")
    out = torch.empty_like(x)
    Experts(p, layer.gate_up, layer.down, layer.gpu, layer.workspace)(x, ids, weights, out)
    layer.down.scale.copy_(true_scale)
    h = moe_gate_up_few.reference(p, x, layer.gate_up, ids)
    return relative_error(out, moe_down_few.reference(p, h, layer.down, ids, weights))
