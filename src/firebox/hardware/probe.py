"""Asks this machine what it is. The only place that queries a driver or the operating system about
hardware."""

from __future__ import annotations

import os
import resource

from firebox.hardware import cpu
from firebox.hardware.base import Gpu

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


def peak_resident_bytes() -> int:
    """The most physical memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _proc_meminfo_bytes() -> dict[str, int]:
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = (line.split() for line in file)
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
