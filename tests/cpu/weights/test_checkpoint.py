"""A model folder in every state it can be in: what is read, and which error names which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from firebox.errors import CheckpointError, CorruptShard
from firebox.weights.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint

TENSORS = {
    name: torch.arange(6, dtype=torch.float32).view(2, 3) + i for i, name in enumerate(("a", "b", "c", "d"))
}
SHARDS = {"model-00001-of-00002.safetensors": ("a", "c"), "model-00002-of-00002.safetensors": ("b", "d")}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "glm4_moe"})
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "glm4_moe"})
    for shard, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / shard)
    write_json(
        tmp_path / INDEX, {"weight_map": {name: shard for shard, names in SHARDS.items() for name in names}}
    )
    return tmp_path


def read_all(folder: Path) -> dict[str, tuple[torch.Tensor, str]]:
    """Every tensor, and the shard it is in; the headers and the data agree about what there is."""
    checkpoint = open_checkpoint(folder)
    shards = checkpoint.names()
    found = list(checkpoint.tensors(shards))
    assert sorted(name for name, _ in found) == sorted(shards), "each tensor once"
    return {name: (tensor, shards[name]) for name, tensor in found}


def test_a_single_file(single: Path) -> None:
    found = read_all(single)
    assert set(found) == set(TENSORS)
    assert all(
        torch.equal(tensor, TENSORS[name]) and shard == SINGLE for name, (tensor, shard) in found.items()
    )


def test_shards_with_an_index(sharded: Path) -> None:
    found = read_all(sharded)
    assert {name: shard for name, (_, shard) in found.items()} == {
        n: s for s, names in SHARDS.items() for n in names
    }
    assert all(torch.equal(tensor, TENSORS[name]) for name, (tensor, _) in found.items())


def test_only_what_is_wanted_is_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    found = list(checkpoint.tensors({"d", "a", "no such tensor"}))
    assert [name for name, _ in found] == ["a", "d"], "in the order of the shards"
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found)
    assert list(checkpoint.tensors(())) == []


def test_the_index_decides_which_files_are_read(sharded: Path) -> None:
    """A stray file, even one with the usual name, is not read when there is an index."""
    save_file({"stray": torch.zeros(1)}, sharded / SINGLE)
    assert set(read_all(sharded)) == set(TENSORS)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_total_bytes_are_those_on_disk(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert open_checkpoint(folder).total_bytes == on_disk > 4 * 24


def test_a_folder_with_only_a_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "x"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shards == () and checkpoint.total_bytes == 0
    assert checkpoint.names() == {} and list(checkpoint.tensors(TENSORS)) == []


# ---- broken folders


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"[1]", b'"text"', b"null"])
def test_a_json_file_that_is_none(single: Path, name: str, content: bytes) -> None:
    (single / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(single)
    assert str(single / name) in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_weight_map(sharded: Path, index: dict[str, Any]) -> None:
    write_json(sharded / INDEX, index)
    with pytest.raises(CheckpointError, match="weight_map") as caught:
        open_checkpoint(sharded)
    assert str(sharded / INDEX) in str(caught.value)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_shard(sharded: Path, shard: str) -> None:
    (sharded / shard).unlink()
    with pytest.raises(CorruptShard, match="is missing") as caught:
        open_checkpoint(sharded)
    assert str(sharded / shard) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("kept_bytes", [0, 4, 40, -1])
def test_a_truncated_shard(sharded: Path, kept_bytes: int) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    checkpoint, seen = open_checkpoint(sharded), []

    def read() -> None:
        for name, _ in checkpoint.tensors(TENSORS):
            seen.append(name)

    with pytest.raises(CorruptShard) as caught:
        read()
    assert str(path) in str(caught.value) and caught.value.hint
    assert sorted(seen) == ["a", "c"], "the whole shard before it was read"
    with pytest.raises(CorruptShard) as caught:
        checkpoint.names()
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_shard_that_is_something_else(single: Path) -> None:
    (single / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for read in (Checkpoint.names, lambda checkpoint: list(checkpoint.tensors(TENSORS))):
        with pytest.raises(CorruptShard) as caught:
            read(open_checkpoint(single))
        assert str(single / SINGLE) in str(caught.value)


def test_a_shard_that_is_a_folder(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    for read in (Checkpoint.names, lambda checkpoint: list(checkpoint.tensors(TENSORS))):
        with pytest.raises(CorruptShard, match=SINGLE):
            read(open_checkpoint(single))


# ---- what config.json and generation_config.json say


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 7}])
def test_no_model_type(tmp_path: Path, config: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match="has no model_type") as caught:
        _ = open_checkpoint(tmp_path).model_type
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None}, "float32"),
        ({}, "float32"),
    ],
)
def test_dtype(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    write_json(tmp_path / "config.json", config)
    assert open_checkpoint(tmp_path).dtype == expected


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({"eos_token_id": 3}, None, {3}),
        ({"eos_token_id": [3, 4]}, None, {3, 4}),
        ({"eos_token_id": 3}, {"eos_token_id": [0, 9]}, {0, 9}),
        ({"eos_token_id": 3}, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": 3}, {"pad_token_id": 1}, {3}),
        ({"eos_token_id": None}, {}, set()),
    ],
)
def test_eos_token_ids(tmp_path: Path, config: Any, generation_config: Any, expected: set[int]) -> None:
    write_json(tmp_path / "config.json", config)
    if generation_config is not None:
        write_json(tmp_path / "generation_config.json", generation_config)
    assert open_checkpoint(tmp_path).eos_token_ids == expected
