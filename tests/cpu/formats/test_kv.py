"""Every file of formats/kv: what a row becomes, that it comes back, and the scales that checkpoints hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from firebox.cache.pool import LayerCache, PoolSizes, StateCache, allocate_pool
from firebox.cache.specs import LatentSpec, PagedSpec, RecurrentSpec, WindowSpec, cache_needs
from firebox.errors import UnsupportedFormat
from firebox.find import load, names
from firebox.formats.kv import fp8
from firebox.formats.kv.base import ScaleSlot, require_fp8_scales, scale_slots

FORMATS = [load("formats.kv", name) for name in names("formats.kv")]
by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.__name__.rpartition(".")[2])
CPU = torch.device("cpu")
CODES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
LEVELS = [float(code) for code in CODES if not math.isnan(float(code))]  # every number that e4m3 has


def test_the_room_and_its_bytes() -> None:
    assert {name: load("formats.kv", name).DTYPE.itemsize for name in names("formats.kv")} == {
        "bf16": 2,
        "float16": 2,
        "float32": 4,
        "fp8": 1,
    }
    assert [f.__name__.rpartition(".")[2] for f in FORMATS if f.SCALED] == ["fp8"]


@by_name
def test_what_is_stored_is_stored_again_as_the_same(format: Any) -> None:
    """encode(decode(code)) = code, for every code of 8 or 16 bits and many of 32."""
    size = format.DTYPE.itemsize
    if size == 4:
        codes = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).int()
    else:
        codes = torch.arange(2 ** (8 * size)).to(torch.uint8 if size == 1 else torch.uint16)
    stored = codes.view(format.DTYPE)
    for scale in (1.0, 0.37, 3e-5, 1234.5) if format.SCALED else (1.0,):
        meant = format.decode(stored, scale)
        assert meant.dtype == torch.float32
        again = format.encode(meant, scale)
        assert again.dtype == format.DTYPE
        number = ~meant.isnan()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
        assert torch.equal(again.view(bits)[number], stored.view(bits)[number])
        assert again.float()[~number].isnan().all() and int((~number).sum()) >= 2


@by_name
def test_a_row_does_not_depend_on_those_beside_it(format: Any) -> None:
    rows = torch.randn(33, 3, 16, generator=torch.Generator().manual_seed(0)) * 200
    whole = format.decode(format.encode(rows, 0.5), 0.5)
    for first, last in ((0, 1), (5, 6), (7, 24), (32, 33)):
        assert torch.equal(format.decode(format.encode(rows[first:last], 0.5), 0.5), whole[first:last])


def nearest(value: float) -> float:
    """The level that is nearest to `value`, of two equally near ones that with the even code."""
    best = min(abs(level - value) for level in LEVELS)
    near = [i for i in range(256) if not math.isnan(float(CODES[i])) and abs(float(CODES[i]) - value) == best]
    return float(CODES[next(i for i in near if i % 2 == 0 or len(set(near)) == 1)])


def test_fp8_takes_the_nearest_level() -> None:
    """Also halfway between two, and among the subnormal ones below 2^-6."""
    positive = sorted(level for level in set(LEVELS) if level >= 0)
    halfway = [(low + high) / 2 for low, high in itertools.pairwise(positive)]
    rng = torch.Generator().manual_seed(0)
    sizes = (1e-3, 0.05, 1.0, 100.0)
    drawn = torch.cat([torch.randn(200, generator=rng) * size for size in sizes]).tolist()
    values = [*halfway, *(-value for value in halfway), *drawn]
    for scale in (1.0, 0.25):
        stored = fp8.encode(torch.tensor(values) * scale, scale)
        assert stored.float().tolist() == [nearest(value) for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5, 40.0])
def test_fp8_saturates_and_keeps_nan(dtype: torch.dtype, scale: float) -> None:
    edge = 448.0 * scale
    rows = torch.tensor([edge, 1.04 * edge, 1.2 * edge, 1e30, torch.inf], dtype=dtype)
    assert fp8.decode(fp8.encode(rows, scale), scale).tolist() == [edge] * 5
    assert fp8.decode(fp8.encode(-rows, scale), scale).tolist() == [-edge] * 5
    assert fp8.decode(fp8.encode(torch.tensor([torch.nan], dtype=dtype), scale), scale).isnan().all()


def test_fp8_saturates_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not because a cast does: torch's saturates in some releases and makes NaN in others."""
    monkeypatch.setattr(fp8, "DTYPE", torch.float32)
    assert fp8.encode(torch.tensor([449.0, -1e30, torch.inf]), 1.0).tolist() == [448.0, -448.0, 448.0]


def test_fp8_is_off_by_a_sixteenth_at_most() -> None:
    """2^-4 of a value from the smallest normal level on, 2^-10 below it; the scale moves both."""
    values = torch.logspace(-6, math.log10(448), 100_000)
    for scale in (1.0, 0.01):
        error = (fp8.decode(fp8.encode(values * scale, scale), scale) / scale - values).abs()
        assert (error <= (values * 2**-4).clamp(min=2**-10) * (1 + 1e-6)).all()
        assert (error / values)[values >= 2**-6].max() > 0.99 / 17  # halfway after a power of two


# ---- in a cache


@by_name
def test_every_cache_kind_stores_in_the_format(format: Any) -> None:
    specs = [
        PagedSpec(2, 8),
        WindowSpec(2, 8, 4),
        LatentSpec(6, 2),
        RecurrentSpec(4, 3, 2, 4, 4),
        None,
    ]
    scales = [(0.5, 2.0), (0.25, 4.0), (0.125, 9.0), (1.0, 1.0), (1.0, 1.0)]
    caches = allocate_pool(specs, PoolSizes(3, 4, window_pages=5, states=2), format, CPU, scales)
    slots, pages = torch.tensor([13, 4, 6]), torch.tensor([1, 3])
    for spec, pair, cache in zip(specs[:3], scales, caches, strict=False):
        assert isinstance(cache, LayerCache) and cache.k.dtype == cache.v.dtype == format.DTYPE
        shapes = [torch.Size((3, *row)) for row in spec.row_shapes]  # type: ignore[union-attr]
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50 for shape in shapes]
        cache.write(slots, *rows)
        k, v = cache.read(pages)
        expected_k = format.decode(format.encode(rows[0], pair[0]), pair[0])
        if isinstance(spec, LatentSpec):  # one row, which is key and value: the key's scale
            expected_v = expected_k[..., :6]
        else:
            expected_v = format.decode(format.encode(rows[1], pair[1]), pair[1])
        for found, expected in ((k, expected_k), (v, expected_v)):
            assert found.dtype == torch.float32
            assert torch.equal(found[[5, 0, 2]], expected)  # pages 1 and 3: slots 4 to 7, then 12 to 15
            assert not found[[1, 3, 4, 6, 7]].any()
    assert isinstance(caches[3], StateCache) and caches[4] is None
    assert caches[3].conv.dtype == caches[3].matrix.dtype == torch.float32
    stored = sum(part.nbytes for part in (caches[0].k, caches[0].v, caches[2].k))  # type: ignore[union-attr]
    needs = cache_needs([specs[0], specs[2]], format.DTYPE.itemsize)
    assert stored == needs.full_bytes_per_token * 4 * 4


# ---- a checkpoint's scales


@pytest.mark.parametrize("name", ["a.k_scale", "a.attn.k_scale", "a.k_proj.k_scale"])
def test_a_scale_under_any_of_its_names(name: str) -> None:
    scales = torch.ones(2)
    keys, values = scale_slots("a", scales)
    assert name in keys.tensors and name.replace("k_", "v_") in values.tensors
    assert all(spec.optional and spec.shape == () for spec in keys.tensors.values())
    keys.fill({name: torch.tensor([0.25], dtype=torch.bfloat16)})
    assert scales.tolist() == [0.25, 1.0]
    values.fill({name.replace("k_", "v_"): torch.tensor(3.0)})
    assert scales.tolist() == [0.25, 3.0]
    (only,) = scale_slots("a", scales, values=False)
    assert only.names == keys.names


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_cannot_be_a_scale(value: float) -> None:
    with pytest.raises(UnsupportedFormat, match=r"a\.k_scale is"):
        ScaleSlot(("a.k_scale",), torch.ones(1)).fill({"a.k_scale": torch.tensor(value)})


def test_two_names_that_disagree() -> None:
    target = torch.ones(1)
    slot = ScaleSlot(("a.k_scale", "b.k_scale"), target)
    slot.fill({"a.k_scale": torch.tensor(0.5), "b.k_scale": torch.tensor(0.5)})
    assert target.tolist() == [0.5]
    with pytest.raises(UnsupportedFormat, match=r"0\.5.*0\.25"):
        slot.fill({"a.k_scale": torch.tensor(0.5), "b.k_scale": torch.tensor(0.25)})


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "'int'"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "'num_bits': 4"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}, "attn_head"),
        ({"kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
        ({"quantization": {"kv_cache_quant_algo": "INT8"}}, "INT8"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, None),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, None),
        ({"kv_cache_quant_algo": "FP8"}, None),
        ({"kv_cache_scheme": None}, None),
    ],
)
def test_scales_for_another_cache_are_refused(section: dict[str, Any], named: str | None) -> None:
    require_fp8_scales({})
    if named is None:
        require_fp8_scales({"quantization_config": section})
        return
    with pytest.raises(UnsupportedFormat, match=named):
        require_fp8_scales({"quantization_config": section})
