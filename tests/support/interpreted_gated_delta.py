"""Runs the gated delta net's kernels under Triton's interpreter, on the CPU, and prints as JSON for each case
the relative errors of output, convolution state and matrix state. A process of its own, because Triton
decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_gated_delta
"""

from __future__ import annotations

import dataclasses
import json

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode
from firebox.kernels._gated_delta import Problem, reference
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.gated_delta import (
    DTYPES,
    make_keys_alike,
    of_one_product,
    random_inputs,
    random_layer,
)

GPU = find_gpu("gb10")
STATE_LIMIT = 1e-6  # float32 against float64 over at most 8 tokens
OUTPUT_LIMIT = 5e-4  # float16: a rounding falls the other way here and there, 2⁻¹¹ at most
# q, k, v, W, U and the old state are rounded to float16, 1.4 · 10⁻⁴ RMS each; a walk adds some of them up
CHUNK_LIMIT = 1.5e-3


def beyond(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The cases with an error that is not below its limit."""
    return {name: errors for name, errors in found.items() if not _within(name, errors)}


def _within(name: str, errors: dict[str, float]) -> bool:
    state, output = (CHUNK_LIMIT, CHUNK_LIMIT) if "chunk" in name else (STATE_LIMIT, OUTPUT_LIMIT)
    if "alike" in name:  # values that overwrite each other leave their errors
        state, output = 4 * CHUNK_LIMIT, 4 * CHUNK_LIMIT
    moved = errors["conv"] == 0.0  # not computed
    return moved and errors["state"] < state and errors["y"] < output


def decode(p: Problem, lengths: list[int], slots: list[int], generator: torch.Generator) -> dict[str, float]:
    layer = random_layer(p, max(slots) + 2, generator)
    inputs = random_inputs(p, lengths, slots, generator)
    y = torch.full((sum(lengths) + 1, p.heads * p.value_dim), float("nan"), dtype=DTYPES[p.dtype])
    y[-1] = 7.0
    conv_state, state = layer.conv_state.clone(), layer.state.clone()
    counters = gated_delta_decode.counters(p, len(slots), "cpu")
    config = gated_delta_decode.default(p, GPU)
    launcher = Launcher(gated_delta_decode.request(p, config, GPU, interpreted=True))
    gated_delta_decode.run(launcher, inputs, layer.weights, conv_state, state, counters, y[:-1])
    wanted, wanted_conv, wanted_state = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    assert (y[-1] == 7.0).all() and not counters.any()
    idle = [slot for slot in range(len(layer.state)) if slot not in slots]
    assert torch.equal(state[idle], layer.state[idle]), "a state of nobody's was written"
    return {
        "y": relative_error(y[:-1], wanted),
        "conv": relative_error(conv_state, wanted_conv),
        "state": relative_error(state, wanted_state),
    }


def chunk(
    p: Problem,
    columns: int,
    lengths: list[int],
    slots: list[int],
    generator: torch.Generator,
    *,
    alike: bool = False,
    few: int = 0,
) -> dict[str, float]:
    """`few`: so many requests are not given to the kernel."""
    layer = random_layer(p, max(slots) + 2, generator)
    inputs = random_inputs(p, lengths, slots, generator)
    y = torch.full((sum(lengths) + 1, p.heads * p.value_dim), float("nan"), dtype=DTYPES[p.dtype])
    y[-1] = 7.0
    conv_state, state = layer.conv_state.clone(), layer.state.clone()
    if alike:
        make_keys_alike(layer, inputs, generator)
    first = sum(lengths[:few])
    y[:first] = 7.0
    given = {"query_start": inputs.query_start[few:], "state_slots": inputs.state_slots[few:]}
    inputs, slots = dataclasses.replace(inputs, **given), slots[few:]
    space = gated_delta_chunk.scratch(p, sum(lengths), DTYPES[p.dtype], "cpu")
    for tensor in vars(space).values():
        tensor.fill_(float("nan"))
    config = gated_delta_chunk.Config(columns)
    requests = gated_delta_chunk.requests(p, config, GPU, most_requests=8, interpreted=True)
    launchers = tuple(Launcher(request) for request in requests)
    gated_delta_chunk.run(
        launchers, p, inputs, layer.weights, conv_state, state, space, y[:-1],
        range(first, sum(lengths)),
    )  # fmt: skip
    wanted, wanted_conv, wanted_state = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    assert (y[-1] == 7.0).all() and (y[:first] == 7.0).all(), "a row of others was written"
    idle = [slot for slot in range(len(layer.state)) if slot not in slots]
    assert torch.equal(state[idle], layer.state[idle]), "a state of nobody's was written"
    return {
        "y": relative_error(y[first:-1], wanted[first:]),
        "conv": relative_error(conv_state, wanted_conv),
        "state": relative_error(state, wanted_state),
    }


def main() -> None:
    quick_interpreter.begin()
    generator, found = torch.Generator().manual_seed(0), {}
    for name, p in {
        "grouped": Problem(2, 4, 16, 32, 3, 1e-6, "f16"),
        "one tap, one head": Problem(1, 1, 32, 16, 1, 1e-6, "f16"),
        "columns of one matrix": of_one_product(Problem(2, 6, 16, 16, 3, 1e-6, "f16")),
    }.items():
        # one and several tokens, fewer and more than the taps; a request without tokens
        found[f"decode {name}"] = decode(p, [1, 0, 4, 8, 2], [3, 0, 1, 5, 2], generator)
        # parts of a chunk, a whole one, one and two tokens more; a request without tokens
        columns = p.value_dim // 2 if p.value_dim > 16 else 16
        found[f"chunk {name}"] = chunk(p, columns, [1, 0, 130, 64, 65], [3, 0, 1, 5, 2], generator)
        found[f"chunk behind others {name}"] = chunk(
            p, columns, [1, 3, 70, 9], [3, 0, 1, 5], generator, few=2
        )
    p = Problem(1, 2, 32, 16, 3, 1e-6, "f16")
    found["decode no tokens"] = decode(p, [0, 0], [0, 1], generator)
    found["chunk behind others no one"] = chunk(p, 16, [1, 3], [0, 1], generator, few=2)
    found["chunk no tokens"] = chunk(p, 16, [0, 0], [0, 1], generator)
    found["chunk alike"] = chunk(p, 16, [130], [1], generator, alike=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
