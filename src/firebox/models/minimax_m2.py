"""MiniMax-M2, M2.1, M2.5 and M2.7 (`MiniMaxM2ForCausalLM`).

No paper; announced at www.minimax.io/news/minimax-m2. Checkpoints: MiniMaxAI/MiniMax-M2 and others, in FP8
with blocks of 128 × 128. Beside glm4_moe: q and k are normed over all their heads at once, not head by head;
no biases; every layer is sparse, without a shared expert; the chosen experts' weights always sum to 1; the
experts are called w1 (gate), w3 (up) and w2 (down) under `block_sparse_moe`. config.json speaks of MTP
modules, but no published checkpoint holds their tensors; if one did, they would stand behind the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firebox.cache.specs import PagedSpec
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
    rms_norm_eps: float
    num_local_experts: int
    num_experts_per_tok: int
    num_mtp_modules: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads config.json. Raises UnsupportedModel for a value the code does not implement."""
        require(config, "hidden_act", "silu")
        require(config, "attention_dropout", 0, 0.0)
        require(config, "scoring_func", "sigmoid")
        require(config, "use_routing_bias", True)
        require(config, "use_qk_norm", True)
        require(config, "qk_norm_type", "per_layer")
        require(config, "shared_intermediate_size", 0, None)
        require(config, "sliding_window", None)
        for kind in config.get("attn_type_list") or ():
            require({"attn_type_list": kind}, "attn_type_list", 1)  # 0 was the linear attention of M1
        for part in ("full_attention", "linear_attention", "mlp"):
            for factor in ("alpha", "beta"):
                require(config, f"layernorm_{part}_{factor}", 1, 1.0)
        heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
        head_dim = int(config.get("head_dim") or hidden // heads)
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_hidden_layers=need(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=need(config, "num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=_rotary_dim(config, head_dim),
            rotary=rotary(config, 5000000.0),
            rms_norm_eps=need(config, "rms_norm_eps", kind=float),
            num_local_experts=need(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=need(config, "num_experts_per_tok"),
            num_mtp_modules=int(config.get("num_mtp_modules") or 0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """`rotary_dim`, or the share of the head that `partial_rotary_factor` says; if both, they must agree."""
    sources = (config.get("rope_parameters") or {}, config)
    shares = [source["partial_rotary_factor"] for source in sources if "partial_rotary_factor" in source]
    found = {int(head_dim * share) for share in shares}
    if config.get("rotary_dim") is not None:
        found.add(int(config["rotary_dim"]))
    if len(found) > 1:
        raise UnsupportedModel(
            f"config.json's rotary_dim and partial_rotary_factor mean {sorted(found)} dimensions; "
            f"this code supports one"
        )
    return found.pop() if found else head_dim


def attention(
    config: Config, build: Build, layer: int, spec: PagedSpec, tables: tuple[torch.Tensor, torch.Tensor]
) -> AttentionBlock:
    """Grouped-query attention, q and k normed over all heads, a part of each head rotated."""
    prefix = f"model.layers.{layer}"
    return AttentionBlock(
        build,
        RMSNorm(build, f"{prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        f"{prefix}.self_attn",
        layer,
        spec,
        tables,
        heads=config.num_attention_heads,
        qk_norm="row",
        bias=False,
    )


def mlp(config: Config, build: Build, layer: int) -> MoeBlock:
    """Sigmoid router with a correction bias, routed experts only."""
    prefix = f"model.layers.{layer}"
    moe = f"{prefix}.block_sparse_moe"
    return MoeBlock(
        build,
        RMSNorm(build, f"{prefix}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
        MoeNames(
            router=f"{moe}.gate",
            expert=f"{moe}.experts.{{e}}",
            correction_bias=f"{moe}.e_score_correction_bias",
            gate="w1",
            up="w3",
            down="w2",
        ),
        inter=config.intermediate_size,
        inter_key="intermediate_size",
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        shared_experts=0,
        scoring="sigmoid",
        renormalise=True,
        routed_scale=1.0,
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
        super().__init__(embedding, blocks, head, [spec] * len(blocks))
        self._mtp_layers = range(len(blocks), len(blocks) + config.num_mtp_modules)

    def unused(self, name: str) -> str | None:
        """MTP modules would stand behind the last layer."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) in self._mtp_layers:
            return "multi-token prediction (MTP) is not used yet"
        return super().unused(name)


TINY: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
    "rope_theta": 5000000.0,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "attn_type_list": [1, 1],
    "rms_norm_eps": 1e-6,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "num_mtp_modules": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 0,
}
