"""Routing, sampling and the gated delta net on one NVIDIA GPU, on the shapes of real models: microseconds of
a launch in a captured graph, and for what streams memory the share of the bandwidth.

    PYTHONPATH=src:. python benchmarks/route_sample_delta.py [--parts route,sample] [--sweep] [--json]

Every line is checked against the kernel's reference first; what is wrong has no time. A call is timed as it
runs in the engine: in a CUDA graph with others like it, each with inputs and states of its own; median of
seven. A case is one row, its kernel's default tiles; `--sweep` times all candidates of sampling and of the
gated delta net.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton

from benchmarks.experts import graph_us
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode, logprobs, moe_route, sample
from firebox.kernels._gated_delta import reference as gated_delta_reference
from firebox.kernels.launch import Launcher
from tests.support.experts import relative_error
from tests.support.gated_delta import QWEN, QWEN_TP4, random_inputs, random_layer
from tests.support.interpreted_route import compare, outputs
from tests.support.route import ROUTINGS, decided
from tests.support.route import random_logits as router_logits
from tests.support.sampling import mixed_parameters, random_logits

CALLS, SAMPLES = 8, 7
VOCABS = {"gpt-oss": 201_088, "glm-4.7": 151_552, "qwen3.5": 248_320}
# temperature, top_k, top_p, min_p of all rows
MODES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k 50": (0.8, 50, 1.0, 0.0),
    "top_p 0.95": (0.8, 0, 0.95, 0.0),
    "top_k 50 top_p 0.95": (0.8, 50, 0.95, 0.0),
    "min_p 0.05": (0.8, 0, 1.0, 0.05),
}

Row = dict[str, Any]
Call = Callable[[], None]
Part = Callable[[Gpu, torch.Generator], Iterator[Row]]


def timed(row: Row, right: bool, calls: list[Call], gpu: Gpu, bytes_: float = 0.0) -> Row:
    """The row with its time, printed. `bytes_`: what a call has to read and write."""
    us = graph_us(calls, SAMPLES) if right else None
    row |= {"right": right, "us": None if us is None else round(us, 2)}
    if us is not None and bytes_ and gpu.read_gb_s:
        row["of_bandwidth"] = round(bytes_ / us / 1e3 / gpu.read_gb_s, 3)
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def route(gpu: Gpu, generator: torch.Generator) -> Iterator[Row]:
    for name in ("glm-4.7", "kimi-k2", "deepseek-v3", "qwen3.5", "gpt-oss"):
        problem = ROUTINGS[name]
        launcher = Launcher(moe_route.request(problem, gpu))
        for tokens in (1, 16, 64, 4096):
            made = [
                (*router_logits(problem, tokens, generator, "cuda"), *outputs(problem, tokens, "cuda"))
                for _ in range(CALLS)
            ]
            calls = [partial(moe_route.run, launcher, *m[:3], m[3][:-1], m[4][:-1]) for m in made]
            calls[0]()
            logits, bias, gate, ids, weights = made[0]
            wanted = moe_route.reference(problem, logits, bias, gate)
            found = compare(ids, weights, wanted, decided(problem, logits, bias))
            right = found["wrong"] == 0 and found["error"] < 2e-6
            yield timed({"part": "route", "model": name, "tokens": tokens}, right, calls, gpu)


def sampling(gpu: Gpu, generator: torch.Generator, sweep: bool) -> Iterator[Row]:
    for name, vocab in VOCABS.items():
        for rows in (1, 8, 64, 256):
            logits = random_logits(rows, vocab, generator, "cuda")
            for mode, numbers in MODES.items():
                given = mixed_parameters(rows, generator, "cuda")
                for field, value in zip(("temperature", "top_k", "top_p", "min_p"), numbers, strict=True):
                    getattr(given, field).fill_(value)
                for filters in (False, True) if mode in ("greedy", "temperature") else (True,):
                    problem = sample.Problem(vocab, filters=filters)
                    row = {"part": "sample", "model": name, "rows": rows, "mode": mode, "filters": filters}
                    yield from _samples(row, problem, logits, given, gpu, sweep)


def _samples(
    row: Row, problem: sample.Problem, logits: torch.Tensor, given: sample.Parameters, gpu: Gpu, sweep: bool
) -> Iterator[Row]:
    rows = len(logits)
    few = slice(0, min(rows, 4))
    part = sample.Parameters(**{key: tensor[few].cpu() for key, tensor in vars(given).items()})
    wanted, leads = sample.reference(problem, logits[few].cpu(), None, part)
    default = sample.default(problem, gpu)
    others = sample.search_space(problem, gpu) if sweep else ()
    for config in dict.fromkeys((default, *others)):
        launcher = Launcher(sample.request(problem, config, gpu))
        space = sample.scratch(problem, config, rows, "cuda")
        token_ids = torch.zeros(rows, dtype=torch.int64, device="cuda")
        call = partial(sample.run, launcher, logits, None, given, space, token_ids)
        call()
        right = bool(((token_ids[few].cpu() == wanted) | (leads < 1e-5)).all())
        tile = dataclasses.asdict(config) | {"default": config == default}
        yield timed(row | tile, right, [call] * CALLS, gpu, logits.nbytes)


def log_probabilities(gpu: Gpu, generator: torch.Generator) -> Iterator[Row]:
    for name, vocab in VOCABS.items():
        for rows in (1, 8, 64):
            for top in (0, 5, 20):
                problem = logprobs.Problem(vocab, top)
                config = logprobs.default(problem, gpu)
                launcher = Launcher(logprobs.request(problem, config, gpu))
                logits = random_logits(rows, vocab, generator, "cuda")
                token_ids = torch.full((rows,), vocab // 2, device="cuda")
                space = logprobs.scratch(problem, config, rows, "cuda")
                values, ranks = torch.zeros(rows, device="cuda"), torch.zeros_like(token_ids).int()
                ids = torch.zeros(rows, top, dtype=torch.int32, device="cuda")
                given = (logits, token_ids, space, values, ranks, ids, ids.float())
                call = partial(logprobs.run, launcher, *given)
                call()
                wanted = logprobs.reference(problem, logits, token_ids)
                close = bool(((values - wanted[0]).abs() < 1e-5).all())
                right = close and torch.equal(ids, wanted[2].int()) and torch.equal(ranks, wanted[1].int())
                row = {"part": "logprobs", "model": name, "rows": rows, "top": top}
                yield timed(row, right, [call] * CALLS, gpu, logits.nbytes)


def decode(gpu: Gpu, generator: torch.Generator, sweep: bool) -> Iterator[Row]:
    for name, p in (("qwen3.5", QWEN), ("qwen3.5 tp4", QWEN_TP4)):
        for requests, tokens in ((1, 1), (1, 4), (8, 1), (16, 1), (64, 1), (64, 4)):
            slots = list(range(requests))
            layers = [random_layer(p, requests, generator, "cuda") for _ in range(4)]
            inputs = random_inputs(p, [tokens] * requests, slots, generator, "cuda")
            y = torch.empty(len(inputs.mixed), p.heads * p.value_dim, dtype=torch.bfloat16, device="cuda")
            counters = gated_delta_decode.counters(p, requests, "cuda")
            default = gated_delta_decode.default(p, gpu)
            others = gated_delta_decode.search_space(p, gpu) if sweep else ()
            for config in dict.fromkeys((default, *others)):
                launcher = Launcher(gated_delta_decode.request(p, config, gpu))

                calls = [
                    partial(
                        gated_delta_decode.run,
                        launcher,
                        inputs,
                        m.weights,
                        m.conv_state,
                        m.state,
                        counters,
                        y,
                    )
                    for m in layers
                ]
                first = layers[0]
                wanted = gated_delta_reference(p, first.weights, inputs, first.conv_state, first.state)
                calls[0]()
                right = relative_error(y, wanted[0]) < 2e-3 and relative_error(first.state, wanted[2]) < 3e-6
                row = {"part": "decode", "model": name, "requests": requests, "tokens": tokens}
                row |= dataclasses.asdict(config) | {"default": config == default}
                yield timed(row, right, calls, gpu, 2 * first.state.nbytes)


def chunks(gpu: Gpu, generator: torch.Generator, sweep: bool) -> Iterator[Row]:
    p = QWEN_TP4
    default = gated_delta_chunk.default(p, gpu)
    others = [dataclasses.replace(default, columns=columns) for columns in (16, 32, 64) if sweep]
    for lengths in ([512], [4096], [512] * 16, [8192]):
        layer = random_layer(p, len(lengths), generator, "cuda")
        inputs = random_inputs(p, lengths, list(range(len(lengths))), generator, "cuda")
        y = torch.empty(sum(lengths), p.heads * p.value_dim, dtype=torch.bfloat16, device="cuda")
        space = gated_delta_chunk.scratch(p, sum(lengths), torch.bfloat16, "cuda")
        wanted = gated_delta_reference(p, layer.weights, inputs, layer.conv_state, layer.state)
        before = layer.conv_state.clone(), layer.state.clone()
        for config in dict.fromkeys((default, *others)):
            layer.conv_state.copy_(before[0])
            layer.state.copy_(before[1])
            launchers = tuple(Launcher(r) for r in gated_delta_chunk.requests(p, config, gpu))
            states = (layer.conv_state, layer.state)
            call = partial(gated_delta_chunk.run, launchers, p, inputs, layer.weights, *states, space, y)
            call()
            errors = relative_error(y, wanted[0]), relative_error(layer.state, wanted[2])
            row = {"part": "chunk", "requests": len(lengths), "tokens": sum(lengths)}
            row |= dataclasses.asdict(config) | {"default": config == default}
            yield timed(row, max(errors) < 1.2e-2, [call] * 4, gpu)


def parts(sweep: bool) -> dict[str, Part]:
    """By what `--parts` calls them. `sweep`: those that have candidates time them all."""
    return {
        "route": route,
        "sample": partial(sampling, sweep=sweep),
        "logprobs": log_probabilities,
        "decode": partial(decode, sweep=sweep),
        "chunk": partial(chunks, sweep=sweep),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(parts(False)))
    parser.add_argument("--sweep", action="store_true", help="every candidate, not the default alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    gpu = probe_gpu()
    if gpu is None:
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    print(f"{gpu.name}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    generator = torch.Generator("cuda").manual_seed(0)
    every = parts(arguments.sweep)
    rows = [row for part in arguments.parts.split(",") for row in every[part](gpu, generator)]
    if arguments.json:
        print(json.dumps(rows))
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
