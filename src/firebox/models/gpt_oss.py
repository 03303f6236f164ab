"""gpt-oss-20b and gpt-oss-120b (`GptOssForCausalLM`).

Paper: gpt-oss model card, arXiv:2508.10925. Checkpoints: openai/gpt-oss-120b, openai/gpt-oss-20b, experts in
MXFP4. Beside its cousins: every second layer attends to a window only; each head has a sink, a learned logit
that takes part in the softmax and has no value; YaRN whose ramp may begin between two dimensions
(`truncate` false); biases on q, k, v and o, on the router and on the experts; softmax over the chosen experts
only; SwiGLU whose gate and up are clamped at `swiglu_limit`, with 1 added to up. All experts of a layer are
one tensor, gate and up rows in turn, and transposed where they are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firebox.cache.specs import PagedSpec, WindowSpec
from firebox.errors import UnsupportedModel
from firebox.layers.attention import AttentionBlock
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import Yarn, rotary_tables
from firebox.models.base import need, require, rotary


@dataclass(frozen=True)
class Config:
    """The values of config.json that the code relies on, under their own names. `windows`: for each layer its
    `sliding_window`, or None where it sees everything."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rotary: tuple[float, Yarn | None]
    attention_bias: bool
    rms_norm_eps: float
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_limit: float
    swiglu_alpha: float
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads config.json. Raises UnsupportedModel for a value the code does not implement."""
        require(config, "hidden_act", "silu")
        require(config, "attention_dropout", 0, 0.0)
        # without either, transformers would stretch with numbers of its own
        need(config, "rope_parameters", "rope_scaling", kind=dict)
        heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=need(config, "num_key_value_heads"),
            head_dim=int(config.get("head_dim") or hidden // heads),
            windows=_windows(config),
            rotary=rotary(config, 150000.0),
            attention_bias=bool(config.get("attention_bias", True)),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            num_local_experts=need(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=need(config, "num_experts_per_tok", "experts_per_token"),
            swiglu_limit=float(config.get("swiglu_limit", 7.0)),
            swiglu_alpha=float(config.get("swiglu_alpha", 1.702)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """From `layer_types`; without them every second layer has a window, the first among them."""
    layers = need(config, "num_hidden_layers")
    kinds = ("sliding_attention", "full_attention")
    types = config.get("layer_types") or [kinds[i % 2] for i in range(layers)]
    if len(types) != layers:
        raise UnsupportedModel(f"config.json has {len(types)} layer_types for {layers} layers")
    for kind in types:
        require({"layer_types": kind}, "layer_types", *kinds)
    window = need(config, "sliding_window") if kinds[0] in types else None
    return tuple(window if kind == kinds[0] else None for kind in types)


def attention(
    config: Config, build: Build, layer: int, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[AttentionBlock, PagedSpec | WindowSpec]:
    """Grouped-query attention with sinks, over everything or over a window, and what it caches."""
    prefix, window = f"model.layers.{layer}", config.windows[layer]
    heads = config.num_key_value_heads, config.head_dim
    spec = PagedSpec(*heads) if window is None else WindowSpec(*heads, window)
    block = AttentionBlock(
        build,
        RMSNorm(build, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        f"{prefix}.self_attn",
        layer,
        spec,
        tables,
        heads=config.num_attention_heads,
        qk_norm="",
        bias=config.attention_bias,
        o_bias=config.attention_bias,
        sinks=True,
    )
    return block, spec


def mlp(config: Config, build: Build, layer: int) -> MoeBlock:
    """Router with a bias, softmax over the chosen experts, experts with biases and a clamped SwiGLU."""
    prefix = f"model.layers.{layer}"
    return MoeBlock(
        build,
        RMSNorm(build, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
        MoeNames(router=f"{prefix}.mlp.router", fused=f"{prefix}.mlp.experts"),
        interleaved=True,
        inter=config.intermediate_size,
        inter_key="intermediate_size",
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=0,
        scoring="softmax_top_k",
        renormalise=False,  # the softmax has done it
        routed_scale=1.0,
        biases=True,
        activation="clamped_swiglu",
        limit=config.swiglu_limit,
        alpha=config.swiglu_alpha,
    )


class Model(Decoder):
    """The decoder with these blocks."""

    def __init__(self, config: Config, build: Build) -> None:
        embedding = Embedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size)
        theta, yarn = config.rotary
        tables = rotary_tables(build.max_positions, config.head_dim, theta, build.device, yarn)
        blocks, specs = [], []
        for layer in range(len(config.windows)):
            attend, spec = attention(config, build, layer, tables)
            blocks.append((attend, mlp(config, build, layer)))
            specs.append(spec)
        norm = RMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        tied = embedding.weight if config.tie_word_embeddings else None
        head = Head(build, norm, "lm_head", config.vocab_size, tied)
        super().__init__(embedding, blocks, head, specs)


TINY: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 24,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "swiglu_limit": 1.0,  # low enough that these weights reach it
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "eos_token_id": 0,
}
