"""Reading and writing lose nothing of the files that the servers ship, and what is written is what they
read."""

from __future__ import annotations

import datetime
import json
from pathlib import Path, PurePath

import pytest

from firebox.errors import ConfigError
from firebox.planning._foreign_kernel import Tile
from firebox.planning._foreign_name import file_name, parse
from firebox.tuning.servers.choose import Choice, Pair
from firebox.tuning.servers.files import Origin, candidates_from, note_of, read, save, write
from firebox.tuning.servers.names import Lookup

SHIPPED = Path(__file__).parents[3] / "fixtures/tuning_files"
FILES = sorted(SHIPPED.rglob("*.json"))
INDENTED_BY_TWO = 2  # files among them that were not written with four spaces
ORIGIN = Origin("predicted", "a model", 4, "gb10", "3.9.0", datetime.date(2026, 11, 21), "abc1234")
NAME = parse("E=8,N=64,device_name=NVIDIA_GB10.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_round_trip(path: Path, tmp_path: Path) -> None:
    """The very same entries, in the same order, under the name that the server looks for."""
    server = path.relative_to(SHIPPED).parts[0]
    asked = file_name(server, parse(path.name))
    assert asked == path.name
    found = read(path)
    save(tmp_path / asked, found.entries, found.triton_version)
    before, after = (json.loads(one.read_text("utf-8")) for one in (path, tmp_path / asked))
    assert after == before and list(after) == list(before)
    assert [list(entry.items()) for entry in found.entries.values()] == [
        list(entry.items()) for key, entry in before.items() if key != "triton_version"
    ]


def test_the_layout_is_theirs(tmp_path: Path) -> None:
    """Byte for byte, but for files that were written with two spaces."""
    same = 0
    for path in FILES:
        found = read(path)
        save(tmp_path / path.name, found.entries, found.triton_version)
        same += (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert len(FILES) == 6 and same == len(FILES) - INDENTED_BY_TWO


def test_keys_ascend_as_numbers(tmp_path: Path) -> None:
    entry = dict(read(FILES[0]).entries["1"])
    save(tmp_path / "a.json", {"256": entry, "16": entry, "8": entry})
    assert list(json.loads((tmp_path / "a.json").read_text("utf-8"))) == ["8", "16", "256"]


def test_candidates_are_the_tiles_as_they_run(tmp_path: Path) -> None:
    gb10 = next(path for path in FILES if path.name.startswith("E=256,N=512,device_name=NVIDIA_GB10"))
    assert candidates_from(gb10) == (
        Tile(16, 128, 128, 4, 4),
        Tile(16, 128, 128, 4, 3),
        Tile(32, 128, 128, 4, 3),
        Tile(64, 128, 128, 4, 4),
    )
    down = next(path for path in FILES if path.name.endswith("[128, 128]_down.json"))
    assert any(entry["USE_TMA"] for entry in read(down).entries.values())
    assert not any(tile.tma for tile in candidates_from(down))
    wide = tmp_path / "E=8,N=64,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[64,64].json"
    wide.write_bytes(gb10.read_bytes())
    assert {tile.block_k for tile in candidates_from(wide)} == {64}  # never across a block of scales
    with pytest.raises(ConfigError, match="is not JSON"):
        candidates_from(note_of_text(tmp_path))


def note_of_text(folder: Path) -> Path:
    path = folder / "text.json"
    path.write_text("not JSON")
    return path


def pair(rows: int, us: float, second_rows: int | None = None) -> Pair:
    first = Choice(Tile(rows, 64, 128, 4, 3), 16, us)
    return Pair(first, Choice(Tile(second_rows or rows, 128, 64, 8, 2), 1, us / 2))


def test_sglang_gets_two_files_and_numbers_only(tmp_path: Path) -> None:
    lookup = Lookup("sglang", 1, NAME, PurePath("sglang/configs/triton_3_9_0"), ("a.json",), ("a_down.json",))
    first, second = write(tmp_path, lookup, {64: pair(32, 8.0), 1: pair(16, 2.0)}, ORIGIN)
    assert [path.relative_to(tmp_path / lookup.folder).name for path in (first, second)] == [
        "a.json",
        "a_down.json",
    ]
    ups, downs = (json.loads(path.read_text("utf-8")) for path in (first, second))
    assert list(ups) == ["1", "64"] and all(int(key) for key in [*ups, *downs])  # SGLang reads int(key)
    assert ups["64"] == {
        "BLOCK_SIZE_M": 32,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": 16,
        "num_warps": 4,
        "num_stages": 3,
    }
    assert list(downs["1"].values()) == [16, 128, 64, 1, 8, 2]
    note = note_of(second).read_text("utf-8")
    assert "predicted by firebox, commit abc1234, 2026-11-21" in note and "nothing was run" in note
    for said in ("second product", "triton  3.9.0", "gb10", "tensor parallel 4", "1 shared expert"):
        assert said in note
    assert f"SGLANG_MOE_CONFIG_DIR={tmp_path / 'sglang'}" in note
    assert note.splitlines()[-1].split() == ["64", "4.0"]


def test_vllm_gets_one_file_and_the_time_of_both(tmp_path: Path) -> None:
    lookup = Lookup("vllm", 0, NAME, PurePath("vllm"), ("a.json", "b.json"))
    paths = write(tmp_path, lookup, {1: pair(16, 2.0)}, ORIGIN)
    assert [path.name for path in paths] == ["a.json", "b.json"]  # one for each name of the device
    assert paths[0].read_bytes() == paths[1].read_bytes()
    note = note_of(paths[0]).read_text("utf-8")
    assert "both products" in note and f"VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'vllm'}" in note
    assert "shared " not in note and note.splitlines()[-1].split() == ["1", "3.0"]


def test_rows_are_sorted_once(tmp_path: Path) -> None:
    lookup = Lookup("sglang", 0, NAME, PurePath("x"), ("a.json",), ("a_down.json",))
    with pytest.raises(AssertionError, match="16 tokens: rows are sorted once"):
        write(tmp_path, lookup, {16: pair(16, 2.0, second_rows=32)}, ORIGIN)
    assert not list(tmp_path.iterdir())
