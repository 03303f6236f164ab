"""Requests for every kernel that runs on a GPU, in formats and sizes that take different branches, which
compile in half a minute. As a module it compiles them with the Triton that Python finds and prints a JSON
line: name → why it did not compile, or null."""

from __future__ import annotations

import json

import torch
import triton

from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import (
    _linear,
    attention_decode,
    attention_extend,
    attention_rope_decode,
    gated_delta_chunk,
    gated_delta_decode,
    linear_one,
    logprobs,
    moe_down_scaled,
    moe_gate_up_scaled,
    moe_norm_route,
    moe_route,
    quantise_groups,
    sample,
)
from firebox.kernels._attention import FP8
from firebox.kernels._attention import Problem as Attention
from firebox.kernels._experts import FOUR_BIT, Problem
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.layers import dense_gpu, expert_paths
from tests.support.gated_delta import QWEN
from tests.support.route import ROUTINGS
from tests.support.small import KERNELS, in_dtype, request_of

TILES = {expert_paths.ONE: 1, expert_paths.FEW: 4, expert_paths.SORTED: 16}  # tokens, or of a tile
EXPERTS = ("bf16", "fp8_block", "int4_group", "mxfp4", "nvfp4_nibbles")
LINEAR = (("bf16", 0), ("fp8_channel", 0), ("fp8_block", 0), ("int4_group", 128))


def launches(gpu: Gpu) -> dict[str, CompileRequest]:
    return _experts(gpu) | _linears(gpu) | _attention(gpu) | _small(gpu)


def _experts(gpu: Gpu) -> dict[str, CompileRequest]:
    found = {}
    for format in EXPERTS:
        p = Problem(512, 256, 24, 3, format, panels=format in FOUR_BIT, biases=format == "mxfp4")
        for name, tokens in TILES.items():
            path = expert_paths.default_path(p, name, tokens, gpu)
            for op, request in expert_paths.requests(p, tokens, path, gpu).items():
                found[f"{format} {name} {op}"] = request
    for format, kind in (("nvfp4_nibbles", "nvf4"), ("mxfp4_nibbles", "mxf8")):
        p = Problem(512, 256, 24, 3, format)
        for module in (moe_gate_up_scaled, moe_down_scaled):
            found[f"{kind} {module.OP}"] = module.request(p, module.default(p, 32, gpu), gpu, kind=kind)
        found[f"{kind} rounding"] = quantise_groups.request(quantise_groups.Problem(512, kind), gpu)
    return found


def _linears(gpu: Gpu) -> dict[str, CompileRequest]:
    found = {}
    for format, group in LINEAR:
        p = _linear.Problem(768, 1024, format, group, residual=True)
        for tokens in (1, 8, 100):
            for op, request in dense_gpu.requests(p, tokens, gpu).items():
                found[f"{format} {tokens} {op}"] = request
        if format in linear_one.FORMATS:
            config = linear_one.default(p, gpu)
            found[f"{format} with its norm"] = linear_one.request(p, config, gpu, eps=1e-6)
    return found


def _attention(gpu: Gpu) -> dict[str, CompileRequest]:
    found, bf16 = {}, torch.bfloat16
    layers = {
        "sinks": Attention(64, 8, 64, 64, 16, window=True, sinks=bf16),
        "tree": Attention(24, 2, 128, 128, 64, tree=True),
        "latent": Attention(16, 1, 576, 512, 64, kv_dtype=FP8),
    }
    for name, p in layers.items():
        config = attention_decode.default(p, gpu, 8 if p.tree else 1)
        split, merge = attention_decode.requests(p, config, gpu)
        extend = attention_extend.requests(p, attention_extend.default(p, gpu), gpu)
        found |= {f"{name} split": split, f"{name} merge": merge, f"{name} extend": extend[0]}
    for case in attention_rope_decode.CASES[:2]:
        config = attention_rope_decode.default(case.problem, gpu)
        for op, request in attention_rope_decode.requests(case.problem, config, gpu).items():
            found[f"{op} of {case.problem.rope.heads} heads"] = request
    found["delta, one"] = gated_delta_decode.request(QWEN, gated_delta_decode.default(QWEN, gpu), gpu)
    chunks = gated_delta_chunk.requests(QWEN, gated_delta_chunk.default(QWEN, gpu), gpu)
    return found | {f"delta, {request.kernel.__name__}": request for request in chunks}


def _small(gpu: Gpu) -> dict[str, CompileRequest]:
    found = {
        op: request_of(kernel, in_dtype(kernel.CASES[-1], "bf16"), gpu) for op, kernel in KERNELS.items()
    }
    found |= {f"route {name}": moe_route.request(p, gpu) for name, p in ROUTINGS.items()}
    for p in moe_norm_route.CASES[:3]:
        config = moe_norm_route.default(p, gpu)
        found[f"norm and {p.route.experts} experts"] = moe_norm_route.request(p, config, gpu)
    drawn, said = sample.Problem(32001, filters=True), logprobs.Problem(32001, 20)
    found["sample"] = sample.request(drawn, sample.default(drawn, gpu), gpu)
    found["logprobs"] = logprobs.request(said, logprobs.default(said, gpu), gpu)
    return found


if __name__ == "__main__":
    wanted = launches(find_gpu("h200"))
    errors = {
        name: compiled.error
        for name, compiled in zip(wanted, compile_all(list(wanted.values())), strict=True)
    }
    print(json.dumps({"triton": triton.__version__, "errors": errors}))
