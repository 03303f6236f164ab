"""What `firebox-tiny` is: its sizes, its special tokens, its training recipe, and where its files go.

The sizes follow GLM-4.7 (`Glm4MoeForCausalLM`): one dense layer, then mixture-of-experts layers with one
shared expert, grouped-query attention with a bias, query/key norms and rotary embedding on half of each head,
and one multi-token-prediction (MTP) layer stored behind the last layer. 11.56 M parameters in the file, 23.1
MB in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / "build" / "train_tiny"
ASSET = REPOSITORY / "src" / "firebox" / "assets" / "firebox-tiny"

END, SYSTEM, USER, ASSISTANT, OBSERVATION = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
SPECIAL_TOKENS = (END, SYSTEM, USER, ASSISTANT, OBSERVATION)
END_ID = 0


@dataclass(frozen=True)
class Sizes:
    """Every dimension of the model; the defaults are `firebox-tiny`."""

    vocab: int = 3072
    hidden: int = 256
    layers: int = 4
    dense_layers: int = 1
    dense_intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    rope_theta: float = 10000.0
    experts: int = 16
    experts_per_token: int = 4
    expert_intermediate: int = 128
    routed_scaling_factor: float = 2.5
    norm_eps: float = 1e-5
    max_context_tokens: int = 4096


@dataclass(frozen=True)
class Recipe:
    """The training run.

    `long_share` of the steps, at the end, use windows of the whole context; from the share `repeat_start`
    of the steps on, each batch has `repeat_rows` rows against endless repetition.
    """

    steps: int = 7000
    batch_tokens: int = 32768
    window_tokens: int = 2048
    long_window_tokens: int = 4096
    long_share: float = 0.25
    chat_share: float = 0.10
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    weight_decay: float = 0.3
    dropout: float = 0.1
    balance_rate: float = 1e-3
    mtp_weight: float = 0.2
    mtp_distill_weight: float = 0.2
    repeat_start: float = 0.9
    repeat_rows: int = 1
    repeat_weight: float = 0.25
    seed: int = 1
