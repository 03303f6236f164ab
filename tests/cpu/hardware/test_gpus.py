"""The GPU files, the look-up by name, and what `probe` makes of a driver's answers (invented ones)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.hardware import probe
from firebox.hardware.base import MIB, Gpu, find_gpu, known_gpus

FILES = {name: load("hardware", name) for name in names("hardware")}
GPUS = {name: file.GPU for name, file in FILES.items() if hasattr(file, "GPU")}
WANTED = (
    "gb10", "rtx-pro-6000", "rtx-pro-6000-server", "rtx-pro-6000-max-q", "rtx-5090", "rtx-4090", "l40s",
    "a100", "h100", "h200", "b200",
)  # fmt: skip


def test_every_gpu_has_its_file_and_its_file_its_name() -> None:
    assert sorted(gpu.name for gpu in GPUS.values()) == sorted(WANTED)
    assert all(gpu.name == name.replace("_", "-") for name, gpu in GPUS.items())
    assert known_gpus() == {gpu.name: gpu for gpu in GPUS.values()}


@pytest.mark.parametrize("name", WANTED)
def test_numbers_are_complete_and_agree_with_each_other(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu.capability is not None and gpu.triton_target == gpu.capability[0] * 10 + gpu.capability[1]
    assert gpu.kind == "cuda" and gpu.device_names and gpu.link
    assert gpu.smem_per_sm_bytes - gpu.smem_per_block_bytes == 1024  # what the driver keeps of a block
    assert gpu.registers_per_sm == 65_536 and gpu.threads_per_sm in (1536, 2048)
    assert gpu.memory_bytes >= 24_000 * MIB and gpu.memory_free_bytes == gpu.memory_bytes
    for measured in (gpu.copy_gb_s, gpu.read_gb_s):
        assert measured is None or 0.7 * gpu.bandwidth_gb_s < measured < gpu.bandwidth_gb_s
    assert (gpu.fp8_tflop_s is not None) is any(fact.endswith(".fp8") for fact in gpu.facts)
    assert (gpu.fp4_tflop_s is not None) is any(fact.endswith(".nvf4") for fact in gpu.facts)
    assert gpu.fp8_tflop_s is None or 1.9 < gpu.fp8_tflop_s / gpu.bf16_tflop_s < 2.1


@pytest.mark.parametrize(
    ("name", "limit_bytes", "sms"),
    [("gb10", 101_376, 48), ("rtx-5090", 101_376, 170), ("l40s", 101_376, 142), ("a100", 166_912, 108),
     ("h200", 232_448, 132), ("b200", 232_448, 148), ("rtx-pro-6000-server", 101_376, 188)],
)  # fmt: skip
def test_limits_are_those_of_the_sources(name: str, limit_bytes: int, sms: int) -> None:
    assert (find_gpu(name).smem_per_block_bytes, find_gpu(name).sms) == (limit_bytes, sms)


def test_the_three_rtx_pro_6000_differ_in_name_and_clock_only() -> None:
    workstation, server, max_q = (find_gpu(f"rtx-pro-6000{suffix}") for suffix in ("", "-server", "-max-q"))
    assert workstation.bf16_tflop_s > server.bf16_tflop_s > max_q.bf16_tflop_s
    assert len({gpu.device_names for gpu in (workstation, server, max_q)}) == 3
    assert {gpu.bandwidth_gb_s for gpu in (workstation, server, max_q)} == {1792}


def test_no_device_name_belongs_to_two_files() -> None:
    device_names = [name for gpu in GPUS.values() for name in gpu.device_names]
    assert len(device_names) == len(set(device_names))


def test_lookup_takes_dashes_and_underscores() -> None:
    assert find_gpu("rtx-pro-6000") is find_gpu("rtx_pro_6000") is FILES["rtx_pro_6000"].GPU


@pytest.mark.parametrize("name", ["rtx-6000", "cpu", "probe", "", "H200"])
def test_lookup_of_an_absent_one_lists_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match=repr(name)) as caught:
        find_gpu(name)
    assert str(caught.value.hint).partition(": ")[2].split(", ") == sorted(known_gpus())


# ---- the driver's answers


def properties(**changes: Any) -> SimpleNamespace:
    """torch's properties of a GB10, or of another device."""
    return SimpleNamespace(
        **{
            "name": "NVIDIA GB10",
            "major": 12,
            "minor": 1,
            "total_memory": 130_600_000_000,
            "is_integrated": 1,
            "multi_processor_count": 48,
            "shared_memory_per_block_optin": 101_376,
            "shared_memory_per_multiprocessor": 102_400,
            "regs_per_multiprocessor": 65_536,
            "max_threads_per_multi_processor": 1536,
            "L2_cache_size": 24 * MIB,
            **changes,
        }
    )


def driver(monkeypatch: pytest.MonkeyPatch, answer: SimpleNamespace | None, free_bytes: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: answer is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free_bytes, 10**12))


def probed(
    monkeypatch: pytest.MonkeyPatch, answer: SimpleNamespace, free_bytes: int = 0, limit: str = ""
) -> Gpu:
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", limit)
    driver(monkeypatch, answer, free_bytes)
    gpu = probe.probe_gpu()
    assert gpu is not None
    return gpu


def test_no_gpu_is_none(monkeypatch) -> None:
    driver(monkeypatch, None)
    assert probe.probe_gpu() is None


def test_a_known_device_has_its_files_figures_and_the_drivers_numbers(monkeypatch) -> None:
    h200 = properties(
        name="NVIDIA H200", major=9, minor=0, total_memory=150_000_000_000, is_integrated=0,
        multi_processor_count=66, shared_memory_per_block_optin=232_448,
        shared_memory_per_multiprocessor=233_472, max_threads_per_multi_processor=2048,
        L2_cache_size=30 * MIB,
    )  # fmt: skip
    gpu = probed(monkeypatch, h200, free_bytes=140_000_000_000)
    assert (gpu.name, gpu.capability, gpu.triton_target) == ("h200", (9, 0), 90)
    assert gpu.facts == find_gpu("h200").facts and gpu.read_gb_s == 4600
    assert (gpu.memory_bytes, gpu.memory_free_bytes) == (150_000_000_000, 140_000_000_000)
    assert (gpu.sms, gpu.l2_bytes, gpu.unified_memory) == (66, 30 * MIB, False)  # a slice of the device
    assert gpu.cpu_cores >= 1


def test_on_unified_memory_free_is_what_the_operating_system_can_give(monkeypatch) -> None:
    monkeypatch.setattr(probe, "_proc_meminfo_bytes", lambda: {"MemAvailable": 77_000_000_000})
    gpu = probed(monkeypatch, properties(), free_bytes=5)
    assert (gpu.name, gpu.unified_memory, gpu.memory_free_bytes) == ("gb10", True, 77_000_000_000)


def test_free_memory_is_never_more_than_there_is(monkeypatch) -> None:
    gpu = probed(monkeypatch, properties(is_integrated=0, total_memory=10**9), free_bytes=2 * 10**9)
    assert gpu.memory_free_bytes == 10**9


def test_variants_are_told_apart_by_name(monkeypatch) -> None:
    for name in ("rtx-pro-6000", "rtx-pro-6000-server", "rtx-pro-6000-max-q"):
        (device_name,) = find_gpu(name).device_names
        assert probed(monkeypatch, properties(name=device_name, minor=0, is_integrated=0)).name == name


def test_an_unknown_device_of_a_known_family_is_described_by_the_driver(monkeypatch) -> None:
    laptop = properties(
        name="NVIDIA GeForce RTX 5080 Laptop GPU", minor=0, is_integrated=0, multi_processor_count=60,
        memory_clock_rate=14_001_000, memory_bus_width=256,
    )  # fmt: skip
    gpu = probed(monkeypatch, laptop, free_bytes=10**9)
    assert gpu.name == "unknown (NVIDIA GeForce RTX 5080 Laptop GPU)"
    assert gpu.facts == find_gpu("rtx-5090").facts
    assert (gpu.sms, gpu.triton_target, gpu.smem_per_block_bytes) == (60, 120, 101_376)
    assert gpu.bandwidth_gb_s == pytest.approx(896.064) and gpu.bf16_tflop_s is None


def test_an_unknown_device_without_a_clock_has_no_bandwidth(monkeypatch) -> None:
    assert probed(monkeypatch, properties(name="NVIDIA GB9")).bandwidth_gb_s is None


def test_a_known_name_with_another_capability_is_not_trusted(monkeypatch) -> None:
    gpu = probed(monkeypatch, properties(minor=0))
    assert gpu.name == "unknown (NVIDIA GB10)" and gpu.capability == (12, 0)


def test_an_unknown_capability_is_refused_with_the_known_ones(monkeypatch) -> None:
    driver(monkeypatch, properties(name="Tesla T4", major=7, minor=5, is_integrated=0))
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5") as caught:
        probe.probe_gpu()
    assert "8.9, 9.0" in str(caught.value.hint) and "12.1" in str(caught.value.hint)


@pytest.mark.parametrize(("limit", "bytes_left"), [("", 232_448), ("101376", 101_376), ("999999", 232_448)])
def test_the_environment_lowers_the_shared_memory_limit(monkeypatch, limit: str, bytes_left: int) -> None:
    h200 = properties(
        name="NVIDIA H200", major=9, minor=0, is_integrated=0, shared_memory_per_block_optin=232_448
    )
    assert probed(monkeypatch, h200, limit=limit).smem_per_block_bytes == bytes_left


def test_sensors_are_read_as_nvidia_smi_writes_them() -> None:
    lines = "0, 2418, 87.31, 61\n1, [N/A], [Not Supported], 44\n"
    assert probe.read_sensors(lines) == {
        "0": {"clock_mhz": 2418.0, "power_w": 87.31, "temperature_c": 61.0},
        "1": {"temperature_c": 44.0},
    }
    assert probe.read_sensors("") == {}


def test_without_nvidia_smi_there_are_no_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert probe.gpu_sensors() == {}
