"""The gated delta net on a real GPU, at Qwen3.5's sizes. Needs torch, Triton and pytest, nothing of the
engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode
from firebox.kernels._gated_delta import Inputs, Problem, reference
from firebox.kernels.launch import Launcher
from tests.support.experts import relative_error
from tests.support.gated_delta import QWEN, QWEN_TP4, Layer, make_keys_alike, random_inputs, random_layer

pytestmark = pytest.mark.gpu

STATE_LIMIT = 3e-6  # float32 against float64; exponentials by ex2.approx
OUTPUT_LIMIT = 2e-3  # a bf16 rounding falls the other way here and there, 2⁻⁸ at most
# q, k, v, W, U and the old state are rounded to bf16, 1.7 · 10⁻³ RMS each; a walk adds some of them up
CHUNK_LIMIT = 1.2e-2
SMALL = Problem(2, 4, 64, 32, 3, 1e-6)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


def check_decode(
    p: Problem, gpu: Gpu, config: gated_delta_decode.Config, lengths: list[int], slots: list[int]
) -> None:
    generator = torch.Generator("cuda").manual_seed(len(slots))
    layer = random_layer(p, max(slots) + 2, generator, "cuda")
    inputs = random_inputs(p, lengths, slots, generator, "cuda")
    y = torch.full(
        (sum(lengths) + 1, p.heads * p.value_dim), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    y[-1] = 7.0
    conv_state, state = layer.conv_state.clone(), layer.state.clone()
    counters = gated_delta_decode.counters(p, len(slots), "cuda")
    launcher = Launcher(gated_delta_decode.request(p, config, gpu))
    gated_delta_decode.run(launcher, inputs, layer.weights, conv_state, state, counters, y[:-1])
    wanted, wanted_conv, wanted_state = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    assert (y[-1] == 7.0).all() and not counters.any()
    assert torch.equal(conv_state.double(), wanted_conv), "inputs that are kept are moved, not computed"
    idle = [slot for slot in range(len(state)) if slot not in slots]
    assert torch.equal(state[idle], layer.state[idle]), "a state of nobody's was written"
    errors = relative_error(y[:-1], wanted), relative_error(state, wanted_state)
    assert errors[0] < OUTPUT_LIMIT and errors[1] < STATE_LIMIT, (config, errors)


@pytest.mark.parametrize("p", [SMALL, QWEN_TP4, QWEN], ids=["small", "tp4", "whole"])
def test_decode(p: Problem, gpu: Gpu) -> None:
    default = gated_delta_decode.default(p, gpu)
    for config in dict.fromkeys((default, *gated_delta_decode.search_space(p, gpu))):
        for lengths, slots in (
            ([1], [2]),
            ([0], [1]),
            ([1] * 33, list(range(40, 7, -1))),
            ([1, 0, 2, 3, 8, 4, 0], [3, 3, 0, 1, 6, 9, 2]),
        ):
            check_decode(p, gpu, config, lengths, slots)


def test_decode_step_by_step_equals_all_at_once(gpu: Gpu) -> None:
    """Eight tokens in one launch, and one by one in a captured graph that is replayed: the same states to the
    bit."""
    p, generator = QWEN_TP4, torch.Generator("cuda").manual_seed(1)
    layer, slots = random_layer(p, 6, generator, "cuda"), [4, 1, 5]
    inputs = random_inputs(p, [8, 8, 8], slots, generator, "cuda")
    launcher = Launcher(gated_delta_decode.request(p, gated_delta_decode.default(p, gpu), gpu))
    counters = gated_delta_decode.counters(p, 3, "cuda")

    def run(layer: Layer, inputs: object, y: torch.Tensor) -> None:
        gated_delta_decode.run(launcher, inputs, layer.weights, layer.conv_state, layer.state, counters, y)

    once = dataclasses.replace(layer, conv_state=layer.conv_state.clone(), state=layer.state.clone())
    y = torch.empty(24, p.heads * p.value_dim, dtype=torch.bfloat16, device="cuda")
    run(once, inputs, y)
    one = random_inputs(p, [1, 1, 1], slots, generator, "cuda")
    y_one, before = y[:3].clone(), (layer.conv_state.clone(), layer.state.clone())
    run(layer, one, y_one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(layer, one, y_one)
    layer.conv_state.copy_(before[0])
    layer.state.copy_(before[1])
    for t in range(8):
        for name in ("mixed", "z", "a", "b"):
            getattr(one, name).copy_(getattr(inputs, name)[t::8])
        graph.replay()
        assert torch.equal(y_one, y[t::8]), t
    assert torch.equal(layer.state, once.state) and torch.equal(layer.conv_state, once.conv_state)


def run_chunks(
    p: Problem, gpu: Gpu, layer: Layer, inputs: Inputs, config: gated_delta_chunk.Config
) -> torch.Tensor:
    """Advances the layer's states; y with a guard row behind that must survive."""
    tokens = inputs.mixed.shape[0]
    y = torch.full((tokens + 1, p.heads * p.value_dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    y[-1] = 7.0
    space = gated_delta_chunk.scratch(p, tokens, torch.bfloat16, "cuda")
    for tensor in vars(space).values():
        tensor.fill_(float("nan"))
    launchers = tuple(Launcher(request) for request in gated_delta_chunk.requests(p, config, gpu))
    states = (layer.conv_state, layer.state)
    gated_delta_chunk.run(launchers, p, inputs, layer.weights, *states, space, y[:-1])
    assert (y[-1] == 7.0).all()
    return y[:-1]


@pytest.mark.parametrize("p", [SMALL, QWEN_TP4, QWEN], ids=["small", "tp4", "whole"])
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_chunks(p: Problem, columns: int, gpu: Gpu) -> None:
    if columns > p.value_dim:
        columns = p.value_dim
    for lengths, slots in (
        ([1], [0]),
        ([0], [1]),
        ([64], [1]),
        ([300], [2]),
        ([5, 0, 63, 64, 65, 129, 1, 200], [3, 3, 0, 1, 7, 9, 2, 5]),
    ):
        generator = torch.Generator("cuda").manual_seed(len(slots))
        layer = random_layer(p, max(slots) + 2, generator, "cuda")
        inputs = random_inputs(p, lengths, slots, generator, "cuda")
        wanted = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
        idle = [slot for slot in range(len(layer.state)) if slot not in slots]
        before = layer.state[idle].clone()
        y = run_chunks(p, gpu, layer, inputs, gated_delta_chunk.Config(columns))
        assert torch.equal(layer.conv_state.double(), wanted[1])
        assert torch.equal(layer.state[idle], before), "a state of nobody's was written"
        errors = relative_error(y, wanted[0]), relative_error(layer.state, wanted[2])
        assert max(errors) < CHUNK_LIMIT, (lengths, errors)


def test_keys_that_are_alike(gpu: Gpu) -> None:
    p, generator = QWEN_TP4, torch.Generator("cuda").manual_seed(5)
    layer = random_layer(p, 1, generator, "cuda")
    inputs = random_inputs(p, [256], [0], generator, "cuda")
    make_keys_alike(layer, inputs, generator)
    wanted = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    y = run_chunks(p, gpu, layer, inputs, gated_delta_chunk.default(p, gpu))
    # what one key keeps overwriting: errors of U cancel less well than values do
    errors = relative_error(y, wanted[0]), relative_error(layer.state, wanted[2])
    assert max(errors) < 5 * CHUNK_LIMIT, errors


def test_chunks_then_decode_equals_chunks(gpu: Gpu) -> None:
    """A prompt of 130 tokens and three more, against 133 at once."""
    p = QWEN_TP4
    found = []
    for lengths in ([133], [130, 3]):
        generator = torch.Generator("cuda").manual_seed(6)
        layer = random_layer(p, 1, generator, "cuda")
        inputs = random_inputs(p, [133], [0], generator, "cuda")
        y = []
        for first, n in zip((0, lengths[0]), lengths, strict=False):
            part = {name: getattr(inputs, name)[first : first + n] for name in ("mixed", "z", "a", "b")}
            starts = torch.tensor([0, n], dtype=torch.int32, device="cuda")
            piece = Inputs(**part, query_start=starts, state_slots=inputs.state_slots)
            if n > 8:
                y.append(run_chunks(p, gpu, layer, piece, gated_delta_chunk.default(p, gpu)))
                continue
            launcher = Launcher(gated_delta_decode.request(p, gated_delta_decode.default(p, gpu), gpu))
            y.append(torch.empty(n, p.heads * p.value_dim, dtype=torch.bfloat16, device="cuda"))
            counters = gated_delta_decode.counters(p, 1, "cuda")
            states = (layer.conv_state, layer.state)
            gated_delta_decode.run(launcher, piece, layer.weights, *states, counters, y[-1])
        found.append((torch.cat(y), layer.state, layer.conv_state))
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) < CHUNK_LIMIT
