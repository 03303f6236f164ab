"""The small kernels of a decoder layer on a real GPU, against their references. Needs torch, Triton and
pytest, nothing of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from firebox.formats.kv import fp8
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import embed, latent_write, rms_norm, rope_write, silu_mul
from firebox.kernels.launch import Launcher
from firebox.layers.rope import rotate, rotate_pairs
from tests.support.experts import DTYPES, relative_error
from tests.support.small import (
    KERNELS,
    beyond,
    cases,
    difference,
    faults,
    fused,
    in_dtype,
    request_of,
    run_case,
)

pytestmark = pytest.mark.gpu

ALL = [(op, name, problem) for op in KERNELS for name, problem in cases(op, "bf16")]
TOKENS = (0, 1, 2, 3, 16, 17, 130, 1031)
# AttentionBlock rounds cos, sin, both products and their sum to bf16, each 0.0017 RMS at most.
COMPOSED_LIMIT = 5e-3


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


def given(op: str, problem: Any, tokens: int, seed: int = 0, **further: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    kind = {"device": "cuda", "dtype": DTYPES[problem.dtype]}
    return KERNELS[op].inputs(problem, tokens, generator, **kind, **further)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(("op", "name", "problem"), ALL, ids=[f"{op}-{i}" for i, (op, *_) in enumerate(ALL)])
def test_every_case_at_every_number_of_tokens(op: str, name: str, problem: Any, dtype: str, gpu: Gpu) -> None:
    problem = in_dtype(problem, dtype)
    wrong = {tokens: faults(run_case(op, problem, tokens, "cuda", gpu)) for tokens in TOKENS}
    assert not any(wrong.values()), (name, {tokens: found for tokens, found in wrong.items() if found})


@pytest.mark.parametrize(
    ("op", "problem"), [(op, p) for op, _, p in ALL if getattr(p, "kv_dtype", "") == "fp8"]
)
def test_codes_of_the_cache_saturate(op: str, problem: Any, gpu: Gpu) -> None:
    assert not faults(beyond(op, problem, 20, "cuda", gpu))


@pytest.mark.parametrize(
    ("op", "problem"), [(op, p) for op, _, p in ALL if getattr(p, "outputs", None) and p.outputs.fp8]
)
def test_codes_are_those_of_two_launches(op: str, problem: Any, gpu: Gpu) -> None:
    assert all(fused(op, problem, tokens, "cuda", gpu) for tokens in (1, 33))


def test_what_is_not_a_number_stays_so_in_an_fp8_cache(gpu: Gpu) -> None:
    problem = rope_write.Problem(4, 2, 64, 32, kv_dtype="fp8")
    inputs = given("rope_write", problem, 3)
    inputs["qkv"][1, 4 * 64 :] = float("nan")
    inputs["qkv"][2, 6 * 64 :] = float("inf")
    k_cache, v_cache = (torch.zeros(1, 4, 2, 64, device="cuda").to(fp8.DTYPE) for _ in range(2))
    q = torch.empty(3, 4, 64, dtype=torch.bfloat16, device="cuda")
    more = {"scales": torch.ones(2, device="cuda"), "token_slots": torch.arange(1, 4, device="cuda")}
    torch.cuda.synchronize()
    launcher = Launcher(request_of(rope_write, problem, gpu))
    rope_write.run(launcher, **inputs, **more, q=q, k_cache=k_cache, v_cache=v_cache)
    k, v = k_cache.float()[0], v_cache.float()[0]
    assert k[2].isnan().all() and v[2].isnan().all()
    assert (v[3] == 448.0).all()
    assert torch.isfinite(k[[0, 1, 3]]).all() and torch.isfinite(v[[0, 1, 3]]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_nearer_to_the_formula_than_the_layers_roundings(interleaved: bool, gpu: Gpu) -> None:
    """The kernel rounds once; the layer, in bf16, four times. Both are near the formula, and to each
    other."""
    problem = latent_write.Problem(8, 512, 64, 128, interleaved)
    inputs = given("latent_write", problem, 100)
    q = torch.zeros(100, 8, 576, dtype=torch.bfloat16, device="cuda")
    more = {
        "cache": torch.zeros(8, 16, 1, 576, dtype=torch.bfloat16, device="cuda"),
        "token_slots": torch.arange(100, device="cuda"),
    }
    torch.cuda.synchronize()
    latent_write.run(Launcher(request_of(latent_write, problem, gpu)), **inputs, **more, q=q)
    turn = rotate_pairs if interleaved else rotate
    rows = inputs["q_b"].unflatten(-1, (8, -1))[..., 128:]
    tables = [inputs[name][inputs["positions"]].unsqueeze(1) for name in ("cos", "sin")]
    formula = turn(rows.double(), *(table.double() for table in tables))
    composed = turn(rows, *(table.bfloat16() for table in tables))
    found = q[..., 512:]
    assert relative_error(found, formula) < 1.8e-3  # one rounding to bf16
    assert relative_error(found, formula) < relative_error(composed, formula) < COMPOSED_LIMIT


@pytest.mark.parametrize("op", KERNELS)
def test_the_same_in_a_graph_and_at_every_run(op: str, gpu: Gpu) -> None:
    """Captured with one input, replayed with another."""
    problem = in_dtype(KERNELS[op].CASES[-1], "bf16")
    call, inputs, outputs = prepared(op, problem, 50, gpu)
    saved = [{name: value.clone() for name, value in part.items()} for part in (inputs, outputs)]

    def restored() -> None:
        for part, values in zip((inputs, outputs), saved, strict=True):
            for name, value in values.items():
                part[name].copy_(value)
        torch.cuda.synchronize()

    call()
    wanted = {name: value.clone() for name, value in (inputs | outputs).items()}
    restored()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for name in ("x", "gate_up", "y", "qkv", "kv_a", "table"):
        if name in inputs:
            inputs[name].mul_(-3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert any(not _equal(value, wanted[name]) for name, value in outputs.items()), (
        "the replay reads old inputs"
    )
    for _ in range(5):
        restored()
        graph.replay()
        torch.cuda.synchronize()
        for name, value in (inputs | outputs).items():
            assert _equal(value, wanted[name]), name


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    same = found.contiguous().view(torch.uint8) == wanted.contiguous().view(torch.uint8)
    return bool(same.all())


def prepared(
    op: str, problem: Any, tokens: int, gpu: Gpu
) -> tuple[Callable[[], None], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A launch, its inputs and its outputs, which are zero."""
    kernel, inputs = KERNELS[op], given(op, problem, tokens)
    if op == "rope_write":
        cache = torch.zeros(9, 16, problem.kv_heads, problem.head_dim, device="cuda")
        shapes = {"q": (tokens, problem.heads, problem.head_dim)}
        outputs = {name: cache.to(_kv(problem)) for name in ("k_cache", "v_cache")}
    elif op == "latent_write":
        width = problem.latent_dim + problem.rope_dim
        shapes = {"q": (tokens, problem.heads, width)}
        outputs = {"cache": torch.zeros(9, 16, 1, width, device="cuda").to(_kv(problem))}
    else:
        wanted = kernel.reference(problem, **{name: value.clone() for name, value in inputs.items()})
        shapes, outputs = {}, {name: torch.zeros_like(rows) for name, rows in wanted.items() if name != "x"}
    for name, shape in shapes.items():
        outputs[name] = torch.zeros(shape, dtype=DTYPES[problem.dtype], device="cuda")
        inputs["token_slots"] = torch.randperm(128, device="cuda")[:tokens] + 16
        if problem.kv_dtype == "fp8":
            inputs["scales"] = torch.tensor([0.3, 0.6], device="cuda")
    launcher = Launcher(request_of(kernel, problem, gpu))
    return lambda: kernel.run(launcher, **inputs, **outputs), inputs, outputs


def _kv(problem: Any) -> torch.dtype:
    return fp8.DTYPE if problem.kv_dtype == "fp8" else DTYPES[problem.dtype]


def test_launches_that_follow_each_other_see_what_was_written(gpu: Gpu) -> None:
    """A chain in which each launch reads what the one before wrote, with launches that begin early."""
    hidden, tokens = 1024, 300
    norm = rms_norm.Problem(hidden, 1e-5, delta=True)
    act = silu_mul.Problem(hidden)
    generator = torch.Generator("cuda").manual_seed(0)
    table = torch.randn(50, hidden, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(hidden, generator=generator, device="cuda").bfloat16()
    ids = torch.randint(0, 50, (tokens,), generator=generator, device="cuda")
    x, delta, gate_up = (
        torch.zeros(tokens, n, dtype=torch.bfloat16, device="cuda") for n in (1024, 1024, 2048)
    )
    launch = {
        kernel.OP: Launcher(request_of(kernel, problem, gpu))
        for kernel, problem in ((embed, embed.Problem(hidden)), (rms_norm, norm), (silu_mul, act))
    }
    layers = 6

    def chain() -> None:
        embed.run(launch["embed"], ids, table, x)
        for layer in range(layers):
            halves = gate_up.view(
                2 * tokens, hidden
            )  # as the norm's output: its rows are gates and ups in turn
            half = halves[:tokens] if layer % 2 else halves[tokens:]
            rms_norm.run(launch["rms_norm"], x, weight, delta=delta, out=half)
            silu_mul.run(launch["silu_mul"], gate_up, out=delta)

    def plain() -> torch.Tensor:
        rows, branch, wide = table[ids], torch.zeros_like(delta), torch.zeros_like(gate_up)
        for layer in range(layers):
            found = rms_norm.reference(norm, rows, weight, branch)
            rows = found["x"]
            place = wide.view(2 * tokens, hidden)
            (place[:tokens] if layer % 2 else place[tokens:]).copy_(found["out"])
            branch = silu_mul.reference(act, wide)["out"]
        return rows

    wanted = plain()
    graph = torch.cuda.CUDAGraph()
    chain()
    with torch.cuda.graph(graph):
        chain()
    results = []
    for _ in range(20):
        for buffer in (x, delta, gate_up):
            buffer.zero_()
        graph.replay()
        results.append(x.clone())
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert relative_error(results[0], wanted) < 5e-3  # a moved last place travels through the layers


def test_more_than_2_31_numbers(gpu: Gpu) -> None:
    """Rows, table and slots that lie beyond what 32 bits can count."""
    far = 2**31 // 1024 + 5
    table = torch.empty(far, 1024, dtype=torch.bfloat16, device="cuda")
    table[-1], table[5] = 3.0, 9.0
    out = torch.zeros(2, 1024, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([far - 1, 5], device="cuda")
    embed.run(Launcher(request_of(embed, embed.Problem(1024), gpu)), ids, table, out)
    assert (out[0] == 3.0).all() and (out[1] == 9.0).all()

    problem = rms_norm.Problem(128, 1e-5)
    rows = torch.as_strided(table.view(-1), (3, 128), (2**30, 1))
    rows.copy_(torch.randn(3, 128, device="cuda"))
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    normed = torch.zeros(3, 128, dtype=torch.bfloat16, device="cuda")
    rms_norm.run(Launcher(request_of(rms_norm, problem, gpu)), rows, weight, out=normed)
    assert difference(normed, rms_norm.reference(problem, rows, weight)["out"]).explained
    del table, rows

    problem = rope_write.Problem(8, 8, 128, 64)
    inputs = given("rope_write", problem, 2)
    k_cache, v_cache = (torch.zeros(1, far, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q, slots = (
        torch.zeros(2, 8, 128, dtype=torch.bfloat16, device="cuda"),
        torch.tensor([far - 1, 0], device="cuda"),
    )
    torch.cuda.synchronize()
    launcher = Launcher(request_of(rope_write, problem, gpu))
    rope_write.run(launcher, **inputs, token_slots=slots, q=q, k_cache=k_cache, v_cache=v_cache)
    _, k, v = rope_write.reference(problem, **inputs)
    assert difference(k_cache[0, slots], k).explained and torch.equal(v_cache[0, slots], v)


@pytest.mark.parametrize(("op", "name", "part"), [
    ("rms_norm", "weight", (slice(None, None, 100),)),
    ("rope_write", "positions", (slice(3, 4),)),
    ("rope_write", "k_weight", (slice(7, 9),)),
    ("latent_write", "weight", (slice(None, None, 100),)),
    ("latent_write", "positions", (slice(3, 4),)),
    ("silu_mul", "gate_up", (slice(None), slice(None, None, 100))),
    ("sigmoid_mul", "qkv", (slice(None), slice(None, None, 100))),
    ("embed", "token_ids", (slice(3, 4),)),
])  # fmt: skip
def test_the_limits_can_fail(op: str, name: str, part: tuple[slice, ...], gpu: Gpu, monkeypatch: Any) -> None:
    """One in a hundred of an input changed by a tenth, or one token's position: more than the limits
    allow."""
    problem = in_dtype(KERNELS[op].CASES[0], "bf16")
    true_reference = KERNELS[op].reference

    def broken(problem: Any, **inputs: torch.Tensor) -> Any:
        spoiled = inputs[name].clone()
        spoiled[part] = spoiled[part] * 1.1 if spoiled.is_floating_point() else spoiled[part] + 1
        return true_reference(problem, **inputs | {name: spoiled})

    assert not faults(run_case(op, problem, 20, "cuda", gpu))
    monkeypatch.setattr(KERNELS[op], "reference", broken)
    assert faults(run_case(op, problem, 20, "cuda", gpu))


def test_rows_of_heads_and_unaligned_rows(gpu: Gpu) -> None:
    """A norm of heads, as rows; and rows that vector loads cannot reach are refused before they are read."""
    problem = rms_norm.Problem(128, 1e-6)
    launcher = Launcher(request_of(rms_norm, problem, gpu))
    heads = torch.randn(33, 24, 128, device="cuda").bfloat16()
    weight = torch.randn(128, device="cuda").bfloat16()
    out = torch.empty_like(heads)
    rms_norm.run(launcher, heads.view(-1, 128), weight, out=out.view(-1, 128))
    wanted = rms_norm.reference(problem, heads.view(-1, 128), weight)["out"]
    assert difference(out.view(-1, 128), wanted).explained
    wide = torch.zeros(4, 144, dtype=torch.bfloat16, device="cuda")
    for rows in (wide[:, 1:129], torch.zeros(4, 136, dtype=torch.bfloat16, device="cuda")[:, :128]):
        with pytest.raises(AssertionError, match="aligned"):
            rms_norm.run(launcher, rows, weight, out=out.view(-1, 128)[:4])


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "rope_write"])
def test_every_tile_of_the_search_space_is_right(op: str, gpu: Gpu, monkeypatch: Any) -> None:
    kernel = KERNELS[op]
    for problem in (in_dtype(kernel.CASES[i], "bf16") for i in (0, -1)):
        for config in kernel.search_space(problem, gpu):
            monkeypatch.setattr(kernel, "default", lambda *_, config=config: config)
            assert not faults(run_case(op, problem, 21, "cuda", gpu)), (problem, config)
        monkeypatch.undo()
    assert dataclasses.is_dataclass(config)
