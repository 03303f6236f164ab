"""The verdict on a tuning file: bytes of every entry as compiled for a GPU that is not here, and the warnings
that need the file's surroundings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

from firebox.find import load
from firebox.hardware.base import Gpu, find_gpu
from firebox.planning.foreign import Verdict, judge

GB10, H200, RTX_4090, A100 = (find_gpu(name) for name in ("gb10", "h200", "rtx-4090", "a100"))
START = "E=160,N=384,device_name=NVIDIA_GB10"
FP8 = f"{START},dtype=fp8_w8a8,per_channel_quant=True"
LIMIT = 101_376


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests, so that equal tiles compile once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
        yield


def entry(m: int, n: int, k: int, stages: int, warps: int = 4, **further: Any) -> dict[str, Any]:
    tile = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k}
    return {**tile, "GROUP_SIZE_M": 1, "num_warps": warps, "num_stages": stages, **further}


def judged(folder: Path, name: str, gpu: Gpu, **entries: dict[str, Any]) -> Verdict:
    """Entries by their keys, with a letter in front."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key[1:]: value for key, value in entries.items()}))
    return judge(path, gpu)


def about(verdict: Verdict, *words: str) -> list[str]:
    """The warnings that hold all of these words."""
    return [line for line in verdict.warnings if all(word in line for word in words)]


def test_the_tile_that_kills_servers_is_refused_on_gb10_alone(tmp_path: Path) -> None:
    tiles = {"k64": entry(128, 256, 128, 4, 8), "k128": entry(128, 128, 128, 4, 8)}
    small = judged(tmp_path, FP8, GB10, **tiles)
    assert not small.fits
    assert [(c.shared_bytes, c.limit_bytes, c.fits) for c in small.keys.values()] == [
        (147_456, LIMIT, False),
        (98_304, LIMIT, True),
    ]
    assert all(c.instruction == "mma.fp8" and c.native and c.error is None for c in small.keys.values())
    large = judged(tmp_path, FP8, H200, **tiles)
    assert large.fits and large.keys["64"].shared_bytes == 4 * (128 + 256) * 128
    assert all(c.instruction == "wgmma.fp8" and c.native for c in large.keys.values())


@pytest.mark.parametrize(
    ("parts", "x_bytes", "w_bytes", "instruction", "scale_bytes"),
    [
        ("", 2, 2, "mma.bf16", 0),
        (",dtype=float32", 4, 4, "mma.tf32", 0),
        (",dtype=fp8_w8a8", 1, 1, "mma.fp8", 0),
        (",dtype=fp8_w8a8,per_channel_quant=True", 1, 1, "mma.fp8", 0),
        (",dtype=fp8_w8a8,block_shape=[128, 128]", 1, 1, "mma.fp8", 1024),
        (",dtype=fp8_w8a16", 2, 1, "mma.bf16", 0),
        (",dtype=int8_w8a8,per_channel_quant=True", 1, 1, "mma.int8", 0),
        (",dtype=int8_w8a8,block_shape=[128, 128]", 1, 1, "mma.int8", 1024),
        (",dtype=int8_w8a16", 2, 1, "mma.bf16", 0),
        (",dtype=int4_w4a16", 2, 1, "mma.bf16", 0),  # both halves of a byte are loaded on their own
    ],
)
def test_every_dtype_has_its_operands(
    tmp_path: Path, parts: str, x_bytes: int, w_bytes: int, instruction: str, scale_bytes: int
) -> None:
    """Two buffers of three stages: (64 rows of x + 128 of w) × 64; scales of a block may change layout
    through shared memory."""
    verdict = judged(tmp_path, START + parts, GB10, k64=entry(64, 128, 64, 3))
    found = verdict.keys["64"]
    tiles = 2 * 64 * (64 * x_bytes + 128 * w_bytes)
    assert tiles <= found.shared_bytes <= tiles + scale_bytes, found
    assert (found.instruction, found.native, found.error) == (instruction, True, None)
    assert verdict.looked_up_by or "fp8_w8a16" in parts


def test_emulation_shows(tmp_path: Path) -> None:
    """Few rows on Hopper: no wgmma, and its mma has no fp8. Ampere has no fp8 at all."""
    few = judged(tmp_path, FP8, H200, k1=entry(16, 64, 128, 3)).keys["1"]
    assert (few.instruction, few.native, few.fits) == ("mma.f16", False, True)
    none = judged(tmp_path, FP8, A100, k1=entry(16, 64, 128, 3))
    assert "fp8e4nv not supported" in str(none.keys["1"].error) and not none.fits


def test_equal_tiles_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = load("kernels", "compile")
    calls, honest = [], room.run_all

    def counted(works: Any, *rest: Any) -> Any:
        calls.append(len(works))
        return honest(works, *rest)

    monkeypatch.setattr(room, "run_all", counted)
    tiles = {
        "k1": entry(16, 32, 64, 2),
        "k2": entry(16, 32, 64, 2) | {"GROUP_SIZE_M": 64},
        "k4": entry(16, 32, 64, 4),
        "k8": entry(16, 32, 64, 2, warps=2),
    }
    verdict = judged(tmp_path, FP8, GB10, **tiles)
    assert calls == [3] and verdict.keys["1"] == verdict.keys["2"]
    assert verdict.keys["4"].shared_bytes == 3 * verdict.keys["1"].shared_bytes


def test_a_tile_across_blocks_of_scales_is_cut_to_one(tmp_path: Path) -> None:
    name = f"{START},dtype=fp8_w8a8,block_shape=[128,128]"
    verdict = judged(tmp_path, name, GB10, k1=entry(16, 64, 256, 3), k2=entry(16, 64, 128, 3))
    assert verdict.keys["1"] == verdict.keys["2"] and verdict.tiles["1"].block_k == 128
    assert about(verdict, "key 1:", "BLOCK_SIZE_K = 256", "judged with 128")
    assert not about(verdict, "key 2:")
    whole = judged(tmp_path, FP8, GB10, k1=entry(16, 64, 256, 3))
    assert whole.tiles["1"].block_k == 256 and not about(whole, "BLOCK_SIZE_K")


def test_tma_is_judged_where_sglang_uses_it(tmp_path: Path) -> None:
    tile = entry(64, 64, 64, 3, USE_TMA=True)
    down = judged(tmp_path, f"{FP8}_down", GB10, k1=tile)
    assert down.tiles["1"].tma and "tma" in down.keys["1"].features and not about(down, "USE_TMA")
    up = judged(tmp_path, FP8, GB10, k1=tile)
    assert not up.tiles["1"].tma and "tma" not in up.keys["1"].features and about(up, "USE_TMA", "key 1")
    off = judged(tmp_path, f"{FP8}_down", GB10, k1=tile | {"USE_TMA": False})
    assert "tma" not in off.keys["1"].features and not about(off, "USE_TMA")
    int4 = judged(tmp_path, f"{START},dtype=int4_w4a16_down", GB10, k1=tile)
    assert "tma" not in int4.keys["1"].features and about(int4, "USE_TMA")
    old = judged(tmp_path, f"{FP8}_down", RTX_4090, k1=tile).keys["1"]  # descriptors become plain loads
    assert old.error is None and "tma" not in old.features


def test_a_tile_that_does_not_compile_is_a_result(tmp_path: Path) -> None:
    verdict = judged(tmp_path, FP8, GB10, k1=entry(16, 96, 64, 2), k2=entry(16, 32, 64, 2))
    assert verdict.keys["1"].error and verdict.keys["2"].fits and not verdict.fits
    row = verdict.document()["keys"]["1"]
    assert (row["fits"], row["error"]) == (False, verdict.keys["1"].error)


def test_the_environments_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "3000")
    verdict = judged(tmp_path, FP8, GB10, k1=entry(16, 32, 64, 2))
    assert (verdict.keys["1"].shared_bytes, verdict.keys["1"].limit_bytes) == (48 * 64, 3000)
    assert not verdict.fits


def test_a_word_that_nobody_knows_is_judged_as_another(tmp_path: Path) -> None:
    verdict = judged(tmp_path, f"{START},dtype=fp9", GB10, k1=entry(16, 32, 64, 2))
    assert verdict.keys["1"].shared_bytes == 2 * 48 * 64
    assert verdict.judged_as == "bf16" and about(verdict, "dtype=fp9", "judged as bf16")
    assert verdict.looked_up_by == ()


# ---- the file's surroundings


def test_the_other_products_file(tmp_path: Path) -> None:
    tile, name = entry(16, 32, 64, 2), f"{FP8}_down"
    assert not about(judged(tmp_path, FP8, GB10, k1=tile), "product")
    same = judged(tmp_path, name, GB10, k1=tile)
    assert about(same, "are those of the first product's file", f"{FP8}.json")
    up = judge(tmp_path / f"{FP8}.json", GB10)
    assert about(up, "are those of the second product's file", f"{name}.json")
    other = judged(tmp_path, name, GB10, k1=entry(16, 32, 64, 4))
    assert not about(other, "product")
    rows = judged(tmp_path, name, GB10, k1=entry(32, 32, 64, 2), k2=tile)
    assert about(rows, "key 1: BLOCK_SIZE_M = 32", "first product's 16") and not about(rows, "key 2:")
    (tmp_path / f"{name}.json").write_text("{")
    assert about(judge(tmp_path / f"{FP8}.json", GB10), "cannot be read", "is not JSON")


def test_the_version_of_triton(tmp_path: Path) -> None:
    ours = triton.__version__
    tile = entry(16, 32, 64, 2)
    for said in (ours, "3.4.0"):
        path = tmp_path / f"{START},dtype=fp8_w8a8,block_shape=[128,128].json"
        path.write_text(json.dumps({"triton_version": said, "1": tile}))
        verdict = judge(path, GB10)
        assert len(about(verdict, "tuned with Triton 3.4.0", f"this is {ours}")) == (said != ours)
        assert not about(verdict, "SGLang")  # the name is vLLM's
        path = path.rename(tmp_path / f"{START},dtype=fp8_w8a8.json")
        assert about(judge(path, GB10), "SGLang fails to read the file", "'triton_version'")


def test_sglangs_folder_names_a_version(tmp_path: Path) -> None:
    tile = entry(16, 32, 64, 2)
    for folder, warned in ((f"triton_{triton.__version__.replace('.', '_')}", 0), ("triton_3_4_0", 1)):
        (tmp_path / folder).mkdir()
        assert len(about(judged(tmp_path / folder, FP8, GB10, k1=tile), "the folder is")) == warned


def test_document(tmp_path: Path) -> None:
    verdict = judged(tmp_path, FP8, GB10, k64=entry(16, 32, 64, 2))
    document = verdict.document()
    assert json.loads(json.dumps(document)) == document
    row = document["keys"]["64"]
    assert row == {
        "shared_bytes": 48 * 64,
        "limit_bytes": LIMIT,
        "fits": True,
        "registers": verdict.keys["64"].registers,
        "spill_bytes": 0,
        "instruction": "mma.fp8",
        "native": True,
        "error": None,
    }
    assert 16 < row["registers"] <= 255
    assert (document["fits"], document["file"]) == (True, str(tmp_path / f"{FP8}.json"))
    assert (document["gpu"], document["looked_up_by"]) == ("gb10", ["sglang"])
    assert document["warnings"] == list(verdict.warnings) != []
