"""What layers compute in one call on a CPU, residual to residual: the names of these operations and their
problems. Their kernels are kernels/cpu_*.py; layers on a GPU have the same problems, and do without numba.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ATTENTION_BLOCK = "attention_block"
DENSE_BLOCK = "dense_block"
MOE_BLOCK = "moe_block"
HEAD = "head"


@dataclass(frozen=True)
class AttentionProblem:
    """Sizes and kinds of one grouped-query attention layer. `rotary_dim`: how many of `head_dim` are rotated.
    `qk_norm`: "head" for a norm of each head, "row" for one over all heads of q and one over all of k, "" for
    none. `window_tokens`: a token sees only so many last ones. `sinks`: a logit per head that only takes part
    in the softmax. `output_gate`: what is attended is multiplied by the sigmoid of a gate that q_proj makes
    beside q. `o_bias`: the output map has one too."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: str
    bias: bool
    eps: float
    window_tokens: int | None = None
    sinks: bool = False
    output_gate: bool = False
    o_bias: bool = False
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class DenseProblem:
    """Sizes of one dense MLP layer."""

    hidden: int
    inter: int
    eps: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class MoeProblem:
    """Sizes and kinds of one MoE layer.

    `scoring`: "sigmoid" (with a correction bias that takes part in the choice only), "softmax" over all
    experts, or "softmax_top_k" over the chosen ones. `shared_experts`: how many experts of size `inter` every
    token takes; `shared_gate`: their sum is weighted by a sigmoid. `expert_groups` above 1 means
    group-limited routing. `biases`: the router and the experts have them. `activation` "silu_mul", or
    "clamped_swiglu" with `limit` and `alpha` (gpt-oss).
    """

    hidden: int
    inter: int
    experts: int
    top_k: int
    shared_experts: int
    scoring: str
    renormalise: bool
    routed_scale: float
    eps: float
    expert_groups: int = 1
    shared_gate: bool = False
    biases: bool = False
    activation: str = "silu_mul"
    limit: float = 0.0
    alpha: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class HeadProblem:
    """Sizes of the final norm and the output matrix."""

    hidden: int
    vocab: int
    eps: float
    dtype: torch.dtype = torch.float32
