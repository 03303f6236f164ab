"""DeepSeek-V3, V3.1 and R1 (`DeepseekV3ForCausalLM`); Kimi-K2 under its own name, see kimi_k2.py.

Paper: DeepSeek-V3, arXiv:2412.19437. Checkpoints: deepseek-ai/DeepSeek-V3, deepseek-ai/DeepSeek-R1. Beside
glm4_moe: multi-head latent attention over one compressed row per token, its rotary dimensions in pairs, YaRN
that also changes the softmax scale; experts are chosen within the best groups only. The MTP layer stands
behind the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from firebox.cache.specs import LatentSpec
from firebox.errors import UnsupportedModel
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.latent_attention import LatentAttentionBlock
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.mtp import NOT_ANNOUNCED, MtpLayer, MtpNames, apart, stored_layers
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import Yarn, mscale, rotary_tables
from firebox.models.base import need, require, rope_parameters, rotary


@dataclass(frozen=True)
class Config:
    """The values of config.json that the code relies on, under their own names. `softmax_scale`: what the
    scores are multiplied by. `prefix`: what every tensor's name begins with (kimi_k25)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rotary: tuple[float, Yarn | None]
    rope_interleave: bool
    softmax_scale: float
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
    prefix: str = ""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads config.json. Raises UnsupportedModel for a value the code does not implement."""
        heads = need(config, "num_attention_heads")
        require(config, "num_key_value_heads", heads, None)
        require(config, "hidden_act", "silu")
        require(config, "attention_bias", False)
        require(config, "attention_dropout", 0, 0.0)
        require(config, "scoring_func", "sigmoid")
        require(config, "topk_method", "noaux_tc")
        require(config, "moe_layer_freq", 1)
        require(config, "ep_size", 1)
        require(config, "pretraining_tp", 1)
        rank = config.get("q_lora_rank")
        experts, groups = need(config, "n_routed_experts"), need(config, "n_group")
        kept, top_k = need(config, "topk_group"), need(config, "num_experts_per_tok")
        _require_groups(experts, groups, kept, top_k)
        nope, rope = need(config, "qk_nope_head_dim"), need(config, "qk_rope_head_dim")
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=need(config, "hidden_size"),
            intermediate_size=need(config, "intermediate_size"),
            num_hidden_layers=need(config, "num_hidden_layers"),
            num_attention_heads=heads,
            q_lora_rank=None if rank is None else int(rank),
            kv_lora_rank=need(config, "kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=need(config, "v_head_dim"),
            rotary=rotary(config, 10000.0),
            rope_interleave=bool(config.get("rope_interleave", True)),
            softmax_scale=softmax_scale(config, nope + rope),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            n_routed_experts=experts,
            n_shared_experts=need(config, "n_shared_experts"),
            num_experts_per_tok=top_k,
            moe_intermediate_size=need(config, "moe_intermediate_size"),
            first_k_dense_replace=need(config, "first_k_dense_replace"),
            norm_topk_prob=bool(config.get("norm_topk_prob", True)),
            routed_scaling_factor=need(config, "routed_scaling_factor", kind=float),
            n_group=groups,
            topk_group=kept,
            num_nextn_predict_layers=int(config.get("num_nextn_predict_layers") or 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def softmax_scale(config: Mapping[str, Any], key_dim: int) -> float:
    """1/√key_dim, and where YaRN has an `mscale_all_dim`, times the square of its correction."""
    found = rope_parameters(config)
    _, yarn = rotary(config, 10000.0)
    correction = mscale(yarn.factor, float(found.get("mscale_all_dim") or 0.0)) if yarn is not None else 1.0
    return float(key_dim**-0.5 * correction**2)


def _require_groups(experts: int, groups: int, kept: int, top_k: int) -> None:
    """A group's score is the sum of its two best; the kept groups must hold enough experts to choose from."""
    fits = groups == 1 or (experts % groups == 0 and experts // groups >= 2)
    if not fits or not 1 <= kept <= groups or top_k > kept * (experts // groups):
        raise UnsupportedModel(
            f"config.json has n_group = {groups}, topk_group = {kept} and num_experts_per_tok = {top_k} for "
            f"{experts} experts; groups are equal and hold two or more, the kept ones all that are chosen"
        )


def attention(
    config: Config, build: Build, layer: int, spec: LatentSpec, tables: tuple[torch.Tensor, torch.Tensor]
) -> LatentAttentionBlock:
    """Multi-head latent attention."""
    prefix = f"{config.prefix}model.layers.{layer}"
    return LatentAttentionBlock(
        build,
        RMSNorm(build, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        f"{prefix}.self_attn",
        layer,
        spec,
        tables,
        heads=config.num_attention_heads,
        nope_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
        q_latent_dim=config.q_lora_rank,
        scale=config.softmax_scale,
        interleaved=config.rope_interleave,
    )


def mlp(config: Config, build: Build, layer: int) -> DenseBlock | MoeBlock:
    """Dense in the first layers; then sigmoid router limited to groups, routed experts, shared experts."""
    prefix = f"{config.prefix}model.layers.{layer}"
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
        self.config = config
        prefix = config.prefix
        embedding = Embedding(build, f"{prefix}model.embed_tokens", config.vocab_size, config.hidden_size)
        theta, yarn = config.rotary
        tables = rotary_tables(build.max_positions, config.qk_rope_head_dim, theta, build.device, yarn)
        spec = LatentSpec(config.kv_lora_rank, config.qk_rope_head_dim)
        layers = range(config.num_hidden_layers)
        blocks = [(attention(config, build, i, spec, tables), mlp(config, build, i)) for i in layers]
        norm = RMSNorm(build, f"{prefix}model.norm", config.hidden_size, config.rms_norm_eps)
        tied = embedding.weight if config.tie_word_embeddings else None
        head = Head(build, norm, f"{prefix}lm_head", config.vocab_size, tied)
        mtp, first, at = [], len(blocks), apart(build)
        path = f"{prefix}model.layers"
        stored = stored_layers(build, config.num_nextn_predict_layers, lambda i: f"{path}.{first + i}.")
        for i in range(first, first + stored):
            block = attention(config, at, i, spec, tables), mlp(config, at, i)
            mtp.append(MtpLayer(at, MtpNames.appended(f"{path}.{i}"), block, embedding, head, spec))
        super().__init__(embedding, blocks, head, [spec] * len(blocks), mtp)

    def unused(self, name: str) -> str | None:
        """A layer behind the last of which config.json says nothing."""
        behind = f"{self.config.prefix}model.layers.{len(self.blocks)}."
        if not self.config.num_nextn_predict_layers and name.startswith(behind):
            return NOT_ANNOUNCED
        return super().unused(name)


TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "eos_token_id": 0,
}
