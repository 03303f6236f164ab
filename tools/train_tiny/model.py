"""`firebox-tiny` in plain torch, written for training: GLM-4.7's architecture with dense expert arithmetic.

Differs from a server's model in one way: every expert is computed for every token, as one wide MLP whose
expert slices are scaled by the router's weights (zero for experts not chosen). For sixteen small experts that
is the fastest way to train, and it gives the same sums.

The router follows DeepSeek-V3 (https://arxiv.org/abs/2412.19437): scores = sigmoid(x W); the experts with the
largest score + bias are chosen; their weights are the scores *without* bias, divided by their sum, times
`routed_scaling_factor`. The bias has no gradient: after each step it moves towards the experts that had too
few tokens.

The draft (MTP) layer follows vLLM's `glm4_moe_mtp.py` and SGLang's `glm4_moe_nextn.py`:

    h' = eh_proj(concat[enorm(embed(x[t+1])), hnorm(h[t])])      the embedding comes first
    h' = decoder_layer(h')                                        a MoE layer; row t has the position of x[t]
    logits for x[t+2] = head(shared_head.norm(h'))

where h[t] is the main model's hidden state *after* its final norm (`model.norm`): both servers hand over what
the head reads. Row 0 is treated like every other row (as in SGLang; vLLM zeroes its embedding). `embed` and
`head` are the main model's own. To draft further tokens, h' after `shared_head.norm` takes the place of h[t].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_tiny.spec import Sizes

MASKED_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Norm(nn.Module):
    """RMSNorm, always in fp32: x [..., width] → fp32 [..., width]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotary_angles(tokens: int, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) [tokens, rotary_dim] fp32, each half a copy of the other ("rotate half" pairing).

    The angle is position * (1 / theta^e), rounded twice, as in transformers: one division instead changes an
    angle of 4,000 by up to 2e-4, and the logits by 6e-4.
    """
    exponents = torch.arange(0, sizes.rotary_dim, 2, device=device).float() / sizes.rotary_dim
    frequencies = 1.0 / sizes.rope_theta**exponents  # [rotary_dim / 2]
    angles = torch.arange(tokens, device=device).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # [tokens, rotary_dim]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first rotary_dim of each head; x [batch, heads, tokens, head_dim]."""
    cos, sin = angles
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: x [batch, tokens, hidden] → same."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.q_proj = nn.Linear(sizes.hidden, sizes.heads * sizes.head_dim)
        self.k_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim)
        self.v_proj = nn.Linear(sizes.hidden, sizes.kv_heads * sizes.head_dim)
        self.o_proj = nn.Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False)
        self.q_norm = Norm(sizes.head_dim, sizes.norm_eps)
        self.k_norm = Norm(sizes.head_dim, sizes.norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        v = self.v_proj(x).view(batch, tokens, -1, self.sizes.head_dim).transpose(1, 2)
        q = self.q_norm(self.q_proj(x).view(batch, tokens, -1, self.sizes.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, -1, self.sizes.head_dim)).transpose(1, 2)
        q, k = (
            rotate(q, angles).to(v.dtype),
            rotate(k, angles).to(v.dtype),
        )  # [batch, heads, tokens, head_dim]
        group = self.sizes.heads // self.sizes.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            with sdpa_kernel(MASKED_ATTENTION):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class DenseMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """x [tokens, hidden] fp32 → weights [tokens, experts] fp32, zero for the experts not chosen."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sizes.experts, sizes.hidden))
        self.register_buffer("bias", torch.zeros(sizes.experts))
        self.register_buffer("load", torch.zeros(sizes.experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x, self.weight))  # [tokens, experts]
        chosen = (scores.detach() + self.bias).topk(self.sizes.experts_per_token, dim=-1).indices
        mask = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        if self.training:
            self.load.copy_(mask.sum(dim=0))
        weights = scores * mask
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.sizes.routed_scaling_factor

    def balance(self, rate: float) -> None:
        """Moves the selection bias towards the experts whose load in the last step was below the mean."""
        self.bias += rate * torch.sign(self.load.mean() - self.load)


class SparseMLP(nn.Module):
    """Routed experts plus a shared expert: x [batch, tokens, hidden] → same."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.gate = Router(sizes)
        self.gate_proj = nn.Parameter(torch.empty(sizes.experts, sizes.expert_intermediate, sizes.hidden))
        self.up_proj = nn.Parameter(torch.empty(sizes.experts, sizes.expert_intermediate, sizes.hidden))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, sizes.expert_intermediate))
        self.shared_experts = DenseMLP(sizes.hidden, sizes.expert_intermediate)

    def forward(self, x: Tensor) -> Tensor:
        experts, intermediate, hidden = self.gate_proj.shape
        flat = x.reshape(-1, hidden)
        weights = self.gate(flat)  # [tokens, experts]
        inner = F.silu(F.linear(flat, self.gate_proj.flatten(0, 1))) * F.linear(
            flat, self.up_proj.flatten(0, 1)
        )
        inner = inner.view(-1, experts, intermediate) * weights.to(inner.dtype)[:, :, None]
        down = self.down_proj.transpose(0, 1).flatten(1)  # [hidden, experts * intermediate]
        return F.linear(inner.flatten(1), down).view(x.shape) + self.shared_experts(x)


class Layer(nn.Module):
    """Pre-norm decoder layer; dropout on both branches while training."""

    def __init__(self, sizes: Sizes, dense: bool, dropout: float):
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden, sizes.norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.norm_eps)
        self.mlp = DenseMLP(sizes.hidden, sizes.dense_intermediate) if dense else SparseMLP(sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), angles, mask))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DraftLayer(Layer):
    """The MTP layer: the decoder layer behind the last one, with its own way in and out."""

    def __init__(self, sizes: Sizes, dropout: float):
        super().__init__(sizes, dense=False, dropout=dropout)
        self.enorm = Norm(sizes.hidden, sizes.norm_eps)
        self.hnorm = Norm(sizes.hidden, sizes.norm_eps)
        self.eh_proj = nn.Linear(2 * sizes.hidden, sizes.hidden, bias=False)
        self.head_norm = Norm(sizes.hidden, sizes.norm_eps)


class TinyModel(nn.Module):
    """The whole model. `forward` gives hidden states after the final norm; `head` turns them into logits."""

    def __init__(self, sizes: Sizes, dropout: float = 0.0):
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(
            Layer(sizes, i < sizes.dense_layers, dropout) for i in range(sizes.layers)
        )
        self.norm = Norm(sizes.hidden, sizes.norm_eps)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        self.mtp = DraftLayer(sizes, dropout)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [batch, tokens]; mask [batch, 1, tokens, tokens] or None → [batch, tokens, hidden]."""
        angles = rotary_angles(ids.shape[1], self.sizes, ids.device)
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.norm(x)

    def draft(self, hidden: Tensor, next_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [batch, tokens, hidden] from `forward`, next_ids[t] = x[t+1] → as `forward`, for x[t+2]."""
        angles = rotary_angles(next_ids.shape[1], self.sizes, next_ids.device)
        embedded = self.dropout(self.mtp.enorm(self.embed_tokens(next_ids)))
        x = self.mtp.eh_proj(torch.cat([embedded, self.mtp.hnorm(hidden)], dim=-1))
        return self.mtp.head_norm(self.mtp(x, angles, mask))

    def routers(self) -> list[Router]:
        """Every router, the MTP layer's last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                narrow = "embed_tokens" in name or name == "head.weight"
                nn.init.normal_(parameter, std=0.02 if narrow else 0.5 * parameter.shape[-1] ** -0.5)
