"""Qwen3.5-397B-A17B, Qwen3.5-122B-A10B, Qwen3.5-35B-A3B (`Qwen3_5MoeForConditionalGeneration`): their
language model.

Checkpoints: Qwen/Qwen3.5-397B-A17B and others. The vision tower is not read. Beside qwen3_moe: three layers
of four are gated delta nets with a recurrent state, the others attention with an output gate and a quarter of
each head rotated (text has one position for all three sections of its rotary embedding); norms store weight −
1; one shared expert weighted by a sigmoid; experts usually all in one tensor; one MTP layer with attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firebox.cache.specs import PagedSpec, RecurrentSpec
from firebox.errors import UnsupportedModel
from firebox.layers.attention import AttentionBlock
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.embedding import Embedding
from firebox.layers.gated_delta import GatedDeltaBlock
from firebox.layers.head import Head
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.mtp import NOT_ANNOUNCED, MtpLayer, MtpNames, apart, stored_layers
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import Yarn, rotary_tables
from firebox.models.base import need, require, rotary


@dataclass(frozen=True)
class Config:
    """The values of config.json that the code relies on, under their own names. `prefix`: where the language
    model's tensors are."""

    prefix: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rotary: tuple[float, Yarn | None]
    attention_bias: bool
    rms_norm_eps: float
    layer_types: tuple[str, ...]
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_experts: int
    mtp_num_hidden_layers: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads config.json, its text_config merged over it. Raises UnsupportedModel for a value the code
        does not implement."""
        require(config, "hidden_act", "silu")
        require(config, "attention_dropout", 0, 0.0)
        require(config, "attn_output_gate", True)
        require(config, "mtp_num_hidden_layers", 0, 1, None)
        require(config, "mtp_use_dedicated_embeddings", False, None)
        layers, inter = need(config, "num_hidden_layers"), need(config, "moe_intermediate_size")
        interval = int(config.get("full_attention_interval", 4))
        types = config.get("layer_types") or [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)
        ]
        for kind in types:
            require({"layer_types": kind}, "layer_types", "full_attention", "linear_attention")
        shared = need(config, "shared_expert_intermediate_size")
        if shared % inter:
            raise UnsupportedModel(
                f"config.json has shared_expert_intermediate_size = {shared}; "
                f"this code supports multiples of moe_intermediate_size = {inter}"
            )
        heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
        head_dim = int(config.get("head_dim") or hidden // heads)
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
        return cls(
            prefix="model.language_model" if "text_config" in config else "model",
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=need(config, "num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=int(head_dim * partial),
            rotary=rotary(config, 10000000.0),
            attention_bias=bool(config.get("attention_bias", False)),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            layer_types=tuple(types),
            linear_conv_kernel_dim=need(config, "linear_conv_kernel_dim"),
            linear_key_head_dim=need(config, "linear_key_head_dim"),
            linear_value_head_dim=need(config, "linear_value_head_dim"),
            linear_num_key_heads=need(config, "linear_num_key_heads"),
            linear_num_value_heads=need(config, "linear_num_value_heads"),
            num_experts=need(config, "num_experts", "num_local_experts"),
            num_experts_per_tok=need(config, "num_experts_per_tok"),
            moe_intermediate_size=inter,
            shared_experts=shared // inter,
            mtp_num_hidden_layers=int(config.get("mtp_num_hidden_layers") or 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


MTP = MtpNames("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")


def norm(config: Config, build: Build, name: str) -> RMSNorm:
    """A norm whose checkpoint stores weight − 1."""
    return RMSNorm(build, name, config.hidden_size, config.rms_norm_eps, plus_one=True)


def attention(
    config: Config,
    build: Build,
    path: str,
    layer: int,
    spec: PagedSpec,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> AttentionBlock:
    """Grouped-query attention with an output gate. `path`: what the layer's names begin with."""
    return AttentionBlock(
        build,
        norm(config, build, f"{path}.input_layernorm"),
        f"{path}.self_attn",
        layer,
        spec,
        tables,
        norm_plus_one=True,
        heads=config.num_attention_heads,
        qk_norm="head",
        bias=config.attention_bias,
        o_bias=config.attention_bias,
        output_gate=True,
    )


def linear_attention(
    config: Config, build: Build, path: str, layer: int, spec: RecurrentSpec
) -> GatedDeltaBlock:
    """A gated delta net."""
    return GatedDeltaBlock(
        build,
        norm(config, build, f"{path}.input_layernorm"),
        f"{path}.linear_attn",
        layer,
        spec,
        key_heads=config.linear_num_key_heads,
    )


def experts(config: Config, build: Build, path: str) -> MoeBlock:
    """Softmax router, routed experts, a shared expert behind a gate."""
    return MoeBlock(
        build,
        norm(config, build, f"{path}.post_attention_layernorm"),
        MoeNames.usual(f"{path}.mlp", shared="shared_expert"),
        inter=config.moe_intermediate_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=config.shared_experts,
        shared_gate=True,
        scoring="softmax",
        renormalise=True,
        routed_scale=1.0,
    )


class Model(Decoder):
    """The decoder with these blocks."""

    def __init__(self, config: Config, build: Build) -> None:
        self.config = config
        embedding = Embedding(build, f"{config.prefix}.embed_tokens", config.vocab_size, config.hidden_size)
        theta, yarn = config.rotary
        tables = rotary_tables(build.max_positions, config.rotary_dim, theta, build.device, yarn)
        paged = PagedSpec(config.num_key_value_heads, config.head_dim)
        key_rows = config.linear_num_key_heads * config.linear_key_head_dim
        value_rows = config.linear_num_value_heads * config.linear_value_head_dim
        recurrent = RecurrentSpec(
            conv_channels=2 * key_rows + value_rows,
            conv_taps=config.linear_conv_kernel_dim - 1,
            heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )
        blocks, specs = [], []
        for layer, kind in enumerate(config.layer_types):
            path, is_full = f"{config.prefix}.layers.{layer}", kind == "full_attention"
            mixer = (
                attention(config, build, path, layer, paged, tables)
                if is_full
                else linear_attention(config, build, path, layer, recurrent)
            )
            blocks.append((mixer, experts(config, build, path)))
            specs.append(paged if is_full else recurrent)
        tied = embedding.weight if config.tie_word_embeddings else None
        last = norm(config, build, f"{config.prefix}.norm")
        head = Head(build, last, "lm_head", config.vocab_size, tied)
        mtp, at, path = [], apart(build), "mtp.layers.0"
        if stored_layers(build, config.mtp_num_hidden_layers, lambda i: "mtp."):
            block = attention(config, at, path, len(blocks), paged, tables), experts(config, at, path)
            mtp.append(MtpLayer(at, MTP, block, embedding, head, paged, norm_plus_one=True))
        super().__init__(embedding, blocks, head, specs, mtp)

    def unused(self, name: str) -> str | None:
        """The vision tower, and an MTP layer of which config.json says nothing."""
        if not self.config.mtp_num_hidden_layers and name.startswith("mtp."):
            return NOT_ANNOUNCED
        if name.startswith("model.visual."):
            return "only the language model is served"
        return super().unused(name)


TINY: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "full_attention_interval": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": 0,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
}
