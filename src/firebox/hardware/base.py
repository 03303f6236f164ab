"""What Firebox knows of a machine: numbers with units, and named facts.

A kernel asks for a fact by its name (`"mma.mxf4" in gpu.facts`), never for a product or a compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device that runs kernels; the plain CPU is one too (`kind == "cpu"`).

    `memory_bytes`: what the device has; `memory_free_bytes`: what was free when it was probed;
    `unified_memory`: host and device share it. `capability`: (major, minor) of an NVIDIA GPU, None otherwise.
    `smem_per_block_bytes`: the most shared memory one block may ask for; 0 on a CPU. `facts`: named
    capabilities, such as "mma.bf16" or "avx512".
    """

    name: str
    kind: str
    memory_bytes: int
    memory_free_bytes: int
    cpu_cores: int
    facts: frozenset[str]
    unified_memory: bool = False
    capability: tuple[int, int] | None = None
    smem_per_block_bytes: int = 0
