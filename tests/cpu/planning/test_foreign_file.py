"""Reading a tuning file: what cannot be judged is an error that names file and key, what is odd a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firebox.errors import ConfigError
from firebox.planning._foreign_file import NEEDED, read

ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
USUAL = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096]


def written(folder: Path, document: Any) -> Path:
    path = folder / "E=8,N=64,device_name=NVIDIA_GB10.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def usual(**further: Any) -> dict[str, Any]:
    """The keys that servers' own tuners write; `further` goes into the entry of 64."""
    return {str(key): ENTRY | (further if key == 64 else {}) for key in USUAL}


def test_the_usual_file(tmp_path: Path) -> None:
    found = read(written(tmp_path, {"triton_version": "3.4.0", **usual()}))
    assert list(found.entries) == [str(key) for key in USUAL]
    assert found.entries["64"] == ENTRY
    assert (found.triton_version, found.warnings) == ("3.4.0", ())


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_number_is_an_error(tmp_path: Path, name: str) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != name}
    path = written(tmp_path, usual() | {"64": entry})
    with pytest.raises(ConfigError, match=f"key '64' has no {name}") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "has no entry"),
        ('{"triton_version": "3.4.0"}', "has no entry"),
        ({"64": 7}, "key '64' holds 7"),
        ({"64": ENTRY | {"num_warps": "4"}}, "key '64' has num_warps = '4'"),
        ({"64": ENTRY | {"num_warps": True}}, "key '64' has num_warps = True"),
        ({"64": ENTRY | {"num_stages": 0}}, "key '64' has num_stages = 0"),
        ({"64": ENTRY | {"BLOCK_SIZE_M": 16.0}}, "key '64' has BLOCK_SIZE_M = 16.0"),
    ],
)
def test_what_cannot_be_judged_names_the_file(tmp_path: Path, document: Any, sentence: str) -> None:
    path = written(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert sentence in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not JSON"):
        read(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        ({"waves_per_eu": 2}, "key 64: waves_per_eu = 2 is unknown here"),
        ({"BLOCK_SIZE_N": 96}, "key 64: BLOCK_SIZE_N = 96 is not a power of two"),
        ({"num_warps": 6}, "key 64: num_warps = 6 is not a power of two"),
        ({"SPLIT_K": 4}, "key 64: SPLIT_K = 4 is not read"),
    ],
)
def test_odd_values(tmp_path: Path, further: dict[str, int], sentence: str) -> None:
    (warning,) = read(written(tmp_path, usual(**further))).warnings
    assert sentence in warning


@pytest.mark.parametrize("further", [{"SPLIT_K": 1}, {"USE_TMA": True}, {"GROUP_SIZE_M": 6, "num_stages": 3}])
def test_values_that_are_fine(tmp_path: Path, further: dict[str, int]) -> None:
    assert read(written(tmp_path, usual(**further))).warnings == ()


def test_keys_that_do_not_increase_or_are_no_numbers(tmp_path: Path) -> None:
    turned = dict(reversed(usual().items()))
    (warning,) = read(written(tmp_path, turned)).warnings
    assert "the keys do not increase: 4096, 3072" in warning
    for key in ("default", "-1", "0", "6.5", "064"):
        found = read(written(tmp_path, usual() | {key: ENTRY}))
        assert key not in found.entries
        assert [f"the key {key!r} is not a number" in line for line in found.warnings] == [True]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    whole = json.dumps(usual())
    again = json.dumps({"64": ENTRY | {"num_warps": 8}})[1:-1]
    found = read(written(tmp_path, f"{whole[:-1]}, {again}}}"))
    assert found.entries["64"]["num_warps"] == 8
    assert [line for line in found.warnings if "'64' stands in the file more than once" in line]


@pytest.mark.parametrize(
    ("keys", "sentences"),
    [
        ([1, 4, 16, 64, 256, 1024, 4096], []),  # never more than a factor of two off
        ([8, 16, 64, 256, 1024, 4096], ["no key near 1, 2 tokens: servers take 8's there"]),
        (
            [1, 4, 128, 256, 1024, 4096],
            ["no key near 16, 32, 64 tokens: servers take 4's there"],
        ),  # 128 is 64 away
        (
            [64],
            [
                "no key near 1, 2, 4, 8, 16, 256, 512, 1024, 2048, 4096 tokens: servers take 64's there",
            ],
        ),
    ],
)
def test_gaps(tmp_path: Path, keys: list[int], sentences: list[str]) -> None:
    document = {str(key): ENTRY for key in keys}
    assert list(read(written(tmp_path, document)).warnings) == sentences
