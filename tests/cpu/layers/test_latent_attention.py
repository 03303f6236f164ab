"""Multi-head latent attention: the absorbed form against the expanded one written out here in float64, and
its rotary embedding against transformers' own functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import _compute_yarn_parameters
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

from firebox.attention import torch_reference
from firebox.cache.pool import LayerCache, PoolSizes, allocate_pool
from firebox.cache.specs import LatentSpec
from firebox.formats import bf16, int4_group
from firebox.formats.base import Format, PlainSlot, WeightSlot
from firebox.formats.kv import float32
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.latent_attention import LatentAttentionBlock
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotary_tables, rotate, rotate_pairs
from firebox.models.base import rotary
from firebox.models.deepseek_v3 import softmax_scale
from firebox.step import Pages, Step

HIDDEN, HEADS, LATENT, ROPE, NOPE, VALUE, Q_LATENT = 48, 5, 64, 16, 24, 20, 32
PAGE = 4
SCALE = 0.37
THETA = 100.0
CPU: Gpu = probe_cpu()


class Layer:
    """A layer with random weights, its cache, and the same weights in float64 by their checkpoint names."""

    def __init__(
        self,
        *,
        q_latent: int | None = Q_LATENT,
        interleaved: bool = True,
        kv_b_format: Format | None = None,
        latent_size: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        self.q_latent, self.interleaved, self.eps = q_latent, interleaved, eps
        plain = bf16.Format()

        def format_of(path: str) -> Format:
            return kv_b_format if kv_b_format is not None and path.endswith("kv_b_proj") else plain

        cpu = torch.device("cpu")
        build = Build(CPU, cpu, torch.float32, torch.float32, max_positions=64, format_of=format_of)
        spec = LatentSpec(LATENT, ROPE)
        self.tables = rotary_tables(64, ROPE, THETA, cpu)
        self.block = LatentAttentionBlock(
            build,
            RMSNorm(build, "norm", HIDDEN, eps),
            "a",
            0,
            spec,
            self.tables,
            heads=HEADS,
            nope_dim=NOPE,
            value_dim=VALUE,
            q_latent_dim=q_latent,
            scale=SCALE,
            interleaved=interleaved,
        )
        self.weights: dict[str, torch.Tensor] = {}
        torch.manual_seed(0)
        for slot in self.block.slots():
            assert isinstance(slot, PlainSlot | WeightSlot)
            self._fill(slot, latent_size)
        self.block.finish()
        self.caches = allocate_pool([spec], PoolSizes(32, PAGE), float32, cpu)

    def _fill(self, slot: PlainSlot | WeightSlot, latent_size: float) -> None:
        if isinstance(slot, PlainSlot):
            values = 1.0 + 0.3 * torch.randn(slot.target.shape)
            slot.fill({slot.name: values})
            self.weights[slot.name.removesuffix(".weight")] = values.double()
            return
        rows, columns = slot.target.shape
        if slot.format.name == "int4_group":
            stored = {
                "weight_packed": torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8)).int(),
                "weight_scale": torch.rand(rows, columns // 32) * 0.05,
                "weight_shape": torch.tensor([rows, columns]),
            }
        else:
            size = latent_size if "_a_" in slot.module else 1.0
            stored = {"weight": torch.randn(rows, columns) * size * columns**-0.5}
        slot.fill({f"{slot.module}.{part}": tensor for part, tensor in stored.items()})
        self.weights[slot.module] = slot.format.dequantise(stored, rows, columns).double()

    def step(self, pages: list[list[int]], chunks: list[tuple[int, int]]) -> Step:
        """A step of requests that hold `pages` and compute tokens [first, last) each."""
        table = torch.zeros(len(pages), max(map(len, pages)), dtype=torch.int64)
        for row, held in enumerate(pages):
            table[row, : len(held)] = torch.tensor(held)
        positions = [torch.arange(first, last) for first, last in chunks]
        slots = [table[row][place // PAGE] * PAGE + place % PAGE for row, place in enumerate(positions)]
        query_start = np.concatenate([[0], np.cumsum([last - first for first, last in chunks])])
        context = np.array([last for _, last in chunks])
        plan = torch_reference.plan(query_start, context, table)
        return Step(
            positions=torch.cat(positions),
            token_rows=torch.repeat_interleave(
                torch.arange(len(chunks)), torch.tensor([last - first for first, last in chunks])
            ),
            query_start=query_start,
            context_tokens=context,
            caches=self.caches,
            full=Pages(torch.cat(slots), table, plan),
        )

    def expanded(self, x: torch.Tensor) -> torch.Tensor:
        """One request's `x` [tokens, hidden] in float64: keys and values of every head computed, one softmax
        per head and token."""
        w, tokens = self.weights, x.shape[0]
        x = x.double()
        h = _norm(x, w["norm"], self.eps)
        if self.q_latent is None:
            q = h @ w["a.q_proj"].T
        else:
            q = _norm(h @ w["a.q_a_proj"].T, w["a.q_a_layernorm"], 1e-6) @ w["a.q_b_proj"].T
        q = q.view(tokens, HEADS, NOPE + ROPE)
        kv = h @ w["a.kv_a_proj_with_mqa"].T
        latent = _norm(kv[:, :LATENT], w["a.kv_a_layernorm"], 1e-6)
        k_rope = self._turned(kv[:, LATENT:].unsqueeze(1))
        q_rope = self._turned(q[..., NOPE:])
        both = (latent @ w["a.kv_b_proj"].T).view(tokens, HEADS, NOPE + VALUE)
        out = torch.zeros(tokens, HEADS, VALUE, dtype=torch.float64)
        for head in range(HEADS):
            key = torch.cat((both[:, head, :NOPE], k_rope[:, 0]), dim=-1)
            query = torch.cat((q[:, head, :NOPE], q_rope[:, head]), dim=-1)
            scores = (query @ key.T * SCALE).masked_fill(
                torch.ones(tokens, tokens).triu(1).bool(), -torch.inf
            )
            out[:, head] = scores.softmax(-1) @ both[:, head, NOPE:]
        return x + out.flatten(1) @ w["a.o_proj"].T

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Complex numbers times e^(i·angle): pairs are (2i, 2i + 1), or (i, i + half)."""
        half = ROPE // 2
        real, imaginary = (x[..., 0::2], x[..., 1::2]) if self.interleaved else (x[..., :half], x[..., half:])
        angles = torch.arange(x.shape[0]).double().unsqueeze(-1) * THETA ** (
            -torch.arange(half).double() / half
        )
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), dim=-1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_latent": None},
        {"interleaved": False},
        {"kv_b_format": int4_group.Format(32)},
        # latents so small that the inner norms' epsilon counts: 1e-6, whatever the outer one is
        {"latent_size": 1e-3, "eps": 1e-2},
    ],
    ids=["compressed queries", "plain queries", "halves", "int4 kv_b_proj", "small latents"],
)
def test_absorbed_equals_expanded(options: dict[str, Any]) -> None:
    layer = Layer(**options)
    xs = [torch.randn(n, HIDDEN) for n in (11, 6)]
    pages = [[7, 3, 9], [5, 1]]
    expected = [layer.expanded(x) for x in xs]
    found: list[list[torch.Tensor]] = [[], []]
    for chunks in ([(0, 5), (0, 1)], [(5, 10), (1, 2)], [(10, 11), (2, 6)]):
        x = torch.cat([x[first:last] for x, (first, last) in zip(xs, chunks, strict=True)])
        out = layer.block(x, layer.step(pages, chunks))
        first = chunks[0][1] - chunks[0][0]
        found[0].append(out[:first])
        found[1].append(out[first:])
    for parts, whole in zip(found, expected, strict=True):
        assert (torch.cat(parts).double() - whole).abs().max() < 2e-5 * whole.abs().max()


def test_one_row_a_token_is_kept() -> None:
    layer = Layer()
    (cache,) = layer.caches
    assert isinstance(cache, LayerCache)
    x = torch.randn(3, HIDDEN)
    layer.block(x, layer.step([[2]], [(0, 3)]))
    assert cache.k.shape[2:] == (1, LATENT + ROPE)
    assert cache.v.data_ptr() == cache.k.data_ptr() and cache.v.shape[-1] == LATENT
    h = _norm(x.double(), layer.weights["norm"], layer.eps)
    latent = (h @ layer.weights["a.kv_a_proj_with_mqa"].T)[:, :LATENT]
    expected = _norm(latent, layer.weights["a.kv_a_layernorm"], 1e-6)
    assert (cache.v[2, :3, 0].double() - expected).abs().max() < 1e-5
    written = cache.k.flatten(1).abs().sum(1).nonzero().flatten()
    assert written.tolist() == [2] and not cache.k[2, 3].any()


def test_inner_norms_have_transformers_epsilon() -> None:
    config = AutoConfig.for_model("deepseek_v3", hidden_size=HIDDEN, rms_norm_eps=1e-2, num_hidden_layers=1)
    attention = theirs.DeepseekV3Attention(config, 0)
    block = Layer(eps=1e-2).block
    assert block.kv_norm.eps == attention.kv_a_layernorm.variance_epsilon == 1e-6
    assert block.q_norm.eps == attention.q_a_layernorm.variance_epsilon == 1e-6


@pytest.mark.parametrize(
    ("ours", "function"),
    [
        (rotate_pairs, theirs.apply_rotary_pos_emb_interleave),
        (rotate, theirs.apply_rotary_pos_emb),
    ],
    ids=["pairs", "halves"],
)
def test_rotation_equals_transformers(
    ours: Callable[..., torch.Tensor], function: Callable[..., Any]
) -> None:
    q, k = torch.randn(9, 4, 32), torch.randn(9, 1, 32)
    cos, sin = (table[:9] for table in rotary_tables(16, 32, 50.0, torch.device("cpu")))
    wide = (torch.cat((table, table), dim=-1).unsqueeze(0) for table in (cos, sin))
    expected = function(q.unsqueeze(0), k.unsqueeze(0), *wide, unsqueeze_dim=2)
    for x, turned in zip((q, k), expected, strict=True):
        assert torch.equal(ours(x, cos.unsqueeze(1), sin.unsqueeze(1)), turned[0])


GPT_OSS = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
KIMI_K2 = {
    "model_type": "deepseek_v3",
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
NO_RAMP = {**KIMI_K2, "rope_scaling": {**KIMI_K2["rope_scaling"], "factor": 32.0, "beta_fast": 1.0}}
UNEQUAL = {**DEEPSEEK_V3, "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale_all_dim": 0.707}}
PUBLISHED = pytest.mark.parametrize(
    "config",
    [GPT_OSS, DEEPSEEK_V3, KIMI_K2, NO_RAMP, UNEQUAL],
    ids=["gpt-oss", "DeepSeek-V3", "Kimi-K2.5", "Kimi-K2-Instruct", "unequal mscales"],
)


@PUBLISHED
@pytest.mark.parametrize("truncate", [True, False, None])
def test_yarn_tables_equal_transformers(config: dict[str, Any], truncate: bool | None) -> None:
    """Up to position 100,000, where the last bit of a frequency is 2e-4 in the angle."""
    scaling = dict(config["rope_scaling"]) | ({} if truncate is None else {"truncate": truncate})
    config = config | {"rope_scaling": scaling}
    frequencies, factor = _compute_yarn_parameters(AutoConfig.for_model(**config))
    positions = 100_001
    theta, yarn = rotary(config, 1.0)
    cos, sin = rotary_tables(positions, 64, theta, torch.device("cpu"), yarn)
    angles = torch.arange(positions).float().unsqueeze(-1) * frequencies
    assert (cos - angles.cos() * factor).abs().max() < 1e-6
    assert (sin - angles.sin() * factor).abs().max() < 1e-6


@PUBLISHED
def test_softmax_scale_equals_transformers(config: dict[str, Any]) -> None:
    parameters = AutoConfig.for_model(**config).rope_parameters
    expected = theirs.yarn_apply_mscale(parameters, 192**-0.5)
    assert math.isclose(softmax_scale(config, 192), expected, rel_tol=1e-12)
    assert math.isclose(softmax_scale({"rope_theta": 10000.0}, 192), 192**-0.5)
