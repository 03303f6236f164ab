"""What GPUs of one compute capability have in common: limits of a multiprocessor, and named facts.

Sources. Limits: the compute-capability table of the CUDA C++ programming guide (13.2); shared memory per
block is that of the multiprocessor less 1 KiB a resident block. Facts: compiled with Triton 3.9.0 and read
from PTX and SASS; tests/cpu/hardware/test_facts.py does it again at every run. Triton 3.6 and 3.7 have no
mma.fp8, mma.mxf8, mma.mxf4 and mma.nvf4 on 12.1, which is why the launch plan reads every kernel back."""

from __future__ import annotations

from firebox.hardware.base import KIB, Gpu

_AMPERE = frozenset({"mma.bf16", "mma.f16", "mma.tf32", "mma.int8"})
_SINCE_HOPPER = frozenset({"fp8", "tma", "clusters", "pdl"})
_ADA = _AMPERE | {"fp8", "mma.fp8"}
_HOPPER = (
    _AMPERE | _SINCE_HOPPER | {"wgmma", "wgmma.bf16", "wgmma.f16", "wgmma.tf32", "wgmma.int8", "wgmma.fp8"}
)
_DATACENTER_BLACKWELL = (
    _AMPERE
    | _SINCE_HOPPER
    | {"tcgen05", "tcgen05.f16", "tcgen05.tf32", "tcgen05.int8"}
    | {"tcgen05.fp8", "tcgen05.mxf8", "tcgen05.mxf4", "tcgen05.nvf4"}
)
_BLACKWELL = _AMPERE | _SINCE_HOPPER | {"mma.fp8", "mma.mxf8", "mma.mxf4", "mma.nvf4"}


def _family(major: int, minor: int, smem_per_sm_kib: int, threads_per_sm: int, facts: frozenset[str]) -> Gpu:
    return Gpu(
        name=f"compute capability {major}.{minor}",
        kind="cuda",
        memory_bytes=0,
        memory_free_bytes=0,
        cpu_cores=0,
        facts=facts,
        capability=(major, minor),
        smem_per_block_bytes=(smem_per_sm_kib - 1) * KIB,
        smem_per_sm_bytes=smem_per_sm_kib * KIB,
        registers_per_sm=65_536,
        threads_per_sm=threads_per_sm,
        triton_target=major * 10 + minor,
    )


SM80 = _family(8, 0, 164, 2048, _AMPERE)
SM89 = _family(8, 9, 100, 1536, _ADA)
SM90 = _family(9, 0, 228, 2048, _HOPPER)
SM100 = _family(10, 0, 228, 2048, _DATACENTER_BLACKWELL)
SM120 = _family(12, 0, 100, 1536, _BLACKWELL)
SM121 = _family(12, 1, 100, 1536, _BLACKWELL)

FAMILIES = {(8, 0): SM80, (8, 9): SM89, (9, 0): SM90, (10, 0): SM100, (12, 0): SM120, (12, 1): SM121}
