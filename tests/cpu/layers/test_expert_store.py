"""The store of a layer's experts: what the kernels' oracle reads from it is what each format's own oracle
makes of the tensors that were put in; and invented weights have the size and the codes that they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firebox.formats import (
    awq,
    bf16,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    gptq,
    int4_group,
    layouts,
    mxfp4,
    nvfp4,
)
from firebox.formats.base import Cut, Format, FormatOf, OneOf, Slot
from firebox.formats.layouts import E2M1_BITS, INT4_BITS, from_panels, unpack_words
from firebox.hardware.base import find_gpu
from firebox.kernels import _linear
from firebox.kernels._experts import (
    FORMATS,
    FP8,
    MXFP4,
    NIBBLES,
    NVFP4,
    Problem,
    biases_of,
    dequantised,
)
from firebox.kernels.cpu_moe_block import Problem as LayerProblem
from firebox.layers._expert_store import ExpertStore
from firebox.layers._invented import invented
from firebox.layers._pack import Packed, pack
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.layers.moe_gpu import MoeKernels
from firebox.layers.moe_names import MoeNames
from tests.support import quantise
from tests.support.by_hand import awq_tensors, gptq_tensors, integer_quantise
from tests.support.small_models import fp8_blocks, mxfp4_groups

Tensors = dict[str, torch.Tensor]
HIDDEN, INTER, EXPERTS = 384, 256, 3
CPU = torch.device("cpu")
EXACT, BF16_SCALE = 1e-6, 2.0**-7.99  # a float32 scale of 4-bit integers becomes bf16


def compressed(layout: str, **arguments: Any) -> Callable[[torch.Tensor], Tensors]:
    return lambda matrix: quantise.compress(layout, quantise.compressed_scheme(**arguments), matrix)


def fp8_tensor_of(matrix: torch.Tensor) -> Tensors:
    scale = matrix.abs().max() / 448
    return {"weight": (matrix / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def mxfp4_of(matrix: torch.Tensor) -> Tensors:
    blocks, scales = mxfp4_groups(matrix)
    return {"blocks": blocks, "scales": scales}


def int4_of(group: int, **further: Any) -> Callable[[torch.Tensor], Tensors]:
    return compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=group, **further)


def awq_of(group: int) -> Callable[[torch.Tensor], Tensors]:
    return lambda matrix: awq_tensors(*integer_quantise(matrix, group))


def gptq_of(group: int) -> Callable[[torch.Tensor], Tensors]:
    def quantised(matrix: torch.Tensor) -> Tensors:
        group_of = torch.arange(matrix.shape[1]) // group
        return gptq_tensors(*integer_quantise(matrix, group), 4, group_of, 1)

    return quantised


@dataclass(frozen=True)
class Case:
    """`kernels`: what they call the format, in groups of `group`."""

    kernels: str
    format: Format
    quantised: Callable[[torch.Tensor], Tensors]
    limit: float
    group: int = 32
    panels: bool = False

    def store(self) -> ExpertStore:
        return scribbled(self.kernels, self.group, self.panels)

    def pack(self, tensors: Tensors, rows: int, columns: int) -> Packed:
        unit = problem(self.kernels, int4_columns=self.group, panels=self.panels).unit
        return pack(self.format, tensors, rows, columns, nibbles=self.kernels in NIBBLES, unit=unit)


ASYMMETRIC = int4_of(64, symmetric=False)
CASES = {
    "bf16": Case("bf16", bf16.Format(), lambda matrix: {"weight": matrix.bfloat16()}, 0),
    "fp8_tensor": Case("fp8_tensor", fp8_tensor.Format(), fp8_tensor_of, 0),
    "fp8_channel": Case("fp8_channel", fp8_channel.Format(), fp8_channel.quantise, 0),
    "fp8_block": Case("fp8_block", fp8_block.Format(), fp8_blocks, 0),
    "int4_group": Case("int4_group", int4_group.Format(32), int4_of(32), BF16_SCALE),
    "int4 in 128": Case("int4_group", int4_group.Format(128), int4_of(128), BF16_SCALE, 128),
    "asymmetric": Case("int4_zero", int4_group.Format(64, symmetric=False), ASYMMETRIC, BF16_SCALE, 64),
    "awq": Case("int4_zero", awq.Format(128), awq_of(128), BF16_SCALE, 128),
    "awq in 32": Case("int4_zero", awq.Format(32), awq_of(32), BF16_SCALE),
    "gptq": Case("int4_zero", gptq.Format(128), gptq_of(128), BF16_SCALE, 128),
    "gptq in 64": Case("int4_zero", gptq.Format(64), gptq_of(64), BF16_SCALE, 64),
    "mxfp4": Case("mxfp4", mxfp4.Format(), mxfp4_of, 0),
    "mxfp4 nibbles": Case("mxfp4_nibbles", mxfp4.Format(), mxfp4_of, 0),
    "nvfp4": Case("nvfp4", nvfp4.Format(), quantise.modelopt_nvfp4, EXACT),
    "mxfp4 in panels": Case("mxfp4", mxfp4.Format(), mxfp4_of, 0, panels=True),
    "nvfp4 in panels": Case("nvfp4", nvfp4.Format(), quantise.modelopt_nvfp4, EXACT, panels=True),
    "int4 in panels": Case("int4_group", int4_group.Format(32), int4_of(32), BF16_SCALE, panels=True),
    "awq in panels": Case("int4_zero", awq.Format(128), awq_of(128), BF16_SCALE, 128, panels=True),
    "nvfp4 nibbles": Case("nvfp4_nibbles", nvfp4.Format(), quantise.modelopt_nvfp4, EXACT),
}


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of different sizes, so that no row's scale can stand for another's."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values * 0.02 * (1 + torch.arange(rows) % 5).unsqueeze(-1)


def problem(format: str, **options: Any) -> Problem:
    return Problem(HIDDEN, INTER, EXPERTS, 2, format, **options)


def scribbled(format: str, group: int = 32, panels: bool = False) -> ExpertStore:
    """Every byte that is there before is one of NaN, or of the highest code."""
    store = ExpertStore(problem(format, int4_columns=group, panels=panels), CPU)
    for weights in (store.gate_up, store.down):
        for name in ("w", "scale", "row_scale"):
            if getattr(weights, name) is not None:
                getattr(weights, name).view(torch.uint8).fill_(0xFF)
    return store


def test_every_format_of_experts_is_tried() -> None:
    assert {case.kernels for case in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_what_was_put_in_is_what_the_oracle_reads(name: str) -> None:
    """Matrix by matrix in any order; the expert between them is not touched."""
    case = CASES[name]
    store, shapes = case.store(), ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
    meant: dict[tuple[int, int], torch.Tensor] = {}
    for e, part in ((2, 1), (0, 2), (2, 0), (0, 0), (2, 2), (0, 1)):
        tensors = case.quantised(matrix(*shapes[part], seed=3 * e + part))
        meant[e, part] = case.format.dequantise(tensors, *shapes[part]).float()
        packed = case.pack(tensors, *shapes[part])
        store.keep_down(e, packed) if part == 2 else store.keep_half(e, part, packed)
    for e in (0, 2):
        gate_up = dequantised(store.problem, store.gate_up, e, halves=True)
        torch.testing.assert_close(gate_up, torch.cat((meant[e, 0], meant[e, 1])), rtol=case.limit, atol=0)
        down = dequantised(store.problem, store.down, e, halves=False)
        torch.testing.assert_close(down, meant[e, 2], rtol=case.limit, atol=0)
    assert (packed.format, packed.group) == (case.kernels, store.problem.group)
    for weights in (store.gate_up, store.down):
        assert (weights.w[1].view(torch.uint8) == 0xFF).all()
        for scale in (weights.scale, weights.row_scale):
            assert scale is None or (scale[1].view(torch.uint8) == 0xFF).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.panels])
def test_what_is_left_of_the_last_panel_is_zeros(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in gpt-oss, whose 2,880 columns are 22.5 panels."""
    monkeypatch.setattr(layouts, "PANELS", (512,))
    monkeypatch.setattr(layouts, "PANELS_EMPTY", 1.0)
    test_what_was_put_in_is_what_the_oracle_reads(name)
    case = CASES[name]
    store = case.store()
    store.invent(torch.Generator().manual_seed(5))
    for weights, columns in ((store.gate_up, HIDDEN), (store.down, INTER)):
        behind = from_panels(weights.w.view(torch.uint8))[..., columns // 2 :]
        assert behind.shape[-1] == (512 - columns) // 2 and not behind.any()


def test_units_that_are_not_full_are_made_up_with_zeros_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gpt-oss's last panel, of which a word has the first two codes."""
    monkeypatch.setattr(layouts, "PANELS_EMPTY", 1.0)
    store = ExpertStore(Problem(192, 320, 2, 1, "mxfp4", panels=True), CPU)
    assert store.problem.unit == 128
    store.invent(torch.Generator().manual_seed(5))
    for weights, columns, last in ((store.gate_up, 192, 1), (store.down, 320, 2)):
        words, bits = weights.w.view(torch.int16), layouts.bits_of_columns(columns, 128, E2M1_BITS)
        assert words.shape[1:] == (last + 1, weights.w.shape[2], 32)
        behind = ~bits.view(torch.int16)[-32:]
        assert behind.any() and not (words[:, last] & behind).any()
        assert all((words[:, last] & 1 << place).any() for place in E2M1_BITS[1])
        assert words[:, 0].unique().numel() > 10_000


def test_words_in_other_units_than_the_store_reads_are_refused() -> None:
    case = CASES["mxfp4 in panels"]
    tensors = case.quantised(matrix(HIDDEN, INTER, seed=0))
    with pytest.raises(AssertionError, match="units of 32"):
        case.store().keep_down(0, pack(case.format, tensors, HIDDEN, INTER))


def test_gate_and_up_rows_alternate_in_runs_of_eight() -> None:
    store = ExpertStore(problem("bf16"), CPU)
    numbers = torch.arange(INTER, dtype=torch.float32).unsqueeze(-1).expand(-1, HIDDEN)
    for half, sign in ((0, 1), (1, -1)):
        packed = pack(bf16.Format(), {"weight": sign * (numbers + 1)}, INTER, HIDDEN)
        store.keep_half(1, half, packed)
    found = store.gate_up.w[1, :, 0].tolist()
    for row, value in enumerate(found):
        run, place = divmod(row, 8)
        assert value == (1 if run % 2 == 0 else -1) * (run // 2 * 8 + place + 1), row
    assert not store.gate_up.w[0].any() and not store.gate_up.w[2].any()


def test_biases_are_there_where_the_problem_has_them() -> None:
    store = ExpertStore(problem("bf16", biases=True), CPU)
    assert store.gate_up.bias is not None and not store.gate_up.bias.any()
    assert store.down.bias is not None and store.down.bias.shape == (EXPERTS, HIDDEN)
    assert ExpertStore(problem("bf16"), CPU).down.bias is None


# ---- through the slots of a layer


def kernels(names: MoeNames, format_of: FormatOf, **options: Any) -> MoeKernels:
    gpu = find_gpu("gb10")
    build = Build(
        gpu, CPU, torch.bfloat16, torch.bfloat16, 64, format_of=format_of, shared=Device(gpu, CPU, 64)
    )
    given: dict[str, Any] = {"shared_experts": 0, "routed_scale": 1.0, "eps": 1e-5, "top_k": 2} | options
    sizes = LayerProblem(hidden=HIDDEN, inter=INTER, experts=EXPERTS, dtype=torch.bfloat16, **given)
    return MoeKernels(build, sizes, names, 1, (Cut(0, INTER, "inter"), Cut(1, INTER, "inter")))


def fill(slots: list[Slot], tensors: Tensors) -> None:
    assert {name for slot in slots for name in slot.tensors} == set(tensors)
    for slot in slots:
        slot.fill({name: tensors[name] for name in slot.tensors})


def read(made: MoeKernels, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate over up, and down, of expert e."""
    store = made._store
    return (
        dequantised(store.problem, store.gate_up, e, halves=True),
        dequantised(store.problem, store.down, e, halves=False),
    )


@pytest.mark.parametrize("name", ["mxfp4", "bf16"])
def test_gpt_oss_stores_gate_and_up_rows_in_turn(name: str) -> None:
    """All experts in one tensor; unquantised ones transposed. Its biases alternate as well."""
    format: Format = mxfp4.Format() if name == "mxfp4" else bf16.Format()
    made = kernels(
        MoeNames("r", fused="x"), lambda path: format, scoring="softmax_top_k", renormalise=False,
        biases=True, activation="clamped_swiglu", limit=7.0, alpha=1.702,
    )  # fmt: skip
    pair = torch.stack([matrix(2 * INTER, HIDDEN, e) for e in range(EXPERTS)])
    down = torch.stack([matrix(HIDDEN, INTER, 10 + e) for e in range(EXPERTS)])
    biases = {
        "x.gate_up_proj_bias": matrix(EXPERTS, 2 * INTER, 20),
        "x.down_proj_bias": matrix(EXPERTS, HIDDEN, 21),
    }
    stored: Tensors = {}
    meant = []
    for part, weight in (("gate_up_proj", pair), ("down_proj", down)):
        if name == "bf16":
            stored[f"x.{part}"] = weight.transpose(1, 2).bfloat16()
            meant.append(weight.bfloat16().float())
            continue
        blocks, scales = mxfp4_groups(weight)
        stored |= {f"x.{part}_blocks": blocks, f"x.{part}_scales": scales}
        each = ({"blocks": b, "scales": s} for b, s in zip(blocks, scales, strict=True))
        meant.append(torch.stack([format.dequantise(one, *weight.shape[1:]) for one in each]))
    fill([slot for slot in made.slots(interleaved=True) if not isinstance(slot, OneOf)], stored | biases)
    for e in range(EXPERTS):
        gate_up, its_down = read(made, e)
        assert torch.equal(gate_up, torch.cat((meant[0][e, 0::2], meant[0][e, 1::2])))
        assert torch.equal(its_down, meant[1][e])
    nothing: Any = SimpleNamespace(weight=torch.ones(HIDDEN))
    made.finish(nothing, nothing, torch.empty(0), (nothing, nothing, nothing))
    row = biases["x.gate_up_proj_bias"][1]
    assert torch.equal(
        torch.as_tensor(biases_of(made._store.gate_up, 1, halves=True)), torch.cat((row[0::2], row[1::2]))
    )
    assert torch.equal(
        torch.as_tensor(biases_of(made._store.down, 1, halves=False)), biases["x.down_proj_bias"][1]
    )


@pytest.mark.parametrize("name", ["awq", "gptq in 64", "asymmetric", "nvfp4 nibbles", "mxfp4 nibbles"])
def test_experts_one_by_one_in_four_bits(name: str) -> None:
    """Through the layer's own slots, on a GPU whose tensor cores multiply 4-bit floats."""
    case = CASES[name]
    made = kernels(MoeNames.usual("m"), lambda path: case.format, scoring="softmax", renormalise=True)
    assert (made.problem.format, made.problem.group) == (case.kernels, made._store.problem.group)
    stored: Tensors = {}
    meant = {}
    for e in range(EXPERTS):
        for part, shape in (("gate", (INTER, HIDDEN)), ("up", (INTER, HIDDEN)), ("down", (HIDDEN, INTER))):
            tensors = case.quantised(matrix(*shape, seed=5 * e + len(part)))
            meant[e, part] = case.format.dequantise(tensors, *shape)
            stored |= {f"m.experts.{e}.{part}_proj.{key}": tensor for key, tensor in tensors.items()}
    for slot in made.slots(interleaved=False):
        assert not isinstance(slot, OneOf)
        slot.fill({key: stored[key] for key in slot.tensors if key in stored})
    for e in range(EXPERTS):
        gate_up, down = read(made, e)
        wanted = torch.cat((meant[e, "gate"], meant[e, "up"]))
        torch.testing.assert_close(gate_up, wanted, rtol=case.limit, atol=0)
        torch.testing.assert_close(down, meant[e, "down"], rtol=case.limit, atol=0)


@pytest.mark.parametrize("layout", ["one tensor an expert", "one for all"])
def test_both_layouts_of_unquantised_experts_and_a_shared_one(layout: str) -> None:
    """The shared expert, in the routed ones' format and width, stands behind them."""
    made = kernels(
        MoeNames.usual("m"), lambda path: bf16.Format(), scoring="sigmoid", renormalise=True, shared_experts=1
    )
    assert made.fused == 1 and made.problem.experts == EXPERTS + 1 and made.problem.top_k == 3
    gate, up = (torch.stack([matrix(INTER, HIDDEN, s + e) for e in range(4)]).bfloat16() for s in (0, 10))
    down = torch.stack([matrix(HIDDEN, INTER, 20 + e) for e in range(4)]).bfloat16()
    paths = [*(f"m.experts.{e}" for e in range(EXPERTS)), "m.shared_experts"]
    single = {
        f"{path}.{part}_proj.weight": weight[e]
        for e, path in enumerate(paths)
        for part, weight in (("gate", gate), ("up", up), ("down", down))
    }
    slots: list[Slot] = []
    for entry in made.slots(interleaved=False):
        slots += entry.layouts[layout == "one for all"] if isinstance(entry, OneOf) else [entry]
    if layout == "one for all":
        single = {name: tensor for name, tensor in single.items() if "shared" in name}
        single["m.experts.gate_up_proj"] = torch.cat((gate[:EXPERTS], up[:EXPERTS]), 1)
        single["m.experts.down_proj"] = down[:EXPERTS]
    fill(slots, single)
    for e in range(EXPERTS + 1):
        gate_up, its_down = read(made, e)
        assert torch.equal(gate_up, torch.cat((gate[e], up[e])).float())
        assert torch.equal(its_down, down[e].float())


# ---- invented weights

# Scales of mxfp4 are powers of two, up to √2 from what would be right; 100, nvfp4's, is 96 in E4M3.
SLACK = {**dict.fromkeys(MXFP4, 2**0.5), **dict.fromkeys(NVFP4, 1.05)}


@pytest.mark.parametrize("name", _linear.FORMATS)
def test_invented_weights_have_their_size_and_every_code(name: str) -> None:
    rows, columns = 512, 4096
    group = _linear.GROUPS.get(name, (0,))[0]
    made = invented(name, group, (rows,), columns, torch.Generator().manual_seed(4))
    found = _linear.dequantised(_linear.Problem(rows, columns, name, group), _linear.Weights(*made))
    size = columns**-0.5
    assert size / SLACK.get(name, 1.03) < float(found.std()) < size * SLACK.get(name, 1.03)
    sums = found.sum(1)  # of what like inputs become: no output has a share of it that all the others have
    assert abs(float(sums.mean())) < 0.2 * float(sums.std())
    there = sorted(set(codes(name, group, made[0]).flatten().tolist()))
    every = [code for code in range(256) if code & 127 != 127] if name in FP8 else list(range(16))
    assert there == ([0] if name == "bf16" else every)
    assert found.isfinite().all()


def codes(name: str, group: int, w: torch.Tensor) -> torch.Tensor:
    """As small integers; 0 for bf16, which has none."""
    if name in FP8:
        return w.view(torch.uint8)
    bits = E2M1_BITS if name in ("mxfp4", "nvfp4") else INT4_BITS
    return unpack_words(w, group, bits) if group else torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "panels"), [*((name, False) for name in FORMATS), ("mxfp4", True), ("nvfp4", True)]
)
def test_an_invented_store_fills_all_experts_with_their_own(name: str, panels: bool) -> None:
    store = scribbled(name, panels=panels)
    store.invent(torch.Generator().manual_seed(5))
    slack = SLACK.get(name, 1.03)
    for weights, columns in ((store.gate_up, HIDDEN), (store.down, INTER)):
        each = [dequantised(store.problem, weights, e, halves=False) for e in range(EXPERTS)]
        for one in each:
            assert one.isfinite().all() and 1 / slack < float(one.std()) * columns**0.5 < slack
        assert not torch.equal(each[0], each[1]) and not torch.equal(each[1], each[2])
        again = ExpertStore(problem(name, panels=panels), CPU)
        again.invent(torch.Generator().manual_seed(5))
    assert torch.equal(again.down.w.view(torch.uint8), store.down.w.view(torch.uint8))
