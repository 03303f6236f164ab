"""Every attention backend of a CPU against the dense formula in float64, over ragged steps and scattered
pages.

Everything a backend must not read is NaN: pages no request owns, page 0, and the rows behind a request's last
token.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import numpy as np
import pytest
import torch

from firebox.attention import base
from firebox.attention.base import KvSpec, select
from firebox.cache.pool import LayerCache
from firebox.cache.specs import LatentSpec, PagedSpec, WindowSpec
from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.formats.kv import bf16, float32
from firebox.hardware.base import Gpu, find_gpu, known_gpus
from firebox.hardware.probe import probe_cpu

CPU = probe_cpu()
ACCEPTING = [
    name for name in names("attention") if load("attention", name).accepts(4, PagedSpec(2, 64), CPU) is None
]
BACKENDS = [load("attention", name) for name in ACCEPTING]

# name → (tokens in this step, tokens in the cache after it) of each request
STEPS = {
    "one token of one request": [(1, 1)],
    "a whole prompt": [(23, 23)],
    "a chunk behind a prefix": [(9, 40)],
    "a chunk that ends on a page border": [(8, 32)],
    "decode of several lengths": [(1, 1), (1, 16), (1, 17), (1, 100), (1, 33)],
    "chunks and decode mixed": [(5, 5), (1, 70), (16, 48), (1, 2), (31, 31)],
    "requests without a token": [(0, 0), (3, 20), (0, 17), (1, 5), (0, 0)],
}
# heads, kv_heads, head_dim
HEADS = [(4, 4, 16), (4, 2, 32), (6, 1, 8), (8, 2, 24), (1, 1, 64)]


@dataclasses.dataclass
class Case:
    """A step's tensors, and per request the keys and values that its cache holds, in order."""

    q: torch.Tensor
    cache: LayerCache
    query_start: np.ndarray
    context_tokens: np.ndarray
    page_table: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def run(self, backend: ModuleType, scale: float) -> torch.Tensor:
        plan = backend.plan(self.query_start, self.context_tokens, self.page_table)
        return backend.run(self.q, self.cache, plan, scale)


def make(
    step: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_tokens: int = 16,
) -> Case:
    generator = torch.Generator().manual_seed(len(step) + heads)
    counts, contexts = [count for count, _ in step], [context for _, context in step]
    owned = [-(-context // page_tokens) for context in contexts]
    order = (torch.randperm(sum(owned) + 3, generator=generator) + 1).tolist()  # three pages belong to no one
    page_table = torch.zeros(len(step), max(*owned, 1) + 1, dtype=torch.int64)
    shape = (len(order) + 1, page_tokens, kv_heads, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    cache = LayerCache(k, v, float32 if dtype == torch.float32 else bf16)
    keys, values = [], []
    for r, (context, pages) in enumerate(zip(contexts, owned, strict=True)):
        page_ids = [order.pop() for _ in range(pages)]
        page_table[r, :pages] = torch.tensor(page_ids, dtype=torch.int64)
        k, v = (torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        for position in range(context):
            page, row = page_ids[position // page_tokens], position % page_tokens
            cache.k[page, row], cache.v[page, row] = k[position], v[position]
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(counts), heads, head_dim, generator=generator).to(dtype)
    return Case(q, cache, np.cumsum([0, *counts]), np.array(contexts), page_table, keys, values)


def dense(case: Case, scale: float) -> torch.Tensor:
    """One query and one head at a time, in float64."""
    heads = case.q.shape[1]
    out = torch.empty(case.q.shape, dtype=torch.float64)
    for r, context in enumerate(case.context_tokens.tolist()):
        first, last = case.query_start[r], case.query_start[r + 1]
        group = heads // case.keys[r].shape[1]
        for t in range(first, last):
            seen = context - (last - 1 - t)
            for head in range(heads):
                k = case.keys[r][:seen, head // group].double()
                v = case.values[r][:seen, head // group].double()
                weights = (k @ case.q[t, head].double() * scale).exp()
                out[t, head] = weights @ v / weights.sum()
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_dense_formula(
    backend: ModuleType, step: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    # float32 sums of up to a hundred terms: 1e-7 each; bf16 rounds the result to 2^-9, or 1e-3 RMS
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        case = make(STEPS[step], heads, kv_heads, head_dim, dtype)
        assert backend.accepts(heads, PagedSpec(kv_heads, head_dim), CPU) is None
        scale = head_dim**-0.5
        found = case.run(backend, scale)
        assert found.shape == case.q.shape and found.dtype == dtype
        assert relative_error(found, dense(case, scale)) < tolerance


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_page_size_and_scale_are_taken_as_given(backend: ModuleType) -> None:
    for page_tokens in (1, 4, 64):
        for scale in (1.0, 0.01):
            case = make(STEPS["chunks and decode mixed"], 4, 2, 16, torch.float32, page_tokens)
            assert relative_error(case.run(backend, scale), dense(case, scale)) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_large_scores_do_not_overflow(backend: ModuleType) -> None:
    """Scores of about ±300: a softmax that does not subtract the maximum gives inf or NaN."""
    case = make(STEPS["chunks and decode mixed"], 4, 2, 16, torch.float32)
    found = case.run(backend, 25.0)
    assert found.isfinite().all()
    first = case.values[1][:, 0]  # request 1 decodes one token: nearly all weight is on its best key
    scores = case.keys[1][:, 0] @ case.q[5, 0] * 25.0
    weights = (scores.double() - scores.max()).exp()
    assert torch.allclose(found[5, 0].double(), (weights / weights.sum()) @ first.double(), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_the_inputs_stay_as_they_were(backend: ModuleType) -> None:
    case = make(STEPS["chunks and decode mixed"], 4, 2, 16, torch.float32)
    before = [tensor.clone() for tensor in (case.q, case.cache.k, case.cache.v, case.page_table)]
    case.run(backend, 0.25)
    for tensor, copy in zip((case.q, case.cache.k, case.cache.v, case.page_table), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


# ---- select


def test_auto_takes_one_that_accepts() -> None:
    spec = PagedSpec(2, 16)
    assert select(4, spec, CPU).accepts(4, spec, CPU) is None


@pytest.mark.parametrize("name", ACCEPTING)
def test_a_backend_by_its_name(name: str) -> None:
    assert select(4, PagedSpec(2, 16), CPU, name) is load("attention", name)


@pytest.mark.parametrize("gpu", known_gpus().values(), ids=lambda gpu: gpu.name)
def test_a_gpu_gets_the_kernels_and_the_reference_for_what_they_lack(gpu: Gpu) -> None:
    triton_paged, reference = (load("attention", name) for name in ("triton_paged", "torch_reference"))
    for spec in (PagedSpec(8, 128), PagedSpec(2, 256), WindowSpec(8, 64, 128), LatentSpec(512, 64)):
        assert select(64, spec, gpu) is triton_paged
    for spec in (PagedSpec(8, 96), PagedSpec(3, 128), LatentSpec(256, 64)):
        assert select(64, spec, gpu) is reference


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PagedSpec(8, 96), "supports head_dim 64, 128, 192 and 256, not 96"),
        (PagedSpec(3, 128), "not 64 over 3 key heads"),
        (LatentSpec(256, 64), "supports latent rows of 512 \\+ 64 columns, not 256 \\+ 64"),
    ],
)
def test_the_gpu_kernels_say_what_they_lack(spec: KvSpec, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        select(64, spec, find_gpu("gb10"), "triton_paged")
    with pytest.raises(ConfigError, match="runs on NVIDIA GPUs"):
        select(64, spec, CPU, "triton_paged")


def test_an_unknown_backend_is_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="'flash9'") as caught:
        select(4, PagedSpec(2, 16), CPU, "flash9")
    assert all(name in str(caught.value.hint) for name in names("attention"))


class Refusing:
    """A backend for no machine."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def accepts(self, heads: int, spec: PagedSpec, gpu: object) -> str | None:
        return f"{self.reason} {heads} heads of {spec.head_dim}"


def test_when_none_accepts_each_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"first": Refusing("cannot do"), "second": Refusing("will not do")}
    monkeypatch.setattr(base, "names", lambda room_name: tuple(room))
    monkeypatch.setattr(base, "load", lambda room_name, name: room[name])
    with pytest.raises(ConfigError, match="first cannot do 4 heads of 16; second will not do 4 heads of 16"):
        select(4, PagedSpec(2, 16), CPU)
    with pytest.raises(ConfigError, match="second will not do 4 heads of 16") as caught:
        select(4, PagedSpec(2, 16), CPU, "second")
    assert "first" not in str(caught.value)


def test_one_that_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"first": Refusing("cannot do"), "second": load("attention", "torch_reference")}
    monkeypatch.setattr(base, "names", lambda room_name: tuple(room))
    monkeypatch.setattr(base, "load", lambda room_name, name: room[name])
    assert select(4, PagedSpec(2, 16), CPU) is room["second"]
