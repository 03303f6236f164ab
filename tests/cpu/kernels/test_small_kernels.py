"""The small kernels of a decoder layer without a GPU: under Triton's interpreter against their references,
the references against the layers they stand for, and compiled for GPUs that are not here. On a GPU:
tests/gpu/test_small.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from firebox.attention.base import LatentSpec, PagedSpec
from firebox.cache.pool import LayerCache, PoolSizes, allocate_pool
from firebox.formats.kv import float32, fp8
from firebox.hardware.base import find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import _kv_write, latent_write, rms_norm, rope_write, sigmoid_mul, silu_mul
from firebox.kernels._rows import Outputs
from firebox.kernels.compile import compile_all
from firebox.kernels.select import select
from firebox.layers.attention import AttentionBlock
from firebox.layers.base import Build
from firebox.layers.latent_attention import LATENT_EPS, LatentAttentionBlock
from firebox.layers.moe import MoeBlock
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotary_tables
from firebox.step import Pages, Step
from tests.support.small import KERNELS, cases, in_dtype, request_of

ROOT = Path(__file__).resolve().parents[3]
TOKENS, PAGE, MAX_POSITIONS = 7, 4, 64
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_equal_their_references_under_the_interpreter(op: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_small", op],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 3 * len(KERNELS[op].CASES)  # none, one and three tokens
    wrong = {case: outputs for case, outputs in found.items() if not all(o[2] for o in outputs.values())}
    assert not wrong


# ---- the references against the layers


def filled(block: Any) -> None:
    """Random weights where a block has tensors."""
    generator = torch.Generator().manual_seed(1)
    for slot in block.slots():
        if slot.target.shape != (1,):  # a scale of the cache
            slot.target.normal_(generator=generator)


def build(kv: Any) -> Build:
    return Build(
        probe_cpu(),
        CPU,
        torch.float32,
        kv.DTYPE,
        MAX_POSITIONS,
        attention_backend="torch_reference",
        kv_scaled=kv.SCALED,
    )


class Captured:
    """Runs a block on random hidden states with a backend that keeps the queries it is given."""

    def __init__(self, block: Any, spec: Any, kv: Any, hidden: int, value_dim: int) -> None:
        self.q = torch.empty(0)
        block.backend = SimpleNamespace(run=lambda q, *rest, **named: self._keep(q, value_dim))
        scales = ((0.21, 0.5),) if isinstance(spec, PagedSpec) else ((0.21, 0.21),)
        (cache,) = allocate_pool((spec,), PoolSizes(5, PAGE), kv, CPU, scales)
        assert isinstance(cache, LayerCache)
        self.cache, self.before = cache, dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone())
        self.positions = torch.randint(0, MAX_POSITIONS, (TOKENS,))
        self.slots = torch.randperm(5 * PAGE)[:TOKENS] + PAGE
        self.x = torch.randn(TOKENS, hidden)
        pages = Pages(self.slots, torch.zeros(1, 1, dtype=torch.int64), None)
        rows = np.zeros(2, dtype=np.int64)
        step = Step(self.positions, torch.zeros(TOKENS, dtype=torch.int64), rows, rows, (cache,), pages)
        block(self.x, step)

    def _keep(self, q: torch.Tensor, value_dim: int) -> torch.Tensor:
        self.q = q.clone()
        return q[..., :value_dim]


def same_cache(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal; where the sums' last bit differs, so may a code at the border between two."""
    close = torch.isclose(found.float(), wanted.float(), rtol=1e-5, atol=1e-6)
    assert (~close).float().mean() <= (2e-3 if found.itemsize == 1 else 0), (found, wanted)


@pytest.mark.parametrize("kv", [float32, fp8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "options"),
    [
        (4, 2, 32, 16, {"qk_norm": "head"}),
        (4, 2, 32, 32, {"qk_norm": "", "bias": True}),
        (6, 3, 32, 16, {"qk_norm": "row"}),
        (4, 1, 64, 16, {"qk_norm": "head", "output_gate": True}),
    ],
)
def test_rope_write_means_what_the_attention_layer_does(
    heads: int, kv_heads: int, head_dim: int, rotary: int, options: dict[str, Any], kv: Any
) -> None:
    torch.manual_seed(0)
    hidden, made, spec = 48, build(kv), PagedSpec(kv_heads, head_dim)
    tables = rotary_tables(MAX_POSITIONS, rotary, 100.0, CPU)
    block = AttentionBlock(
        made, RMSNorm(made, "n", hidden, 1e-5), "a", 0, spec, tables, heads=heads, **{"bias": False} | options
    )
    filled(block)
    ran = Captured(block, spec, kv, hidden, head_dim)
    gated = options.get("output_gate", False)
    problem = rope_write.Problem(
        heads,
        kv_heads,
        head_dim,
        rotary,
        options["qk_norm"],
        1e-5,
        gated,
        kv_dtype="fp8" if kv is fp8 else "bf16",
    )
    norms = {"q_weight": block.q_norm.weight, "k_weight": block.k_norm.weight} if options["qk_norm"] else {}
    qkv = block.qkv(block.norm(ran.x))
    q, k, v = rope_write.reference(problem, qkv, *tables, ran.positions, **norms)
    torch.testing.assert_close(q, ran.q, rtol=1e-5, atol=1e-6)
    for cache, before, rows, scale in zip(
        (ran.cache.k, ran.cache.v), (ran.before.k, ran.before.v), (k, v), ran.cache.scales, strict=True
    ):
        _kv_write.put(before, ran.slots, rows, scale)
        same_cache(before, cache)


@pytest.mark.parametrize("kv", [float32, fp8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_latent_write_means_what_the_latent_layer_does(interleaved: bool, kv: Any) -> None:
    torch.manual_seed(0)
    hidden, heads, latent, rope, nope, q_latent = 48, 5, 32, 16, 24, 32
    made, spec = build(kv), LatentSpec(latent, rope)
    tables = rotary_tables(MAX_POSITIONS, rope, 100.0, CPU)
    block = LatentAttentionBlock(
        made,
        RMSNorm(made, "n", hidden, 1e-5),
        "a",
        0,
        spec,
        tables,
        heads=heads,
        nope_dim=nope,
        value_dim=20,
        q_latent_dim=q_latent,
        scale=0.4,
        interleaved=interleaved,
    )
    filled(block)
    block.finish()
    ran = Captured(block, spec, kv, hidden, latent)
    q_a, kv_a = block.q_and_kv_a(block.norm(ran.x)).split([q_latent, latent + rope], dim=-1)
    q_b = block.q_b(block.q_norm(q_a))
    problem = latent_write.Problem(heads, latent, rope, nope, interleaved, LATENT_EPS)
    q, rows = latent_write.reference(problem, kv_a, q_b, block.kv_norm.weight, *tables, ran.positions)
    torch.testing.assert_close(q, ran.q[..., latent:], rtol=1e-5, atol=1e-6)
    _kv_write.put(ran.before.k, ran.slots, rows, ran.cache.scales[0])
    same_cache(ran.before.k, ran.cache.k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_means_what_the_layer_does(dtype: torch.dtype) -> None:
    """In bf16 to the bit: the order of rounding is the layer's."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(dataclasses.replace(build(float32), dtype=dtype), "n", 96, 1e-5)
    norm.weight.copy_(torch.randn(96, generator=generator))
    x, delta = (torch.randn(TOKENS, 96, generator=generator).to(dtype) for _ in range(2))
    found = rms_norm.reference(rms_norm.Problem(96, 1e-5, delta=True), x, norm.weight, delta)
    assert torch.equal(found["x"], x + delta)
    assert torch.equal(found["out"], norm(x + delta))


@pytest.mark.parametrize("activation", silu_mul.ACTIVATIONS)
def test_silu_mul_means_what_the_layers_do(activation: str) -> None:
    gate_up = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0)) * 4
    problem = silu_mul.Problem(32, activation, limit=3.0, alpha=1.5)
    found = silu_mul.reference(problem, gate_up)["out"]
    layer: Any = SimpleNamespace(problem=problem)
    torch.testing.assert_close(found, MoeBlock._activate(layer, gate_up))


def test_sigmoid_mul_means_what_the_attention_layer_does() -> None:
    heads, head_dim = 3, 16
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(TOKENS, 2 * heads * head_dim + 40, generator=generator)
    y = torch.randn(TOKENS, heads, head_dim, generator=generator)
    rows = qkv[:, : 2 * heads * head_dim]
    gate = rows.unflatten(-1, (heads, -1)).chunk(2, dim=-1)[1].flatten(1)  # as in AttentionBlock
    found = sigmoid_mul.reference(sigmoid_mul.Problem(heads, head_dim), y, qkv)["out"]
    torch.testing.assert_close(found, y.flatten(1) * gate.sigmoid())


def test_codes_of_the_cache_are_those_of_its_format() -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 100
    rows[0, :3] = torch.tensor([float("inf"), -1e6, float("nan")])
    cache = torch.empty(1, dtype=fp8.DTYPE)
    found, wanted = _kv_write.stored(rows, cache, 0.21), fp8.encode(rows, 0.21)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


# ---- compiled


def test_every_launch_fits_without_spills_and_overlaps_the_one_before() -> None:
    """All cases for the GPU with the least shared memory, the last of each operation for others."""
    wanted = {}
    for gpu_name in ("gb10", "rtx-5090", "h200", "rtx-4090"):
        for op, kernel in KERNELS.items():
            all_of_them = list(cases(op, "bf16"))
            for name, problem in all_of_them if gpu_name == "gb10" else all_of_them[-1:]:
                wanted[f"{gpu_name} {op} {name}"] = request_of(kernel, problem, find_gpu(gpu_name))
    for (name, request), compiled in zip(wanted.items(), compile_all(list(wanted.values())), strict=True):
        assert compiled.fits, (name, compiled.error, compiled.shared_bytes, compiled.limit_bytes)
        assert compiled.native, (name, compiled.instructions)
        assert compiled.spill_bytes == 0, (name, compiled.spill_bytes)
        assert compiled.registers * 32 * request.num_warps <= 65_536, (name, compiled.registers)
        assert ("pdl" in compiled.features) == ("pdl" in request.gpu.facts), name


@pytest.mark.parametrize("kernel", [rms_norm, silu_mul, rope_write])
def test_the_default_is_one_of_the_tiles_that_a_sweep_tries(kernel: Any) -> None:
    gpu = find_gpu("gb10")
    for problem in kernel.CASES:
        assert kernel.default(problem, gpu) in list(kernel.search_space(problem, gpu)), problem


# ---- who runs


@pytest.mark.parametrize("op", KERNELS)
def test_each_operation_is_found_by_its_name(op: str) -> None:
    problem = in_dtype(KERNELS[op].CASES[0], "bf16")
    choice = select(op, problem, find_gpu("gb10"))
    assert choice.kernel is KERNELS[op], choice
    assert select(op, problem, probe_cpu()).kernel is None


CODES = Outputs(plain=False, fp8=True)
NEOX = rope_write.Problem(8, 2, 128, 64)


@pytest.mark.parametrize(
    ("kernel", "problem", "gpu", "said"),
    [
        (rms_norm, rms_norm.Problem(5120, 1e-5, outputs=CODES), "a100", "FP8"),
        (rms_norm, rms_norm.Problem(2880, 1e-5, outputs=Outputs(fp8=True, group=128)), "gb10", "128"),
        (rms_norm, rms_norm.Problem(100, 1e-5), "gb10", "16"),
        (rms_norm, rms_norm.Problem(32_768, 1e-5), "gb10", "16384"),
        (rms_norm, rms_norm.Problem(512, 1e-5, outputs=Outputs(plain=False)), "gb10", "something to write"),
        (silu_mul, silu_mul.Problem(18_432, outputs=CODES), "gb10", "16384"),
        (silu_mul, silu_mul.Problem(512, "gelu"), "gb10", "gelu"),
        (sigmoid_mul, sigmoid_mul.Problem(4, 100), "gb10", "16"),
        (rope_write, dataclasses.replace(NEOX, rotary_dim=48), "gb10", "power of two"),
        (rope_write, dataclasses.replace(NEOX, head_dim=80), "gb10", "80"),
        (rope_write, dataclasses.replace(NEOX, qk_norm="token"), "gb10", "token"),
        (rope_write, dataclasses.replace(NEOX, kv_dtype="f16"), "gb10", "f16"),
        (rope_write, dataclasses.replace(NEOX, kv_dtype="fp8"), "a100", "FP8"),
        (rope_write, dataclasses.replace(NEOX, heads=256, qk_norm="row"), "gb10", "16384"),
        (latent_write, latent_write.Problem(8, 500, 64, 128, True), "gb10", "500"),
    ],
)
def test_what_a_kernel_cannot_do_it_says(kernel: Any, problem: Any, gpu: str, said: str) -> None:
    reason = kernel.accepts(problem, find_gpu(gpu))
    assert reason is not None and said in reason, reason
