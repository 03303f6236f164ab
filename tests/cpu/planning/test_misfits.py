"""What would help where a launch asks for more shared memory than there is: true sentences, with numbers. The
compiler is a stand-in, for which a long pipeline takes too much; one test asks the real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from firebox.config import EngineConfig
from firebox.hardware.base import find_gpu
from firebox.kernels import _attention_choice, _tuned
from firebox.kernels.compile import Compiled, CompileRequest
from firebox.kernels.plan import Operation
from firebox.layers import _fitting, dense_gpu, launches
from firebox.planning import _misfits
from firebox.planning.fit import Fit, compiled, open_source, plan
from tests.support.planning import planned, source_of
from tests.support.run_cache import run_cache

LONG = 4  # stages that take too much
CARD = "gpt-oss-20b"
TUNE = f"firebox tune {CARD} --gpu gb10 --tp 1 --dtype bfloat16 --op"
FEW = {"rows": 64, "tokens": 8, "depth": 64, "warps": 4, "stages": 3}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    _tuned.use()
    _attention_choice.measured.cache_clear()


def filed(folder: Path, gpu: str, **files: Any) -> None:
    """From now on `gpu` has these entries."""
    there = folder / f"nvidia_{gpu.replace('-', '_')}"
    there.mkdir()
    for name, entries in files.items():
        (there / f"{name}.json").write_text(json.dumps(entries))
    _tuned.use(folder)
    _attention_choice.measured.cache_clear()


def problem_of(name: str) -> Any:
    return next(
        o.problem for layers in planned(CARD, "gb10").layers for o in layers.operations if o.name == name
    )


def fit(monkeypatch: pytest.MonkeyPatch, too_much: Callable[[CompileRequest], bool]) -> Fit:
    """gpt-oss-20b on gb10."""

    def compile_all(requests: list[CompileRequest], **options: bool) -> list[Compiled]:
        sizes = [120_000 if too_much(request) else 10_000 * request.num_stages for request in requests]
        return [
            Compiled("k", 121, 101_376, True, False, None, 0.1, "3.9", "13", shared_bytes=size)
            for size in sizes
        ]

    for module in (launches, _fitting, _misfits):
        monkeypatch.setattr(module, "compile_all", compile_all)
    return compiled(planned(CARD, "gb10"))


def is_long(request: CompileRequest) -> bool:
    return request.num_stages >= LONG


def test_a_tile_that_fits_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A measured entry that does not fit: the nearest tile, which the test puts in its place; then it fits.
    Only a measurement replaces a measured entry."""
    key = _tuned.key(problem_of("experts"))
    long = {"1": {"path": "few", "gate_up": FEW | {"stages": LONG}, "down": FEW}}
    filed(tmp_path, "gb10", experts={key: long})
    found = fit(monkeypatch, is_long)
    assert not found.fits and "120000 bytes of shared memory of 101376" in found.problems[0]
    tile, *others, tune = found.help
    assert tile == (
        "moe_block, experts: moe_gate_up at 1 to 1 tokens with rows 64 tokens 8 depth 64 warps 4 stages 3, "
        "which takes 30,000 bytes of shared memory, instead of rows 64 tokens 8 depth 64 warps 4 stages 4 "
        "(120,000 bytes)"
    )
    assert tune == f"{TUNE} moe, on that GPU"
    assert all("moe_gate_up" in other for other in others), "the same tile for more tokens has one sentence"
    assert len({sentence.partition(" with ")[2] for sentence in (tile, *others)}) == 1 + len(others)
    file = tmp_path / "nvidia_gb10" / "experts.json"
    file.write_text(json.dumps({key: {"1": {"path": "few", "gate_up": FEW, "down": FEW}}}))
    _tuned.use(tmp_path)
    assert fit(monkeypatch, is_long).help == () and fit(monkeypatch, is_long).fits


def test_a_predicted_entry_may_be_predicted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = {"rows": 128, "depth": 64, "head": 0, "slices": 1, "warps": 4, "stages": LONG}
    entry = {"path": "few", "config": line, "how": "predicted"}
    filed(tmp_path, "gb10", linear={dense_gpu.key(problem_of("o")): {"8": entry}})
    found = fit(monkeypatch, is_long)
    assert found.help[-1] == f"{TUNE} linear --predict"
    assert found.help[0].startswith("attention_block, o: linear at 1 to 8 tokens with ")
    assert "stages 3, which takes 30,000 bytes" in found.help[0]
    assert found.help[0].endswith("warps 4 stages 4 (120,000 bytes)")


def test_attention_may_store_keys_and_values_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where they would then fit, and the tuned tile's default does."""

    def large(request: CompileRequest) -> bool:
        in_fp8 = any("fp8" in type for type in request.signature.values())
        return request.kernel.__name__ == "extend" and not in_fp8

    found = fit(monkeypatch, large)
    assert not found.fits and found.help == ("--kv-cache-dtype fp8",)
    assert fit(monkeypatch, lambda request: request.kernel.__name__ == "extend").help == ()
    key = _attention_choice.key("decode", problem_of("attention"))
    tile = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": LONG}
    filed(tmp_path, "gb10", attention={key: {"8": {"path": "decode", "config": tile}}})
    tile_fits, tune, other = fit(monkeypatch, is_long).help
    assert "num_stages 3, which takes 30,000 bytes" in tile_fits and "num_stages 4" in tile_fits
    assert (tune, other) == (f"{TUNE} attention, on that GPU", "--kv-cache-dtype fp8")


def test_where_nothing_helps_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, lambda request: True).help == ()


def test_the_real_compiler_agrees(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """firebox-tiny: 256 rows × 128 tokens × 128 in four stages take 294,912 bytes."""
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(run_cache(tmp_path_factory)))
    gpu = find_gpu("rtx-5090")
    planned = plan(open_source(source_of("firebox-tiny", dtype="bfloat16"), gpu), gpu, 1, EngineConfig())
    operation = next(o for layers in planned.layers for o in layers.operations if o.name == "qkv")
    assert type(operation) is Operation
    tile = {"rows": 256, "tokens": 256, "depth": 128, "stages": 4, "warps": 8}
    entries = {"1": {"path": "few", "config": {}}, "512": {"path": "many", "config": tile}}
    filed(tmp_path, "rtx-5090", linear={dense_gpu.key(operation.problem): entries})
    found = compiled(planned)
    assert found.problems == (
        "attention_block, qkv: linear at 23 to 8192 tokens: 393216 bytes of shared memory of 101376",
    )
    by_library, tune = found.help
    assert "linear at 23 to 8192 tokens with cublas instead of rows 256 tokens 256" in by_library
    assert tune == "firebox tune firebox-tiny --gpu rtx-5090 --tp 1 --dtype bfloat16 --op linear, on that GPU"
