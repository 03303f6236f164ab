"""How checkpoints name the parts of a mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeNames:
    """How a checkpoint names the parts of one MoE layer. `expert` has "{e}" for the expert's index. `fused`:
    the module under which all experts' gate_up_proj and down_proj are one tensor each, another layout of the
    same weights."""

    router: str
    expert: str = ""
    correction_bias: str = ""
    shared: str = ""
    shared_gate: str = ""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: str = ""

    def down_of(self, expert: int) -> str:
        """The path of an expert's last matrix, or of all experts' where only that is known."""
        path = self.expert.format(e=expert) if self.expert else ""
        return f"{path}.{self.down}" if path else f"{self.fused}.down_proj"

    @classmethod
    def usual(cls, mlp: str, shared: str = "shared_experts") -> MoeNames:
        """The names that GLM, Qwen and DeepSeek share."""
        return cls(
            router=f"{mlp}.gate",
            expert=f"{mlp}.experts.{{e}}",
            correction_bias=f"{mlp}.gate.e_score_correction_bias",
            shared=f"{mlp}.{shared}",
            shared_gate=f"{mlp}.shared_expert_gate",
            fused=f"{mlp}.experts",
        )
