"""Asks this machine what it is. The only place that queries a driver or the operating system about
hardware."""

from __future__ import annotations

import os
import resource
import subprocess
from dataclasses import dataclass, replace
from typing import Any

from firebox.env import read
from firebox.errors import ConfigError
from firebox.hardware import cpu
from firebox.hardware._families import FAMILIES
from firebox.hardware.base import Gpu, known_gpus

_SENSORS = {"clocks.sm": "clock_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c"}
_CPU_FACTS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")


def probe_cpu() -> Gpu:
    """The CPU, with the memory and the cores this process may use. Linux only; facts come from
    /proc/cpuinfo."""
    memory = _proc_meminfo_bytes()
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        words = set(file.read().split())
    return cpu.describe(
        memory_bytes=memory["MemTotal"],
        memory_free_bytes=memory["MemAvailable"],
        cores=len(os.sched_getaffinity(0)),
        facts=frozenset(fact for fact in _CPU_FACTS if fact in words),
    )


def probe_gpu(index: int = 0) -> Gpu | None:
    """CUDA device `index` as its driver describes it, or None on a machine without one.

    A device that has a file keeps that file's bandwidths, rates and facts; memory, multiprocessors and limits
    are the driver's. A device without one is described by the driver alone and says "unknown" in its name.
    Changes nothing, but creates the CUDA context of that device. Raises ConfigError for a compute capability
    of which nothing is known. FIREBOX_SMEM_LIMIT lowers `smem_per_block_bytes`.
    """
    import torch  # not at the head: the command line asks for the CPU without it

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    return describe_gpu(properties, _free_bytes(properties, index), read().smem_limit_bytes)


def describe_gpu(properties: Any, free_bytes: int, smem_limit_bytes: int | None) -> Gpu:
    """The device behind torch's `properties`. Raises ConfigError for an unknown compute capability."""
    capability = (properties.major, properties.minor)
    gpu = _by_device_name(properties.name, capability) or _unknown(properties, capability)
    smem_bytes = properties.shared_memory_per_block_optin
    return replace(
        gpu,
        memory_bytes=properties.total_memory,
        memory_free_bytes=min(free_bytes, properties.total_memory),
        cpu_cores=len(os.sched_getaffinity(0)),
        unified_memory=bool(properties.is_integrated),
        smem_per_block_bytes=min(smem_bytes, smem_limit_bytes or smem_bytes),
        smem_per_sm_bytes=properties.shared_memory_per_multiprocessor,
        registers_per_sm=properties.regs_per_multiprocessor,
        threads_per_sm=properties.max_threads_per_multi_processor,
        sms=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
    )


def peak_resident_bytes() -> int:
    """The most physical memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The physical memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class GpuMemory:
    """Of CUDA device 0, now: what the driver has left (on unified memory MemAvailable), and what torch's
    allocator holds for tensors, held at most since the last `forget_gpu_peak`, and has from the driver."""

    free_bytes: int
    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int


def gpu_memory() -> GpuMemory:
    """Waits for the device."""
    import torch

    torch.cuda.synchronize()
    counts = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
    return GpuMemory(_free_bytes(torch.cuda.get_device_properties(0), 0), *counts)


def forget_gpu_peak() -> None:
    """The peak is what is held now."""
    import torch

    torch.cuda.reset_peak_memory_stats()


def _free_bytes(properties: Any, index: int) -> int:
    import torch

    if properties.is_integrated:
        # The driver counts as free only what nobody uses; page cache can be had for the asking.
        return _proc_meminfo_bytes()["MemAvailable"]
    return int(torch.cuda.mem_get_info(index)[0])


def driver_version() -> str:
    """What the NVIDIA driver of this machine says it is, in a line; "" without one."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def gpu_sensors() -> dict[str, dict[str, float]]:
    """Per GPU index what nvidia-smi reads just now: clock_mhz, power_w, temperature_c; {} where there is no
    nvidia-smi, and without the sensors that a GPU does not have (GB10 has no power limit, for one)."""
    command = ["nvidia-smi", f"--query-gpu=index,{','.join(_SENSORS)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_sensors(lines)


def read_sensors(lines: str) -> dict[str, dict[str, float]]:
    """nvidia-smi's table, one GPU a line; what it writes as "[N/A]" is left out."""
    found: dict[str, dict[str, float]] = {}
    for line in lines.splitlines():
        index, *values = [cell.strip() for cell in line.split(",")]
        known = zip(_SENSORS.values(), values, strict=True)
        found[index] = {name: float(v) for name, v in known if v.replace(".", "", 1).isdigit()}
    return found


def _by_device_name(name: str, capability: tuple[int, int]) -> Gpu | None:
    """None also where the capability is another one: then the name does not say what the file means."""
    known = (gpu for gpu in known_gpus().values() if name in gpu.device_names)
    return next((gpu for gpu in known if gpu.capability == capability), None)


def _unknown(properties: Any, capability: tuple[int, int]) -> Gpu:
    family = FAMILIES.get(capability)
    if family is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in FAMILIES)
        raise ConfigError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}",
            hint=f"GPUs of compute capability {known} are supported",
        )
    name = f"unknown ({properties.name})"
    return replace(family, name=name, device_names=(properties.name,), bandwidth_gb_s=_bus_gb_s(properties))


def _bus_gb_s(properties: Any) -> float | None:
    """Bus width times clock, two transfers a cycle; None where torch is too old to tell."""
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    width_bits = getattr(properties, "memory_bus_width", 0)
    return clock_khz * width_bits * 2 / 8 / 1e6 or None


def _proc_meminfo_bytes() -> dict[str, int]:
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = (line.split() for line in file)
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
