"""What Firebox knows of a machine: numbers with units, and named facts.

A kernel asks for a fact by its name (`"mma.mxf4" in gpu.facts`), never for a product or a compute capability.
Each NVIDIA GPU is one file of this room with a constant `GPU`; a planner reads it on a machine that has no
GPU.

Named facts of NVIDIA GPUs. The matrix facts say what the compiler really makes of a Triton dot for that GPU
at the tile that suits it, not what the silicon might do; tests/cpu/hardware proves each by compiling.

    mma.<kind>        a warp's matrix instruction. Kinds: bf16 f16 tf32 int8 fp8; block-scaled mxf8 mxf4 nvf4
    wgmma[.<kind>]    a warp group's, with operands in shared memory (64 rows or more)
    tcgen05[.<kind>]  with the accumulator in tensor memory (64 rows or more, block-scaled kinds 128); f16 is
                      bf16 too
    fp8               the type fp8e4nv exists: it can be loaded, converted and stored
    tma               tensor descriptors become bulk copies; without it they become plain loads
    clusters          num_ctas above 1
    pdl               a launch may begin before the one it waits for has ended
"""

from __future__ import annotations

from dataclasses import dataclass, field

from firebox.errors import ConfigError
from firebox.find import load, names

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Gpu:
    """One device that runs kernels; the plain CPU is one too (`kind == "cpu"`). Zero, None and "" mean: not
    known, or there is none.

    `memory_bytes`: what the device has; `memory_free_bytes`: what was free when it was probed (all of it
    where it was not); `unified_memory`: host and device share it. `capability`: (major, minor) of an NVIDIA
    GPU. `smem_per_block_bytes`: the most shared memory one block may ask for; `smem_per_sm_bytes`: what the
    blocks of one multiprocessor share, 1 KiB a block included that the driver keeps. `facts`: named
    capabilities, such as "mma.bf16" or "avx512". `device_names`: as CUDA reports them. `bandwidth_gb_s`: of
    the datasheet; `copy_gb_s` (read plus written) and `read_gb_s`: measured. `*_tflop_s`: dense, float32
    accumulation. `triton_target`: the number that Triton's GPUTarget takes. `link`: how such GPUs are
    joined."""

    name: str
    kind: str
    memory_bytes: int
    memory_free_bytes: int = field(compare=False)  # changes from one probe to the next
    cpu_cores: int
    facts: frozenset[str]
    unified_memory: bool = False
    capability: tuple[int, int] | None = None
    smem_per_block_bytes: int = 0
    device_names: tuple[str, ...] = ()
    sms: int = 0
    smem_per_sm_bytes: int = 0
    registers_per_sm: int = 0
    threads_per_sm: int = 0
    l2_bytes: int = 0
    bandwidth_gb_s: float | None = None
    copy_gb_s: float | None = None
    read_gb_s: float | None = None
    bf16_tflop_s: float | None = None
    fp8_tflop_s: float | None = None
    fp4_tflop_s: float | None = None
    triton_target: int | None = None
    link: str = ""

    def __hash__(self) -> int:
        """The name's: every launch looks something up by its GPU."""
        return hash(self.name)


def known_gpus() -> dict[str, Gpu]:
    """Every GPU that has a file, by its name on the command line ("gb10", "rtx-pro-6000")."""
    found = (getattr(load("hardware", name), "GPU", None) for name in names("hardware"))
    return {gpu.name: gpu for gpu in found if gpu is not None}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; dashes and underscores are the same. Raises ConfigError, listing what there
    is."""
    gpus = known_gpus()
    gpu = gpus.get(name.replace("_", "-"))
    if gpu is None:
        raise ConfigError(f"no GPU is called {name!r}", hint=f"there are: {', '.join(gpus)}")
    return gpu
