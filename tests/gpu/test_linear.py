"""Dense linear layers on a real GPU: every format, every number of few tokens, many tokens, odd sizes,
against float32 on dequantised weights, and FP8 products of a library. Needs torch, Triton and pytest, nothing
of the engine but its tuner."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _linear, linear, linear_few, linear_one, rms_norm
from firebox.kernels._experts import INT4_ZERO
from firebox.kernels._linear import FORMATS, GROUPS, Problem
from firebox.kernels.launch import Launcher
from firebox.layers import _dense_library
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, ONE, LinearKernels, Path, Workspace, path_of, rounds
from firebox.tuning import linear as tuner
from firebox.tuning._linear_bench import Weighted
from tests.support.experts import relative_error
from tests.support.linear import DTYPES, random_weights

pytestmark = pytest.mark.gpu

KINDS = [(format, group) for format in FORMATS for group in GROUPS.get(format, (0,))]
MAX_TOKENS = 300
# The output is rounded to bf16 (2⁻⁸ at most, 0.0017 RMS); a 4-bit integer or NVFP4 weight times its scale
# once more. FP8 activations of many tokens are rounded to E4M3 (0.026 RMS).
FEW_LIMIT, INTEGER_LIMIT, FP8_LIMIT = 2.5e-3, 4e-3, 4e-2
# cuBLAS with bias and residual adds them in two steps, and each rounds to bf16: √2 · 0.0017 = 0.0024. The
# H200's 0.0027 is what one rounding more makes, of the product or its parts before the residual is added:
# variances 1, 2 and 2 of a result of 2, √2.5 · 0.0017. Without the bias the error would be 0.07.
CUBLAS_LIMIT = 3e-3
# A library's FP8 product against float32 on the activations as they were rounded: the output's rounding, the
# residual's, and what Hopper's sums lose. The limit of engine/trials.py; a scale left out would be far off.
ROUNDED_LIMIT = 1.5e-2
LIBRARY = Path(CUBLAS, None, "test")


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


class Layer:
    """A linear layer with random weights, its inputs and its oracle."""

    def __init__(self, problem: Problem, gpu: Gpu, max_tokens: int = MAX_TOKENS) -> None:
        self.problem, self.gpu = problem, gpu
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.weights = random_weights(problem, self.generator, "cuda")
        self.matrix = _linear.dequantised(problem, self.weights)
        self.workspace = Workspace([problem], max_tokens, gpu, "cuda")
        self.workspace.partial = torch.empty(64 * 64 * problem.rows, device="cuda")  # enough for any tile
        self.workspace.counters = torch.zeros(problem.rows, dtype=torch.int32, device="cuda")
        self.workspace.y = torch.empty(max_tokens * problem.rows, dtype=torch.bfloat16, device="cuda")

    def error(self, tokens: int, path: Path | None = None, *, in_place: bool = False) -> float:
        """Of one run with fresh inputs, a NaN-filled workspace and guarded output rows."""
        p, space = self.problem, self.workspace
        for tensor in (space.partial, space.x_scale, space.y):
            tensor.fill_(float("nan"))
        layer = LinearKernels(p, self.weights, self.gpu, space, {tokens: path} if path else None)
        x = torch.randn(tokens, p.columns, generator=self.generator, device="cuda").bfloat16()
        out = torch.full((tokens + 2, p.rows), float("nan"), dtype=DTYPES[p.out_dtype], device="cuda")
        out[tokens:] = 7.0
        residual, wanted = None, x.float() @ self.matrix.T
        if p.residual:
            residual = torch.randn(tokens, p.rows, generator=self.generator, device="cuda").bfloat16()
            wanted += residual.float()
            if in_place:
                out[:tokens] = residual
                residual = out[:tokens]
        if self.weights.bias is not None:
            wanted += self.weights.bias
        layer(x, out[:tokens], residual)
        assert (out[tokens:] == 7.0).all(), "rows behind the output were written"
        assert not space.counters.any(), "counters are not zero again"
        return relative_error(out[:tokens], wanted)

    def limit(self, path: Path) -> float:
        if rounds(self.problem, path.name):
            return FP8_LIMIT
        if path.name == CUBLAS and self.problem.bias and self.problem.residual:
            return CUBLAS_LIMIT
        return INTEGER_LIMIT if self.problem.format in ("int4_group", INT4_ZERO, "nvfp4") else FEW_LIMIT

    def check(self, tokens: int, path: Path | None = None, **how: bool) -> None:
        used = path or path_of(self.problem, tokens, self.gpu)
        found = self.error(tokens, path, **how)
        assert found < self.limit(used), (self.problem, tokens, used, found)


@pytest.fixture(autouse=True)
def exact_oracle() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("format", linear_one.FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(80, 2944), (2048, 4096)])
def test_one_token_by_every_tile_of_whole_rows(rows: int, columns: int, format: str, gpu: Gpu) -> None:
    layer = Layer(Problem(rows, columns, format, bias=True, residual=True), gpu, 1)
    plain = Layer(Problem(rows, columns, format, out_dtype="f32"), gpu, 1)
    for config in linear_one.search_space(layer.problem, gpu):
        path = Path(ONE, config, "test")
        layer.check(1, path)
        layer.check(1, path, in_place=True)
        plain.check(1, path)


def check_normed(layer: Layer, config: linear_one.Config) -> None:
    """A row and the norm before it in one launch: rows of very different size, so that eps counts."""
    p, norm = layer.problem, rms_norm.Problem(layer.problem.columns, 1e-5)
    launcher = Launcher(linear_one.request(p, config, layer.gpu, eps=norm.eps))
    given = rms_norm.inputs(norm, 3, layer.generator, device="cuda", dtype=torch.bfloat16)
    gain = given["weight"]
    for x in given["x"].split(1):
        out = torch.full((2, p.rows), float("nan"), dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
        linear_one.run(launcher, p, x.contiguous(), layer.weights, None, out[:1], gain)
        assert out[1].isnan().all(), "behind the output was written"
        wanted = linear_one.normed_reference(p, norm.eps, x, gain, layer.weights)
        assert relative_error(out[:1], wanted) < FEW_LIMIT, (p, config)


@pytest.mark.parametrize("format", linear_one.FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(80, 2944), (5120, 2048)])
def test_one_token_and_its_norm_by_every_tile(rows: int, columns: int, format: str, gpu: Gpu) -> None:
    layer = Layer(Problem(rows, columns, format, bias=True), gpu, 1)
    for config in linear_one.search_space(layer.problem, gpu):
        check_normed(layer, config)


@pytest.mark.parametrize(("format", "group"), KINDS)
def test_every_number_of_tokens_from_1_to_64_and_some_to_300(format: str, group: int, gpu: Gpu) -> None:
    layer = Layer(Problem(768, 1024, format, group, bias=True, residual=True), gpu)
    for tokens in (*range(1, 65), 65, 66, 100, 127, 128, 129, 200, 255, 300):
        layer.check(tokens)


@pytest.mark.parametrize(("format", "group"), KINDS)
def test_odd_rows_and_columns(format: str, group: int, gpu: Gpu) -> None:
    """Parts of a tile, of a step, of a head and of a slice are left over."""
    unit = 128 if format == "fp8_block" else max(group, 16)
    odd = -(-720 // unit) * unit
    for rows, columns, bias, residual in (
        (576, 1152, False, False),
        (200, odd, True, False),
        (8, 7 * unit, False, True),
    ):
        layer = Layer(Problem(rows, columns, format, group, bias, residual), gpu)
        for tokens in (1, 6, 16, 64, 70, 200):
            layer.check(tokens)


@pytest.mark.parametrize(("format", "group"), KINDS)
def test_some_tiles_of_the_search_spaces(format: str, group: int, gpu: Gpu) -> None:
    """Every eleventh for few tokens, every fifth for many; a tile that does not fit this GPU is no fault."""
    layer = Layer(Problem(320, 1408, format, group), gpu)
    p, right = layer.problem, 0
    paths = [(3, FEW, config) for config in list(linear_few.search_space(p, 3, gpu))[::11]]
    paths += [(50, FEW, config) for config in list(linear_few.search_space(p, 50, gpu))[5::11]]
    if linear.accepts(p, gpu) is None:
        paths += [(150, MANY, config) for config in list(linear.search_space(p, 150, gpu))[::5]]
    for tokens, name, config in paths:
        try:
            layer.check(tokens, Path(name, config, "test"))
            right += 1
        except triton.runtime.errors.OutOfResources:
            continue
    assert right > len(paths) // 2


def slices_of(problem: Problem, gpu: Gpu, tma: bool) -> list[Path]:
    """The default tile of many tokens, of so many slices as whole steps allow."""
    tile = replace(linear.default(problem, 150, gpu), tma=tma)
    return [Path(MANY, replace(tile, slices=slices), "test") for slices in (2, 3, 8)]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("format", "group"), KINDS)
def test_slices_of_many_tokens(format: str, group: int, tma: bool, gpu: Gpu) -> None:
    """Parts of a tile, of a step and of a slice are left over; bias and residual are added once, into the
    residual too."""
    if tma and "tma" not in gpu.facts:
        pytest.skip(f"{gpu.name} has no TMA")
    unit = 128 if format == "fp8_block" else max(group, 32)  # 32: a row of words is a multiple of 16 bytes
    for rows, columns in ((576, 1152), (200, -(-1880 // unit) * unit)):
        for bias, residual in ((False, False), (True, True)):
            layer = Layer(Problem(rows, columns, format, group, bias, residual), gpu)
            for path in slices_of(layer.problem, gpu, tma):
                for tokens in (17, 64, 150, 300):
                    layer.check(tokens, path, in_place=residual and tokens > 64)


def test_slices_of_large_tiles(gpu: Gpu) -> None:
    """GLM-4.5-Air's o_proj, in every sliced tile of the search space that fits, and the same at every run."""
    problem = Problem(4096, 12_288, "fp8_channel", bias=True, residual=True)
    layer, right = Layer(problem, gpu), 0
    sliced = [config for config in linear.search_space(problem, 256, gpu) if config.slices > 1]
    for config in sliced:
        path = Path(MANY, config, "test")
        try:
            layer.check(256, path)
        except triton.runtime.errors.OutOfResources:
            continue
        kernels = LinearKernels(problem, layer.weights, gpu, layer.workspace, {256: path})
        x = torch.randn(256, 12_288, generator=layer.generator, device="cuda").bfloat16()
        residual = torch.randn(256, 4096, generator=layer.generator, device="cuda").bfloat16()
        outs = [torch.empty_like(residual) for _ in range(8)]
        for out in outs:
            kernels(x, out, residual)
        assert all(torch.equal(outs[0], out) for out in outs[1:]), config
        right += 1
    assert right > len(sliced) // 2


@pytest.mark.parametrize("tokens", [1, 20, 64, 90, 300])
@pytest.mark.parametrize(
    ("format", "group"), [("bf16", 0), ("fp8_channel", 0), ("fp8_block", 0), ("mxfp4", 32)]
)
def test_the_residual_may_be_the_output(format: str, group: int, tokens: int, gpu: Gpu) -> None:
    for bias in (False, True):
        layer = Layer(Problem(1024, 640, format, group, bias, True), gpu)
        layer.check(tokens, in_place=True)


@pytest.mark.parametrize("tokens", [1, 16, 64, 100])
@pytest.mark.parametrize(("format", "group"), [("bf16", 0), ("fp8_channel", 0), (INT4_ZERO, 128)])
def test_float32_outputs_are_not_rounded(format: str, group: int, tokens: int, gpu: Gpu) -> None:
    layer = Layer(Problem(160, 2048, format, group, True, True, out_dtype="f32"), gpu)
    path = path_of(layer.problem, tokens, gpu)
    found = layer.error(tokens)
    assert found < (layer.limit(path) if format == INT4_ZERO or path.name == MANY else 1e-3), (path, found)
    if format == "bf16":
        assert found < 1e-5, (path, found)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_real_shapes(tokens: int, gpu: Gpu) -> None:
    """Enough programs that the last one is another one at every run."""
    for problem in (
        Problem(3584, 5120, "fp8_channel"),
        Problem(5120, 3072, "fp8_channel", residual=True),
        Problem(5120, 2880, "bf16", bias=True),
        Problem(37_888, 5120, "bf16", out_dtype="f32"),
        Problem(7168, 4096, INT4_ZERO, 128),
    ):
        Layer(problem, gpu).check(tokens)


def test_the_same_result_at_every_run_and_in_any_batch(gpu: Gpu) -> None:
    """Atomics decide who works when, never what is added to what; and a token's row does not depend on the
    others where the tile is the same."""
    for format, group in (("bf16", 0), ("fp8_channel", 0), ("fp8_block", 0), (INT4_ZERO, 128)):
        layer = Layer(Problem(1536, 5120, format, group), gpu)
        kernels = LinearKernels(layer.problem, layer.weights, gpu, layer.workspace)
        for tokens in (1, 8, 16, 64, 200):
            x = torch.randn(tokens, 5120, generator=layer.generator, device="cuda").bfloat16()
            outs = [torch.empty(tokens, 1536, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
            for out in outs:
                kernels(x, out)
            assert all(torch.equal(outs[0], out) for out in outs[1:]), (format, tokens)
        few = outs[0][:3].clone()
        eight, three = x[:8].contiguous(), x[:3].contiguous()
        out = torch.empty(8, 1536, dtype=torch.bfloat16, device="cuda")
        kernels(eight, out)
        kernels(three, few)
        assert torch.equal(out[:3], few), format


def assert_replays_are_equal(layers: list[LinearKernels], x: torch.Tensor, inner: torch.Tensor) -> None:
    """Two layers in turn, from `x` to `inner` and back: what a graph leaves in `x`, twenty times, is what
    launches one by one leave."""

    def turns() -> None:
        for _ in range(6):
            layers[0](x, inner)
            layers[1](inner, x)

    start = x.clone()
    turns()
    wanted = x.clone()
    x.copy_(start)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        turns()
    for _ in range(20):
        x.copy_(start)
        graph.replay()
        assert torch.equal(x, wanted)


def test_a_graph_of_layers_that_share_a_workspace(gpu: Gpu) -> None:
    """Two layers in turn, each reading what the other wrote: dependent launches must wait."""
    up, down = (Layer(Problem(*size, "fp8_channel"), gpu) for size in ((2048, 512), (512, 2048)))
    space = up.workspace
    layers = [LinearKernels(one.problem, one.weights, gpu, space) for one in (up, down)]
    x = torch.randn(4, 512, generator=up.generator, device="cuda").bfloat16()
    inner = torch.empty(4, 2048, dtype=torch.bfloat16, device="cuda")
    start = x.clone()
    assert_replays_are_equal(layers, x, inner)
    one = start.float() @ up.matrix.T
    layers[0](start, inner)
    assert relative_error(inner, one) < FEW_LIMIT


def test_a_graph_of_sliced_layers_that_share_a_workspace(gpu: Gpu) -> None:
    """As above with many tokens: sums and counters of one launch are the next one's."""
    up, down = (Layer(Problem(*size, "fp8_channel"), gpu) for size in ((2048, 1024), (1024, 2048)))
    space, tile = up.workspace, linear.Config(64, 64, 128, 4, 3, slices=4)
    paths = {200: Path(MANY, tile, "test")}
    layers = [LinearKernels(one.problem, one.weights, gpu, space, paths) for one in (up, down)]
    x = torch.randn(200, 1024, generator=up.generator, device="cuda").bfloat16()
    inner = torch.empty(200, 2048, dtype=torch.bfloat16, device="cuda")
    space.grow(down.workspace)
    start = x.clone()
    assert_replays_are_equal(layers, x, inner)
    layers[0](start, inner)
    assert relative_error(inner, start.float() @ up.matrix.T) < FP8_LIMIT


def test_fp8_weights_and_activations_beyond_float16(gpu: Gpu) -> None:
    """x as float16 saturates at 65,504 where few tokens meet FP8 weights; NaN stays NaN."""
    layer = Layer(Problem(256, 512, "fp8_channel"), gpu)
    kernels = LinearKernels(layer.problem, layer.weights, gpu, layer.workspace)
    x = torch.randn(4, 512, generator=layer.generator, device="cuda").bfloat16()
    x[1, 77], x[2, 5], x[3, 9] = 1e6, -float("inf"), float("nan")
    out = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
    kernels(x, out)
    wanted = x.float().clamp(-65504, 65504) @ layer.matrix.T
    assert relative_error(out[:3], wanted[:3]) < FEW_LIMIT
    assert out[3].isnan().all()


def test_no_tokens(gpu: Gpu) -> None:
    layer = Layer(Problem(64, 128, "bf16"), gpu)
    out = torch.full((1, 64), 7.0, dtype=torch.bfloat16, device="cuda")
    LinearKernels(layer.problem, layer.weights, gpu, layer.workspace)(
        torch.empty(0, 128, dtype=torch.bfloat16, device="cuda"), out[:0]
    )
    assert (out == 7.0).all()


def test_unquantised_products_of_many_tokens_are_cublas_s(gpu: Gpu) -> None:
    path = path_of(Problem(640, 512, "bf16"), 1000, gpu)
    assert path.name in (CUBLAS, FEW) and (path.why == "measured" or "a library's" in path.why)


# ---- FP8 products of a library

# As few tokens as tuned files give it for these sizes (of 12,288 columns cuBLAS refused 1 and 17; H200, torch
# 2.11.0, 2026-11-23), and more.
FEWEST, OTHERS = 0, (256, 300, 2048)


def given(tokens: int, problem: Problem, gpu: Gpu) -> int:
    """`tokens`, or the FEWEST that the library meets; of sizes that it never meets, 256."""
    chosen = (n for n in range(1, 2049) if path_of(problem, n, gpu).name == CUBLAS)
    return tokens or next(chosen, OTHERS[0])


def rounded_x(layer: Layer, tokens: int) -> torch.Tensor:
    """The activations of the last run, as they were rounded."""
    space, columns = layer.workspace, layer.problem.columns
    codes = space.x[: tokens * columns].view(tokens, columns)
    return codes.float() * space.x_scale[:tokens, None]


@pytest.mark.parametrize("tokens", [FEWEST, *OTHERS])
@pytest.mark.parametrize(
    ("rows", "columns"), [(3584, 5120), (5120, 3072), (4096, 12_288), (14_336, 4096), (112, 272), (208, 1040)]
)
def test_fp8_products_of_a_library(rows: int, columns: int, tokens: int, gpu: Gpu) -> None:
    """Bias and residual, apart and in place, with scales behind the last token that are NaN."""
    for bias, residual in ((False, False), (True, False), (False, True), (True, True)):
        problem = Problem(rows, columns, "fp8_channel", bias=bias, residual=residual)
        assert _dense_library.accepts(problem, gpu) is None
        layer, count = Layer(problem, gpu, 2560), given(tokens, problem, gpu)
        layer.check(count, LIBRARY)
        if residual:
            layer.check(count, LIBRARY, in_place=True)


@pytest.mark.parametrize("which", [FEWEST, *OTHERS])
def test_a_library_s_product_is_that_of_the_rounded_activations(which: int, gpu: Gpu) -> None:
    """Within what sums and outputs lose, and as near as our kernel's is."""
    for rows, columns in ((3584, 5120), (4096, 12_288)):
        problem = Problem(rows, columns, "fp8_channel", bias=True, residual=True)
        tokens = given(which, problem, gpu)
        layer = Layer(problem, gpu, tokens)
        x = torch.randn(tokens, columns, generator=layer.generator, device="cuda").bfloat16()
        residual = torch.randn(tokens, rows, generator=layer.generator, device="cuda").bfloat16()
        errors = {}
        for path in (LIBRARY, Path(MANY, linear.default(problem, tokens, gpu), "test")):
            out = torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16, device="cuda")
            LinearKernels(problem, layer.weights, gpu, layer.workspace, {tokens: path})(x, out, residual)
            wanted = _linear.reference(problem, rounded_x(layer, tokens), layer.weights, residual)
            errors[path.name] = relative_error(out, wanted)
        print(rows, columns, tokens, errors)
        assert max(errors.values()) < ROUNDED_LIMIT, errors


def test_a_library_s_fp8_product_is_the_same_at_every_run(gpu: Gpu) -> None:
    layer = Layer(Problem(1536, 5120, "fp8_channel", bias=True), gpu, 300)
    for tokens in (17, 256, 300):
        kernels = LinearKernels(layer.problem, layer.weights, gpu, layer.workspace, {tokens: LIBRARY})
        x = torch.randn(tokens, 5120, generator=layer.generator, device="cuda").bfloat16()
        outs = [torch.empty(tokens, 1536, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
        for out in outs:
            kernels(x, out)
        assert all(torch.equal(outs[0], out) for out in outs[1:]), tokens


@pytest.mark.parametrize("tokens", [1, 17, 256, 300, 2048])
def test_a_graph_of_a_library_s_products(tokens: int, gpu: Gpu) -> None:
    """Two layers in turn that share a workspace, the second into its residual; other inputs at every replay,
    and other things in the memory that is free."""
    up = Layer(Problem(2048, 512, "fp8_channel", bias=True), gpu, tokens)
    down = Layer(Problem(512, 2048, "fp8_channel", bias=True, residual=True), gpu, tokens)
    space, paths = up.workspace, {tokens: LIBRARY}
    space.grow(down.workspace)
    layers = [LinearKernels(one.problem, one.weights, gpu, space, paths) for one in (up, down)]
    x = torch.zeros(tokens, 512, dtype=torch.bfloat16, device="cuda")
    inner = torch.empty(tokens, 2048, dtype=torch.bfloat16, device="cuda")

    def turns() -> None:
        for _ in range(4):
            layers[0](x, inner)
            layers[1](inner, x, x)

    turns()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turns()
    for _ in range(5):
        start = torch.randn(tokens, 512, generator=up.generator, device="cuda").bfloat16()
        x.copy_(start)
        turns()
        eager = x.clone()
        x.copy_(start)
        garbage = [torch.full((4 << 20,), float("nan"), device="cuda") for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        del garbage
        assert relative_error(x, eager.float()) < 1e-2, "the algorithm may be another one, the sums are not"
        replayed = x.clone()
        x.copy_(start)
        graph.replay()
        assert torch.equal(x, replayed)
    layers[0](start, inner)
    assert relative_error(inner, start.float() @ up.matrix.T + up.weights.bias) < FP8_LIMIT


def test_the_tuner_s_bench_times_what_the_engine_launches(gpu: Gpu) -> None:
    """The product alone for the search, with the rounding as a whole."""
    problem = Problem(2048, 1024, "fp8_channel", bias=True, residual=True)
    task = tuner.task(problem, 300)
    (library,) = (c for c in tuner.candidates(task, gpu) if c.path == CUBLAS)
    bench, parts = Weighted(problem, gpu).bench(300), {tuner.WHOLE: library}
    error, limit = bench.error(library)
    assert error < limit == FP8_LIMIT
    calls, further, whole = bench.calls(library), bench.further(CUBLAS, parts), bench.whole(CUBLAS, parts)
    assert len(calls) == len(further) == len(whole) > 1
    outs = []
    for launch in (calls[0], whole[0]):
        bench._out.fill_(float("nan"))
        launch()
        outs.append(bench._out.clone())
    assert torch.equal(*outs)
    bench._space.x_scale.fill_(float("nan"))
    calls[0]()
    assert not torch.isfinite(bench._out).any(), "a call rounds nothing itself"


@pytest.mark.parametrize("tokens", [17, 300])
def test_a_broken_row_scale_is_seen_by_the_library_s_limits(tokens: int, gpu: Gpu) -> None:
    """One row scale in ten that is 1.5 times what it should be, which is off by 0.16."""
    layer = Layer(Problem(512, 2048, "fp8_channel"), gpu)
    good = layer.error(tokens, LIBRARY)
    assert layer.weights.row_scale is not None
    broken = layer.weights.row_scale.clone()
    broken[::10] *= 1.5
    layer.weights = replace(layer.weights, row_scale=broken)
    assert good < FP8_LIMIT < layer.error(tokens, LIBRARY)


@pytest.mark.parametrize(("format", "group"), [k for k in KINDS if k[1] or k[0] == "fp8_block"])
def test_a_broken_scale_is_seen(format: str, group: int, gpu: Gpu) -> None:
    """The limits above can fail: one wrong scale in fifty is more than they allow."""
    layer = Layer(Problem(512, 2048, format, group), gpu)
    scale = layer.weights.scale
    assert scale is not None
    good = layer.error(4)
    one_byte = scale.element_size() == 1
    broken = (scale.view(torch.uint8) if one_byte else scale).clone()
    some = broken.flatten()[::50]
    some.copy_(some + 1 if one_byte else some + 2**7 if format == INT4_ZERO else some * 2)
    layer.weights = replace(layer.weights, scale=broken.view(scale.dtype))
    bad = layer.error(4)
    limit = layer.limit(path_of(layer.problem, 4, gpu))
    assert good < limit < bad, (good, limit, bad)
