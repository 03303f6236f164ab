"""In which formats the checkpoints of each architecture are published: one table, which
tests/cpu/models/test_quantised_checkpoints.py runs and docs/models.md shows. Unquantised ones exist of all;
tests/cpu/models/test_models_equal_transformers.py runs those.

`example` names a checkpoint in this format, of the maker or, where the maker has none, of someone else.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = ("self_attn",)
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # not the experts': those have their index between
ALL_BUT_EXPERTS = (*ATTENTION, "shared_experts", *DENSE)
NARROW = ("in_proj_a", "in_proj_b", "shared_expert_gate")  # fewer rows than a block


@dataclass(frozen=True)
class Published:
    """One row. `model`: a file of models/; `recipe`: the name of one in tests/support/quantise.py; `plain`:
    parts of module paths that stay unquantised besides router, embedding and output matrix."""

    model: str
    recipe: str
    example: str
    plain: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Of the row's test."""
        return f"{self.model}-{self.recipe}"


PUBLISHED = (
    Published("glm4_moe", "fp8_channel", "zai-org/GLM-4.7-FP8"),
    Published("glm4_moe", "nvfp4", "nvidia/GLM-4.7-NVFP4", ATTENTION),
    Published("glm4_moe", "nvfp4_ct", "compressed-tensors' spelling, by llm-compressor"),
    Published("glm4_moe", "int4_group", "by llm-compressor, often named AWQ"),
    Published("glm4_moe", "awq", "QuantTrio/GLM-4.7-AWQ"),
    Published("glm4_moe", "gptq", "by GPTQModel"),
    Published("glm4_moe", "fp8_block", "by transformers' FineGrainedFP8Config"),
    Published("qwen3_moe", "fp8_block", "Qwen/Qwen3-30B-A3B-FP8"),
    Published("qwen3_moe", "gptq", "Qwen/Qwen3-30B-A3B-GPTQ-Int4"),
    Published("qwen3_moe", "awq", "by AutoAWQ"),
    Published("qwen3_moe", "int4_group", "by llm-compressor, often named AWQ"),
    Published("qwen3_moe", "nvfp4", "by modelopt", ATTENTION),
    Published("gpt_oss", "mxfp4", "openai/gpt-oss-120b", ATTENTION),
    Published("deepseek_v3", "fp8_block", "deepseek-ai/DeepSeek-V3"),
    Published("deepseek_v3", "nvfp4", "by modelopt", ATTENTION),
    Published("deepseek_v3", "awq", "by AutoAWQ"),
    Published("kimi_k2", "fp8_block", "moonshotai/Kimi-K2-Instruct"),
    Published("kimi_k2", "int4_group", "moonshotai/Kimi-K2-Thinking", ALL_BUT_EXPERTS),
    Published("kimi_k2", "nvfp4", "nvidia/Kimi-K2-Thinking-NVFP4", ALL_BUT_EXPERTS),
    Published("kimi_k25", "int4_group", "moonshotai/Kimi-K2.5", ALL_BUT_EXPERTS),
    Published("kimi_k25", "nvfp4", "nvidia/Kimi-K2.5-NVFP4", ALL_BUT_EXPERTS),
    Published("qwen3_5_moe", "fp8_block", "Qwen/Qwen3.5-397B-A17B-FP8", NARROW),
    Published(
        "qwen3_5_moe",
        "nvfp4",
        "nvidia/Qwen3.5-397B-A17B-NVFP4",
        (*ATTENTION, "linear_attn", "shared_expert", "shared_expert_gate"),
    ),
    Published("qwen3_5_moe", "gptq", "by GPTQModel", (*ATTENTION, "linear_attn", "shared_expert_gate")),
    Published("qwen3_5_moe_text", "fp8_block", "by transformers' FineGrainedFP8Config", NARROW),
    Published("minimax_m2", "fp8_block", "MiniMaxAI/MiniMax-M2"),
    Published("minimax_m2", "awq", "QuantTrio/MiniMax-M2.1-AWQ", ATTENTION),
    Published("minimax_m2", "nvfp4_ct", "by llm-compressor", ATTENTION),
)
