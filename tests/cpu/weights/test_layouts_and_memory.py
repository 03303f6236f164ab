"""From shards to filled weights: layouts, refusals before anything is read, and how much the host holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from firebox.errors import (
    CheckpointError,
    CorruptShard,
    MissingTensor,
    UnknownTensor,
    UnsupportedFormat,
    WrongShape,
)
from firebox.find import load
from firebox.formats import fp8_channel, fp8_tensor, int4_group
from firebox.formats.base import OneOf, PlainSlot, Slots, WeightSlot
from firebox.weights.checkpoint import Checkpoint, open_checkpoint
from firebox.weights.load import load_weights
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import InProcessEngine
from tests.support.quantise import read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]


class Weights:
    """A model that is only its slots."""

    def __init__(self, *slots: Any) -> None:
        self._slots, self.finished = slots, False

    def slots(self) -> Slots:
        yield from self._slots

    def unused(self, name: str) -> str | None:
        return "is a spare" if name.startswith("spare.") else None

    def finish(self) -> None:
        self.finished = True


def fill(model: Weights, folder: Path, *shards: Tensors) -> None:
    """Writes the shards and loads them."""
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, folder / file)
    owners = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    (folder / "config.json").write_text(json.dumps({"model_type": "weights"}))
    load_weights(model, open_checkpoint(folder))  # type: ignore[arg-type]


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


# ---- layouts


def fused(tensors: Tensors, layers: list[int], experts: int) -> Tensors:
    """A per-expert checkpoint with the experts of these layers in two tensors each."""
    found = dict(tensors)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [found.pop(f"{prefix}.{e}.{part}.weight") for e in range(experts)]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        found[f"{prefix}.down_proj"] = torch.stack(parts["down_proj"])
    return found


@pytest.mark.parametrize("layers", [[], [0, 2], [2]], ids=["per expert", "fused", "one layer fused"])
def test_experts_one_by_one_and_all_in_one(tmp_path: Path, layers: list[int]) -> None:
    config = load("models", "qwen3_moe").TINY
    source = write_checkpoint(tmp_path / "source", config)
    write_tensors(tmp_path / "found", config, fused(read_tensors(source), layers, config["num_experts"]))
    prompt = [5, 200, 17, 3, 90]
    expected = reference_greedy(load_reference(source), prompt, 24)
    assert InProcessEngine(tmp_path / "found").generate([prompt]) == [expected]


def test_the_layout_that_is_there_is_taken(tmp_path: Path) -> None:
    for stored in ("one", "other"):
        one, other = nan(2, 2), nan(2, 2)
        folder = tmp_path / stored
        folder.mkdir()
        model = Weights(OneOf(((PlainSlot("one", one),), (PlainSlot("other", other),))))
        fill(model, folder, {stored: torch.ones(2, 2)})
        assert bool(one.isnan().all()) == (stored == "other") != bool(other.isnan().all())


def test_a_layout_that_is_not_whole_is_missing_what_it_lacks(tmp_path: Path) -> None:
    model = Weights(OneOf(((PlainSlot("a.0", nan(2)), PlainSlot("a.1", nan(2))), (PlainSlot("b", nan(4)),))))
    with pytest.raises(MissingTensor, match=r"lacks a\.1$"):
        fill(model, tmp_path, {"a.0": torch.ones(2)})


def test_two_layouts_at_once_are_one_too_many(tmp_path: Path) -> None:
    model = Weights(OneOf(((PlainSlot("a", nan(2)),), (PlainSlot("b", nan(2)),))))
    with pytest.raises(UnknownTensor, match=r"holds b, which weights does not have"):
        fill(model, tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})


# ---- slots


def test_a_weight_whose_parts_lie_in_several_shards(tmp_path: Path) -> None:
    """Codes, scales and shape in three shards, in the order that keeps the slot waiting longest."""
    target, plain = nan(4, 64), nan(3)
    model = Weights(WeightSlot("w", int4_group.Format(32), target), PlainSlot("p", plain))
    scales = torch.rand(4, 2) + 0.5
    fill(
        model,
        tmp_path,
        {"w.weight_shape": torch.tensor([4, 64])},
        {"p": torch.arange(3.0), "w.weight_packed": torch.full((4, 8), 0x11111111, dtype=torch.int32)},
        {"w.weight_scale": scales},
    )
    assert torch.equal(target, -7 * scales.repeat_interleave(32, 1))
    assert plain.tolist() == [0, 1, 2] and model.finished


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("with_input_scale", [True, False])
def test_scalars_and_what_may_be_absent(
    tmp_path: Path, shape: tuple[int, ...], with_input_scale: bool
) -> None:
    target = nan(3, 5)
    tensors = {
        "w.weight": torch.arange(15.0).view(3, 5).to(torch.float8_e4m3fn),
        "w.weight_scale": torch.full(shape, 0.5),
    }
    if with_input_scale:
        tensors["w.input_scale"] = torch.full(shape, 9.0)
    fill(Weights(WeightSlot("w", fp8_tensor.Format(), target)), tmp_path, tensors)
    assert torch.equal(target, torch.arange(15.0).view(3, 5) / 2)


def test_a_scalar_is_one_number(tmp_path: Path) -> None:
    tensors = {"w.weight": torch.zeros(3, 5).to(torch.float8_e4m3fn), "w.weight_scale": torch.ones(2)}
    with pytest.raises(WrongShape, match=r"w\.weight_scale is \[2\]; config\.json implies \[\]"):
        fill(Weights(WeightSlot("w", fp8_tensor.Format(), nan(3, 5))), tmp_path, tensors)


def test_narrowing_rounds_and_widening_is_exact(tmp_path: Path) -> None:
    wide, narrow = nan(4), nan(4).bfloat16()
    values = torch.tensor([1.0, 1.00390625, 3.1415927, 1e-30])
    fill(
        Weights(PlainSlot("wide", wide), PlainSlot("narrow", narrow)),
        tmp_path,
        {"wide": values.bfloat16(), "narrow": values},
    )
    assert torch.equal(wide, values.bfloat16().float()) and torch.equal(narrow, values.bfloat16())


def test_a_tensor_that_need_not_be_there(tmp_path: Path) -> None:
    kept = torch.full((2,), 7.0)
    model = Weights(PlainSlot("a", nan(2)), PlainSlot("b", kept, optional=True))
    fill(model, tmp_path, {"a": torch.ones(2), "spare.0": torch.ones(1)})
    assert kept.tolist() == [7.0, 7.0] and model.finished


# ---- refusals


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            torch.zeros(3, 5, dtype=torch.float8_e5m2),
            r"w\.weight is float8_e5m2; its format stores float8_e4m3fn",
        ),
        (torch.zeros(3, 5, dtype=torch.bfloat16), r"w\.weight is bfloat16; its format stores float8_e4m3fn"),
        (torch.zeros(3, 5, dtype=torch.uint8), r"w\.weight is uint8"),
    ],
)
def test_a_dtype_that_the_format_does_not_store(tmp_path: Path, tensor: torch.Tensor, said: str) -> None:
    model = Weights(WeightSlot("w", fp8_channel.Format(), nan(3, 5)))
    with pytest.raises(UnsupportedFormat, match=said):
        fill(model, tmp_path, {"w.weight": tensor, "w.weight_scale": torch.ones(3, 1)})
    assert not model.finished


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float8_e4m3fn])
def test_a_plain_tensor_is_a_float_of_16_or_32_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedFormat, match=r"^a is .*; its format stores float32, bfloat16, float16$"):
        fill(Weights(PlainSlot("a", nan(2))), tmp_path, {"a": torch.zeros(2).to(dtype)})


def test_a_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(WrongShape, match=r"^a is \[3, 2\]; config\.json implies \[2, 3\]$"):
        fill(Weights(PlainSlot("a", nan(2, 3))), tmp_path, {"a": torch.zeros(3, 2)})


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        ({"a": torch.ones(2)}, MissingTensor, "lacks b and 1 more"),
        (
            {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)},
            UnknownTensor,
            "model-00001-of-00001.safetensors holds d, which weights does not have",
        ),
    ],
)
def test_names_are_checked_before_anything_is_read(
    tmp_path: Path,
    tensors: Tensors,
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(self: Checkpoint, wanted: object) -> Iterator[Any]:
        raise AssertionError("something is read")

    monkeypatch.setattr(Checkpoint, "tensors", never)
    model = Weights(*(PlainSlot(name, nan(2)) for name in "abc"))
    with pytest.raises(error, match=said):
        fill(model, tmp_path, tensors)
    assert not model.finished


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    "harm",
    [
        cut_short,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        Path.unlink,
    ],
    ids=["truncated", "empty", "a pointer", "absent"],
)
def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    targets = {name: torch.zeros(64) for name in "ab"}
    fill(
        Weights(*(PlainSlot(name, target) for name, target in targets.items())),
        tmp_path,
        *({name: torch.ones(64)} for name in targets),
    )
    harm(tmp_path / "model-00002-of-00002.safetensors")
    model = Weights(*(PlainSlot(name, target) for name, target in targets.items()))
    with pytest.raises(CorruptShard, match=r"model-00002-of-00002\.safetensors"):
        load_weights(model, open_checkpoint(tmp_path))  # type: ignore[arg-type]
    assert not model.finished


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "weights"}')
    with pytest.raises(CheckpointError, match="no safetensors") as caught:
        load_weights(Weights(), open_checkpoint(tmp_path))  # type: ignore[arg-type]
    assert "--load-format dummy" in str(caught.value.hint)


def test_scales_of_an_fp8_cache_are_left_out(tmp_path: Path) -> None:
    """modelopt and compressed-tensors store them beside the projections."""
    config = load("models", "qwen3_moe").TINY
    source = write_checkpoint(tmp_path / "source", config)
    attention = "model.layers.1.self_attn"
    scales = [f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale", f"{attention}.k_scale"]
    write_tensors(tmp_path / "found", config, read_tensors(source) | {name: torch.ones(1) for name in scales})
    prompt = [5, 200, 17]
    assert InProcessEngine(tmp_path / "found").generate([prompt]) == InProcessEngine(source).generate(
        [prompt]
    )


# ---- streaming


def test_progress_rises_to_nearly_all(tmp_path: Path) -> None:
    model = Weights(*(PlainSlot(f"t{i}", nan(1000)) for i in range(300)))
    fill(model, tmp_path, *({f"t{i}": torch.ones(1000)} for i in range(300)))
    calls: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(tmp_path)
    load_weights(model, checkpoint, lambda loaded, total: calls.append((loaded, total)))  # type: ignore[arg-type]
    loaded = [call[0] for call in calls]
    assert loaded == sorted(set(loaded)) and 50 <= len(loaded) <= 110
    assert {total for _, total in calls} == {checkpoint.total_bytes} and loaded[
        -1
    ] > 0.9 * checkpoint.total_bytes


MEASURE = """
import re, sys
from pathlib import Path
import torch
from firebox.formats import fp8_channel
from firebox.formats.base import PlainSlot, WeightSlot
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.load import load_weights
from tests.cpu.weights.test_layouts_and_memory import Weights

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

shards, rows, columns = map(int, sys.argv[2:])
targets = [torch.zeros(rows, columns, dtype=torch.bfloat16).fill_(1) for _ in range(2 * shards)]
model = Weights(*(
    slot
    for i in range(shards)
    for slot in (
        PlainSlot(f"p{i}", targets[2 * i]),
        WeightSlot(f"w{i}", fp8_channel.Format(), targets[2 * i + 1]),
    )
))
checkpoint = open_checkpoint(Path(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
before = status("VmRSS")
load_weights(model, checkpoint)
assert all(float(target.float().mean()) == 0.5 for target in targets)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own count of resident memory"
)
def test_the_host_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    """Twelve shards of 12 MiB. What is resident beyond the weights themselves stays below one shard and the
    float32 copies of one weight, although every weight's scales lie in another shard."""
    shards, rows, columns = 12, 2048, 2048
    parts = [
        {
            f"p{i}": torch.full((rows, columns), 0.5, dtype=torch.bfloat16),
            f"w{i}.weight": torch.full((rows, columns), 1.0).to(torch.float8_e4m3fn),
            # a weight's scales lie in the shard before it
            f"w{(i + 1) % shards}.weight_scale": torch.full((rows, 1), 0.5),
        }
        for i in range(shards)
    ]
    spare = Weights(
        *(
            slot
            for i in range(shards)
            for slot in (
                PlainSlot(f"p{i}", nan(rows, columns)),
                WeightSlot(f"w{i}", fp8_channel.Format(), nan(rows, columns)),
            )
        )
    )
    fill(spare, tmp_path, *parts)
    shard_bytes = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *map(str, (shards, rows, columns))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    copies_bytes = 2 * 4 * rows * columns  # codes widened, and their product with the scales
    assert 2**20 < int(done.stdout) < shard_bytes + copies_bytes + 2**24
