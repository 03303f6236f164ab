"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder (`Qwen3MoeForCausalLM`).

Paper: Qwen3, arXiv:2505.09388. Checkpoints: Qwen/Qwen3-30B-A3B and others. Beside glm4_moe: the whole head is
rotated, no biases, softmax router without a correction bias, no shared expert; which layers are sparse
follows from `decoder_sparse_step` and `mlp_only_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firebox.cache.specs import PagedSpec
from firebox.errors import UnsupportedModel
from firebox.layers.attention import AttentionBlock
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import Yarn, rotary_tables
from firebox.models.base import need, require, rotary


@dataclass(frozen=True)
class Config:
    """The values of config.json that the code relies on, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: tuple[float, Yarn | None]
    attention_bias: bool
    rms_norm_eps: float
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    dense_layers: frozenset[int]
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads config.json. Raises UnsupportedModel for a value the code does not implement."""
        require(config, "hidden_act", "silu")
        require(config, "attention_dropout", 0, 0.0)
        require(config, "use_sliding_window", False, None)
        heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
        layers, sparse_step = need(config, "num_hidden_layers"), int(config.get("decoder_sparse_step", 1))
        if sparse_step < 1:
            raise UnsupportedModel(f"config.json has decoder_sparse_step = {sparse_step}; it is at least 1")
        mlp_only = set(config.get("mlp_only_layers") or ())
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=need(config, "num_key_value_heads"),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rotary=rotary(config, 1000000.0),
            attention_bias=bool(config.get("attention_bias", False)),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            num_experts=need(config, "num_experts", "num_local_experts"),
            num_experts_per_tok=need(config, "num_experts_per_tok"),
            moe_intermediate_size=need(config, "moe_intermediate_size"),
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            dense_layers=frozenset(i for i in range(layers) if i in mlp_only or (i + 1) % sparse_step != 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def attention(
    config: Config, build: Build, layer: int, spec: PagedSpec, tables: tuple[torch.Tensor, torch.Tensor]
) -> AttentionBlock:
    """Grouped-query attention, q and k normed per head, the whole head rotated."""
    prefix = f"model.layers.{layer}"
    return AttentionBlock(
        build,
        RMSNorm(build, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        f"{prefix}.self_attn",
        layer,
        spec,
        tables,
        heads=config.num_attention_heads,
        qk_norm="head",
        bias=config.attention_bias,
    )


def mlp(config: Config, build: Build, layer: int) -> DenseBlock | MoeBlock:
    """Dense in some layers; elsewhere softmax router and routed experts only."""
    prefix = f"model.layers.{layer}"
    norm = RMSNorm(build, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
    if layer in config.dense_layers:
        return DenseBlock(build, norm, f"{prefix}.mlp", config.intermediate_size)
    return MoeBlock(
        build,
        norm,
        MoeNames.usual(f"{prefix}.mlp"),
        inter=config.moe_intermediate_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=0,
        scoring="softmax",
        renormalise=config.norm_topk_prob,
        routed_scale=1.0,
    )


class Model(Decoder):
    """The decoder with these blocks."""

    def __init__(self, config: Config, build: Build) -> None:
        embedding = Embedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size)
        theta, yarn = config.rotary
        tables = rotary_tables(build.max_positions, config.head_dim, theta, build.device, yarn)
        spec = PagedSpec(config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        blocks = [(attention(config, build, i, spec, tables), mlp(config, build, i)) for i in layers]
        norm = RMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        tied = embedding.weight if config.tie_word_embeddings else None
        head = Head(build, norm, "lm_head", config.vocab_size, tied)
        super().__init__(embedding, blocks, head, [spec] * len(blocks))


TINY: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "eos_token_id": 0,
}
