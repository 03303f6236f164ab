"""The plan of thousands of numbers of tokens asks at some hundred of them: where those that the modules name
are not all at which something turns, a launch would be missing."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firebox.attention import triton_paged
from firebox.find import load
from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import _attention, _attention_choice, _linear, _tuned, _veto, logprobs, sample
from firebox.kernels._experts import Problem
from firebox.kernels.plan import Operation, Planned, Setting, Variants, planned
from firebox.layers import _fitting, dense_gpu, expert_paths
from firebox.layers.launches import layers_of
from firebox.layers.moe import MoeBlock
from firebox.planning._parts import first_layout, open_source
from firebox.planning.fit import Source
from tests.support.planning import opened

MAX_TOKENS = 8192
H200 = find_gpu("h200")
SMALL = dataclasses.replace(H200, smem_per_block_bytes=101_376)
ROUTED = Problem(5120, 384, 161, 9, "fp8_channel", residual=True, shared=1)
NIBBLES = Problem(2880, 2880, 32, 4, "mxfp4_nibbles", residual=True)
FP8 = _linear.Problem(3584, 5120, "fp8_channel", residual=True)
BF16 = _linear.Problem(160, 5120, "bf16", out_dtype="f32")
INT4 = _linear.Problem(4096, 2048, "int4_group", 32)
GQA = _attention.Problem(24, 2, 128, 128, 16)
OPERATIONS = tuple(
    Operation("one", problem.format, source, problem)
    for source, problem in (
        (expert_paths, ROUTED), (expert_paths, NIBBLES), (dense_gpu, FP8), (dense_gpu, BF16),
        (dense_gpu, INT4),
    )
)  # fmt: skip
ATTENTION = Operation("attention", "bf16", triton_paged, GQA)


@dataclasses.dataclass(frozen=True)
class Everywhere(Operation):
    """Asks at every number of tokens."""

    def turns(self, max_tokens: int, gpu: Gpu) -> range:
        return range(1, max_tokens + 1)


def differences(operation: Operation, gpu: Gpu, max_tokens: int = MAX_TOKENS) -> list[Planned]:
    """Rows of the plan that asks at every number and not of the plan that is made, and the other way."""
    values = {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
    slow = planned(Everywhere(**values), gpu, max_tokens)
    slow = [dataclasses.replace(row, operation=operation) for row in slow]
    fast = planned(operation, gpu, max_tokens)
    return [row for row in slow if row not in fast] + [row for row in fast if row not in slow]


@pytest.mark.parametrize(
    ("card", "gpu_name", "tp", "ep"),
    [
        ("glm-4.7-fp8", "gb10", 4, 1),
        ("glm-4.7-fp8", "h200", 8, 1),
        ("gpt-oss-120b", "h200", 1, 1),
        ("gpt-oss-20b", "rtx-5090", 1, 2),
        ("qwen3.5-397b-a17b-nvfp4", "rtx-pro-6000", 4, 1),
        ("kimi-k2.5-int4", "h200", 8, 1),
        ("qwen3-30b-a3b", "a100", 1, 1),
    ],
)
def test_the_plan_of_a_model_is_that_of_every_number(card: str, gpu_name: str, tp: int, ep: int) -> None:
    gpu = find_gpu(gpu_name)
    layers = layers_of(opened(card).model, Setting(gpu, tp, ep=ep, drafts=3))
    operations = {o for alike in layers for o in alike.operations if type(o) is Operation}
    assert {o.source.__name__.rpartition(".")[2] for o in operations} >= {"dense_gpu", "expert_paths"}
    alone = {o.source for alike in layers for o in alike.operations if type(o) is Variants}
    assert alone == {sample, logprobs}, "what launches the same for every number is not asked"
    for operation in operations:
        assert differences(operation, gpu) == [], operation


# ---- whatever a tuned file says


def tile(module: Any, problem: Any, tokens: int) -> dict[str, Any]:
    return dataclasses.asdict(module.default(problem, tokens, H200))


def entry(operation: Operation, tokens: int, draw: random.Random) -> dict[str, Any]:
    how = draw.choice(["measured", "predicted"])
    problem, source = operation.problem, operation.source
    if source is expert_paths:
        paths = [p for p in expert_paths.MODULES if p != expert_paths.SCALED or problem is NIBBLES]
        path = draw.choice(paths)
        gate_up, down = (tile(m, problem, draw.choice([16, 32, 64])) for m in expert_paths.MODULES[path])
        return {"path": path, "gate_up": gate_up, "down": down, "how": how}
    path = draw.choice([dense_gpu.FEW, dense_gpu.MANY, dense_gpu.CUBLAS])
    if path == dense_gpu.CUBLAS:
        return {"path": path, "config": None, "how": how}
    module = dense_gpu.linear_few if path == dense_gpu.FEW else dense_gpu.linear
    return {"path": path, "config": tile(module, problem, draw.choice([1, 64, 4096])), "how": how}


def numbers(draw: random.Random) -> list[int]:
    """Of tokens, in any order; four times one of them is among them, and twice it is as near to both. Some
    end where a prompt is out of an expert layer's reach."""
    most = draw.choice([200, 9000])
    one = draw.randint(1, most // 4)
    found = [one, 4 * one, *(draw.randint(1, most) for _ in range(draw.randint(0, 5)))]
    return draw.sample(list(dict.fromkeys(found)), len(set(found)))


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[str, Any], None]]:
    """Writes the one tuned file that is read."""

    def written(file: str, entries: Any) -> None:
        folder = tmp_path / _tuned.folder(H200.name)
        folder.mkdir(exist_ok=True)
        (folder / f"{file}.json").write_text(json.dumps(entries))
        _tuned.use(tmp_path)

    yield written
    _tuned.use()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_was_measured(seed: int, write: Callable[[str, Any], None]) -> None:
    draw = random.Random(seed)
    for operation in OPERATIONS:
        entries = {str(n): entry(operation, n, draw) for n in numbers(draw)}
        source = operation.source
        write(source.TUNED, {source.key(operation.problem): entries})
        assert differences(operation, H200, 4096) == [], (operation.problem, list(entries))
    keys = {}
    for kernel, rows in (("decode", 16), ("extend", 64)):
        tiles = {n: _attention.Config(rows, draw.choice([16, 32, 64]), 4, 2) for n in numbers(draw)}
        entries = {str(n): {"path": kernel, "config": dataclasses.asdict(c)} for n, c in tiles.items()}
        keys[_attention_choice.key(kernel, GQA)] = entries
    write(_attention_choice.TUNED_FILE, keys)
    _attention_choice.measured.cache_clear()
    assert differences(ATTENTION, H200, 4096) == [], keys
    _attention_choice.measured.cache_clear()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.format)
def test_with_vetoes(operation: Operation) -> None:
    """What stands in for the choices at one token, and at 3000 where there is something."""
    source: Any = operation.source
    try:
        for tokens in (1, 3000) if source is expert_paths else (1,):
            path = source.path_of(operation.problem, tokens, H200)
            _veto.veto(source.choice_of(operation.problem, path), f"wrong at {tokens}")
        assert differences(operation, H200, 4096) == []
    finally:
        _veto.lift()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.format)
def test_below_a_limit(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiler finds most tiles too large, which others stand in depends on the tokens."""
    monkeypatch.delenv("FIREBOX_SMEM_LIMIT", raising=False)

    def compile_all(requests: Sequence[Any]) -> list[Any]:
        sizes = [9_000 * request.num_stages + 31 * request.num_warps for request in requests]
        return [
            SimpleNamespace(fits=n < 26_000, error=None, shared_bytes=n, limit_bytes=26_000) for n in sizes
        ]

    monkeypatch.setattr(_fitting, "compile_all", compile_all)
    _tuned.use()
    try:
        assert differences(operation, SMALL, 2048) == []
        assert any("another" in row.why for row in planned(operation, SMALL, 2048))
    finally:
        _tuned.use()


def test_no_plan_asks_everywhere() -> None:
    """The plan of one of a model's products is a second's work for every hundred times that it asks more."""
    for operation in (*OPERATIONS, ATTENTION):
        asked = {n for n in operation.turns(MAX_TOKENS, H200) if n <= MAX_TOKENS}
        assert len(asked) < MAX_TOKENS / 10, (operation.problem, len(asked))


# ---- experts of a model, counted by kind


def blocks(model_type: str, **quantisation: Any) -> Iterator[MoeBlock]:
    config = load("models", model_type).TINY | {"dtype": "bfloat16"}
    if quantisation:
        config = config | {"quantization_config": quantisation}
    source = Source("tiny", model_type, config, "bfloat16")
    model = open_source(source, H200).model
    yield from (mlp for _, mlp in model.blocks if isinstance(mlp, MoeBlock))


FP8_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*experts.1.down_proj", "model.layers.1.mlp.experts.2.gate_proj"],
}


@pytest.mark.parametrize(
    ("model_type", "quantisation"),
    [("glm4_moe", {}), ("glm4_moe", FP8_CHANNEL), ("qwen3_moe", FP8_CHANNEL), ("gpt_oss", {})],
)
def test_counted_experts_are_all_experts(model_type: str, quantisation: dict[str, Any]) -> None:
    """The same matrices in the same formats, whichever experts are in another one."""
    several = 0
    for block in blocks(model_type, **quantisation):
        one_by_one, counted = Counter[Any](), Counter[Any]()
        for slot in first_layout(block.expert_slots()):
            one_by_one[kind(slot)] += 1
        for slot, count in block.counted_expert_slots():
            counted[kind(slot)] += count
        assert counted == one_by_one and counted
        several += len({format for format, *_ in counted}) > 1
        names = [name for slot in first_layout(block.slots()) for name in slot.tensors]
        apart = [name for slot in first_layout(block.other_slots()) for name in slot.tensors]
        routed = {name for slot in first_layout(block.expert_slots()) for name in slot.tensors}
        assert apart == [name for name in names if name not in routed] and len(apart) < len(names)
    assert (several > 0) == bool(quantisation), "this test needs experts in several formats"


def kind(slot: Any) -> tuple[Any, ...]:
    return getattr(slot, "format", None), slot.target.shape, slot.target.dtype, slot.cut
