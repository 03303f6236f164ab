"""The attention kernels, compiled for GPUs that are not here: they fit the smallest shared memory served, use
the instruction they declare, and do not spill where it would be felt. And what is launched is what was
compiled."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import attention_decode as decode
from firebox.kernels import attention_extend as extend
from firebox.kernels._attention import FP8, Problem
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from tests.support.attention_run import run

BF16 = torch.bfloat16
GPUS = {name: find_gpu(name) for name in ("gb10", "h200", "rtx-5090", "rtx-4090")}

# layers of the models that are served; GLM-4.7 is one rank's share of four
LAYERS = {
    "gpt-oss": Problem(64, 8, 64, 64, 16, window=True, sinks=BF16),
    "glm-4.7": Problem(24, 2, 128, 128, 64),
    "glm-4.7 fp8": Problem(24, 2, 128, 128, 16, kv_dtype=FP8),
    "glm-4.7 tree": Problem(24, 2, 128, 128, 64, tree=True),
    "qwen3.5": Problem(32, 2, 256, 256, 64),
    "kimi": Problem(128, 1, 576, 512, 64),
    "kimi tp8": Problem(16, 1, 576, 512, 64),
    "kimi fp8": Problem(16, 1, 576, 512, 64, kv_dtype=FP8),
}
FEWER = {"h200": tuple(LAYERS), "gb10": tuple(LAYERS), "rtx-5090": ("glm-4.7",), "rtx-4090": ("kimi",)}
# Bytes a thread. A latent tile on wgmma keeps 64 × 512 sums in registers; what does not fit is addresses, and
# the reloads are some dozens of the thousands of instructions that a tile of keys takes.
SPILLS = {
    ("kimi", "h200"): 640,
    ("kimi tp8", "h200"): 640,
    # 128 registers by choice, so that two blocks share a multiprocessor: 0.84 of the time without spills
    ("glm-4.7", "h200"): 256,
    ("glm-4.7 tree", "h200"): 256,
    ("kimi fp8", "h200"): 16,
    ("kimi fp8", "gb10"): 16,
}


def launches() -> dict[tuple[str, str, str], CompileRequest]:
    """(layer, GPU, kernel) → request, for one query a request and, where there is a tree, eight."""
    found = {}
    for gpu_name, gpu in GPUS.items():
        for name, problem in LAYERS.items():
            if name not in FEWER[gpu_name]:
                continue
            queries = 8 if problem.tree else 1
            config = decode.default(problem, gpu, queries)
            split, merge = decode.requests(problem, config, gpu)
            found[name, gpu_name, "decode"], found[name, gpu_name, "merge"] = split, merge
            (found[name, gpu_name, "extend"],) = extend.requests(problem, extend.default(problem, gpu), gpu)
    return found


LAUNCHES = launches()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str, str], Compiled]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("compile")))
        patch.delenv("FIREBOX_SMEM_LIMIT", raising=False)
        yield dict(zip(LAUNCHES, compile_all(list(LAUNCHES.values())), strict=True))


@pytest.mark.parametrize("key", LAUNCHES, ids=" ".join)
def test_fits_and_is_native(compiled, key: tuple[str, str, str]) -> None:
    result, (name, gpu, _) = compiled[key], key
    assert result.error is None
    assert result.fits, f"{result.shared_bytes} bytes of {result.limit_bytes}"
    assert result.native, f"{result.instructions}, not {LAUNCHES[key].declares}"
    assert result.spill_bytes <= SPILLS.get((name, gpu), 0)
    if gpu != "h200":
        assert result.limit_bytes == 101_376


def test_prefill_on_hopper_uses_wgmma(compiled) -> None:
    assert compiled["glm-4.7", "h200", "extend"].instructions == ("wgmma.bf16",)
    assert compiled["kimi", "h200", "decode"].instructions == ("wgmma.bf16",)
    assert compiled["glm-4.7 fp8", "h200", "extend"].instructions == ("wgmma.f16",)
    assert compiled["glm-4.7", "gb10", "extend"].instructions == ("mma.bf16",)


def test_keys_are_copied_ahead_of_their_use(compiled) -> None:
    for (_, gpu, kernel), result in compiled.items():
        assert kernel == "merge" or "cp.async" in result.features, gpu


def test_a_lowered_limit_chooses_smaller_tiles(monkeypatch) -> None:
    monkeypatch.setenv("FIREBOX_SMEM_LIMIT", "101376")
    for cached in (decode.default, extend.default):
        cached.cache_clear()
    try:
        gpu: Gpu = GPUS["h200"]
        requests = []
        for name in ("glm-4.7", "kimi", "qwen3.5"):
            problem = LAYERS[name]
            requests += decode.requests(problem, decode.default(problem, gpu, 1), gpu, split=False)
            requests += extend.requests(problem, extend.default(problem, gpu), gpu)
        assert [result.fits for result in compile_all(requests)] == [True] * len(requests)
    finally:
        for cached in (decode.default, extend.default):
            cached.cache_clear()


@pytest.mark.parametrize("kernel", [decode, extend])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_what_is_launched_is_what_is_planned(monkeypatch, kernel: ModuleType, kv_dtype: torch.dtype) -> None:
    """For every case, whatever its sizes: the types, alignments and constants that Triton's JIT finds out
    about the arguments, and the options, are those of `requests`."""
    gpu, backend = GPUS["h200"], make_backend(GPUTarget("cuda", 90, 32))
    launched: list[tuple[Any, ...]] = []

    def bind(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, kinds, rest = binder(*arguments, **options)
        launched.append((self, bound, dict(zip(bound, kinds, strict=True)), backend.parse_options(rest)))

    monkeypatch.setattr(jit.JITFunction, "run", bind)
    for case in kernel.CASES:
        case, problem = case.of(BF16, kv_dtype), case.of(BF16, kv_dtype).problem
        launched.clear()
        run(kernel, case, gpu, kernel.inputs(case))
        if kernel is decode:
            most = max(queries for queries, _ in case.requests)
            config = decode.default(problem, gpu, most)
            planned = decode.requests(problem, config, gpu, split=case.splits > 1)
        else:
            planned = extend.requests(problem, extend.default(problem, gpu), gpu)
        for request, (function, bound, kinds, options) in zip(planned, launched, strict=True):
            assert function is request.kernel
            for name, (kind, alignment) in kinds.items():
                if kind == "constexpr":
                    assert bound[name] == request.constexprs[name], name
                else:
                    aligned = "D" if name in request.aligned else ""
                    assert (kind, alignment or "") == (request.signature[name], aligned), name
            assert (options.num_warps, options.num_stages) == (request.num_warps, request.num_stages)
