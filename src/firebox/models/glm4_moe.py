"""GLM-4.5, GLM-4.6, GLM-4.7 and their Air versions (`Glm4MoeForCausalLM`); the bundled firebox-tiny.

Paper: GLM-4.5, arXiv:2508.06471. Checkpoints: zai-org/GLM-4.7, zai-org/GLM-4.5-Air and others. Beside its
cousins: grouped-query attention with biased q, k, v; RMS norm of q and k per head (GLM-4.5 and up, not Air);
only the first half of each head is rotated; the first layers are dense; sigmoid router with a correction bias
that takes part in the choice but not in the weights; one shared expert; one MTP layer behind the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firebox.cache.specs import PagedSpec
from firebox.layers.attention import AttentionBlock
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.mtp import NOT_ANNOUNCED, MtpLayer, MtpNames, apart, stored_layers
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
    rotary_dim: int
    rotary: tuple[float, Yarn | None]
    attention_bias: bool
    use_qk_norm: bool
    rms_norm_eps: float
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    num_nextn_predict_layers: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads config.json. Raises UnsupportedModel for a value the code does not implement."""
        require(config, "hidden_act", "silu")
        require(config, "attention_dropout", 0, 0.0)
        heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
        head_dim = int(config.get("head_dim") or hidden // heads)
        parameters = config.get("rope_parameters") or {}
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_hidden_layers=need(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=need(config, "num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=int(head_dim * partial),
            rotary=rotary(config, 10000.0),
            attention_bias=bool(config.get("attention_bias", False)),
            use_qk_norm=bool(config.get("use_qk_norm", False)),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            n_routed_experts=need(config, "n_routed_experts"),
            n_shared_experts=need(config, "n_shared_experts"),
            num_experts_per_tok=need(config, "num_experts_per_tok"),
            moe_intermediate_size=need(config, "moe_intermediate_size"),
            first_k_dense_replace=need(config, "first_k_dense_replace"),
            norm_topk_prob=bool(config.get("norm_topk_prob", True)),
            routed_scaling_factor=need(config, "routed_scaling_factor", kind=float),
            n_group=int(config.get("n_group", 1)),
            topk_group=int(config.get("topk_group", 1)),
            num_nextn_predict_layers=int(config.get("num_nextn_predict_layers") or 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def attention(
    config: Config, build: Build, layer: int, spec: PagedSpec, tables: tuple[torch.Tensor, torch.Tensor]
) -> AttentionBlock:
    """Grouped-query attention with a partial rotary embedding."""
    prefix = f"model.layers.{layer}"
    return AttentionBlock(
        build,
        RMSNorm(build, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        f"{prefix}.self_attn",
        layer,
        spec,
        tables,
        heads=config.num_attention_heads,
        qk_norm="head" if config.use_qk_norm else "",
        bias=config.attention_bias,
    )


def mlp(config: Config, build: Build, layer: int) -> DenseBlock | MoeBlock:
    """Dense in the first layers; then sigmoid router, routed experts, one shared expert."""
    prefix = f"model.layers.{layer}"
    norm = RMSNorm(build, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
    if layer < config.first_k_dense_replace:
        return DenseBlock(build, norm, f"{prefix}.mlp", config.intermediate_size)
    return MoeBlock(
        build,
        norm,
        MoeNames.usual(f"{prefix}.mlp"),
        inter=config.moe_intermediate_size,
        experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=config.n_shared_experts,
        scoring="sigmoid",
        renormalise=config.norm_topk_prob,
        routed_scale=config.routed_scaling_factor,
        expert_groups=config.n_group,
        kept_groups=config.topk_group,
    )


class Model(Decoder):
    """The decoder with these blocks."""

    def __init__(self, config: Config, build: Build) -> None:
        embedding = Embedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size)
        theta, yarn = config.rotary
        tables = rotary_tables(build.max_positions, config.rotary_dim, theta, build.device, yarn)
        spec = PagedSpec(config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        blocks = [(attention(config, build, i, spec, tables), mlp(config, build, i)) for i in layers]
        norm = RMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        tied = embedding.weight if config.tie_word_embeddings else None
        head = Head(build, norm, "lm_head", config.vocab_size, tied)
        mtp, first, at = [], len(blocks), apart(build)
        stored = stored_layers(build, config.num_nextn_predict_layers, lambda i: f"model.layers.{first + i}.")
        for i in range(first, first + stored):
            block = attention(config, at, i, spec, tables), mlp(config, at, i)
            mtp.append(MtpLayer(at, MtpNames.appended(f"model.layers.{i}"), block, embedding, head, spec))
        super().__init__(embedding, blocks, head, [spec] * len(blocks), mtp)
        self._announced = config.num_nextn_predict_layers

    def unused(self, name: str) -> str | None:
        """A layer behind the last of which config.json says nothing."""
        if not self._announced and name.startswith(f"model.layers.{len(self.blocks)}."):
            return NOT_ANNOUNCED
        return super().unused(name)


TINY: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "eos_token_id": 0,
}
