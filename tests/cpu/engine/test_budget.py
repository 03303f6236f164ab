"""What settings leave open: what is derived from what, what is refused, and that each derivation says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from firebox.config import GPU_PAGE_TOKENS, EngineConfig
from firebox.engine.budget import CheckpointFacts, Resolved, resolve
from firebox.errors import ConfigError, OutOfMemory
from firebox.hardware.base import Gpu
from firebox.kernels.plan import Setting

GIB = 1 << 30
CHECKPOINT = CheckpointFacts(
    model_type="glm4_moe",
    dtype="bfloat16",
    context_tokens=4096,
    weights_bytes=GIB,
    kv_bytes_per_token=1024,
)
CPU = Gpu(
    name="cpu", kind="cpu", memory_bytes=16 * GIB, memory_free_bytes=8 * GIB, cpu_cores=4, facts=frozenset()
)


def resolved(
    dtype: str = "auto", checkpoint: CheckpointFacts = CHECKPOINT, gpu: Gpu = CPU, **settings: Any
) -> Resolved:
    return resolve(EngineConfig(**{"kv_pages": 1024, **settings}), dtype, checkpoint, gpu)


def reason(answer: Resolved, setting: str) -> str:
    """The one reason that is about `setting`."""
    found = [line for line in answer.reasons if line.startswith(f"{setting} ")]
    assert len(found) == 1, (setting, answer.reasons)
    return found[0]


def test_pure() -> None:
    assert resolved() == resolved()


@pytest.mark.parametrize(
    ("asked", "got", "kv"), [("auto", "bfloat16", "bf16"), ("float32", "float32", "float32")]
)
def test_dtype(asked: str, got: str, kv: str) -> None:
    answer = resolved(asked)
    assert (answer.dtype, answer.kv_format) == (got, kv)
    assert (
        reason(answer, "dtype")
        == f"dtype {got}: {'the checkpoint says so' if asked == 'auto' else 'asked for'}"
    )


@pytest.mark.parametrize(
    ("asked", "got"),
    [("float16", "float16"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("fp8", "fp8"), ("auto", "float32")],
)
def test_kv_format_follows_unless_asked(asked: str, got: str) -> None:
    answer = resolved("float32", kv_cache_dtype=asked)
    assert (answer.dtype, answer.kv_format) == ("float32", got)
    why = "the compute dtype" if asked == "auto" else f"asked for ({asked})"
    assert reason(answer, "kv_cache_dtype") == f"kv_cache_dtype {got}: {why}"


def test_context_is_the_checkpoints_unless_asked() -> None:
    assert resolved().context_tokens == 4096
    assert "4096" in reason(resolved(), "context_length")
    assert resolved(context_length=100).context_tokens == 100
    assert resolved(context_length=4096).context_tokens == 4096


@pytest.mark.parametrize("asked", [0, -1, 4097])
def test_context_out_of_range_is_refused(asked: int) -> None:
    with pytest.raises(ConfigError, match=str(asked)) as caught:
        resolved(context_length=asked)
    assert "4096" in (caught.value.hint or "")


def test_context_shrinks_to_the_pages_asked_for() -> None:
    answer = resolved(kv_pages=10, page_tokens=16)
    assert (answer.kv_pages, answer.context_tokens) == (10, 160)
    assert any("160" in line and "10 KV pages" in line for line in answer.reasons), answer.reasons
    assert resolved(kv_pages=256, page_tokens=16).context_tokens == 4096


def test_derived_pages_stay_within_the_memory_fraction() -> None:
    for fraction in (0.3, 0.85):
        answer = resolved(
            kv_pages=None, mem_fraction=fraction, max_running_requests=100_000, max_batch_tokens=100_000
        )
        kv_bytes = answer.kv_pages * answer.page_tokens * CHECKPOINT.kv_bytes_per_token
        assert answer.kv_pages >= 1
        assert kv_bytes + CHECKPOINT.weights_bytes <= fraction * CPU.memory_free_bytes
        assert reason(answer, "kv_pages")


def test_derived_pages_hold_one_whole_context_when_memory_allows() -> None:
    answer = resolved(kv_pages=None)
    assert answer.kv_pages * answer.page_tokens >= answer.context_tokens == 4096


def test_derived_pages_are_no_more_than_requests_can_fill() -> None:
    answer = resolved(kv_pages=None, max_running_requests=2, context_length=100, page_tokens=16)
    assert answer.kv_pages == 13  # 200 tokens in pages of 16
    assert "max_running_requests" in reason(answer, "kv_pages")


def test_too_little_memory_says_the_numbers() -> None:
    small = dataclasses.replace(CPU, memory_free_bytes=GIB)
    with pytest.raises(OutOfMemory, match=r"0\.9 GB.*1\.1 GB") as caught:
        resolved(kv_pages=None, gpu=small)
    assert "--mem-fraction" in (caught.value.hint or "")


WHOLE = dataclasses.replace(
    CHECKPOINT, window_tokens=64, window_bytes_per_token=100, state_bytes=1000, workspace_bytes=GIB // 2,
    graphs_bytes=GIB // 4, loader_bytes=GIB // 8,
)  # fmt: skip
GPU = dataclasses.replace(CPU, kind="cuda")


def test_the_memory_budget_adds_up_line_by_line() -> None:
    answer = resolved(checkpoint=WHOLE, gpu=GPU, kv_pages=None, max_running_requests=5, mem_fraction=0.75)
    lines = {line.what: line.bytes for line in answer.memory}
    assert lines["KV pages"] == (answer.kv_pages + 1) * 64 * 1024
    assert lines["window pages"] == (answer.window_pages + 1) * 64 * 100
    assert lines["states"] == (answer.states + 1) * 1000
    assert (lines["weights"], lines["workspace"]) == (GIB, GIB // 2)
    assert (lines["graphs"], lines["loader peak"], lines["reserve"]) == (GIB // 4, GIB // 8, 2 * GIB)
    assert list(lines) == [line.what for line in answer.memory] and len(lines) == 8
    assert all("mem_fraction" in line.why for line in answer.memory if line.what == "reserve")


def test_the_whole_budget_and_no_more_goes_to_pages() -> None:
    """One page more would not fit."""
    wide = {"max_running_requests": 100_000, "max_batch_tokens": 100_000}
    answer = resolved(checkpoint=dataclasses.replace(WHOLE, state_bytes=0), gpu=GPU, kv_pages=None, **wide)
    kept = [line.bytes for line in answer.memory if line.what not in ("loader peak", "reserve")]
    assert 0 <= int(0.85 * GPU.memory_free_bytes) - sum(kept) < 64 * 1024


@pytest.mark.parametrize("gpu", [CPU, GPU], ids=["cpu", "cuda"])
def test_more_pages_than_there_is_memory_for_are_refused_with_all_numbers(gpu: Gpu) -> None:
    """6.8 GiB are 7.30 GB; 1 GiB of weights leaves room for 380,000 pages of 16 KiB, not for 400,000."""
    assert resolved(gpu=gpu, kv_pages=380_000, page_tokens=16).kv_pages == 380_000
    with pytest.raises(OutOfMemory, match=r"7\.30 GB.*1\.07 GB of weights \+ 6\.55 GB of KV pages") as caught:
        resolved(gpu=gpu, kv_pages=400_000, page_tokens=16)
    assert "--kv-pages" in (caught.value.hint or "")


def test_what_a_step_and_the_loader_need_is_part_of_the_refusal() -> None:
    small = dataclasses.replace(GPU, memory_free_bytes=2 * GIB)
    assert resolved(kv_pages=1, gpu=small, checkpoint=dataclasses.replace(WHOLE, graphs_bytes=0))
    with pytest.raises(OutOfMemory, match=r"0\.5 GB for workspace, 0\.3 GB for graphs"):
        resolved(kv_pages=1, gpu=small, checkpoint=dataclasses.replace(WHOLE, weights_bytes=GIB))
    loading = dataclasses.replace(CHECKPOINT, loader_bytes=GIB)
    with pytest.raises(OutOfMemory, match=r"1\.1 GB for loading"):
        resolved(kv_pages=1, gpu=small, checkpoint=loading)


def test_pages_are_those_for_which_the_device_is_tuned() -> None:
    assert Setting(GPU).page_tokens == GPU_PAGE_TOKENS == 64
    for gpu, tokens, device in ((GPU, 64, "GPU"), (CPU, 16, "CPU")):
        answer = resolved(gpu=gpu)
        assert answer.page_tokens == tokens
        assert reason(answer, "page_tokens") == f"page_tokens {tokens}: the default on a {device}"
        asked = resolved(gpu=gpu, page_tokens=32)
        assert asked.page_tokens == 32 and reason(asked, "page_tokens") == "page_tokens 32: asked for"


def test_running_requests_need_a_token_each() -> None:
    for asked in (64, None):
        answer = resolved(max_running_requests=asked, max_batch_tokens=8)
        assert answer.max_running_requests == 8
        assert reason(answer, "max_running_requests").endswith("needs a token of max_batch_tokens")
    plain = resolved(max_running_requests=64, max_batch_tokens=64)
    assert plain.max_running_requests == 64
    assert reason(plain, "max_running_requests") == "max_running_requests 64: asked for"


@pytest.mark.parametrize(("pages", "got"), [(64 * 16, 64), (64 * 16 - 1, 63), (40, 2), (16, 1), (3, 1)])
def test_pages_that_hold_fewer_short_requests_lower_their_number(pages: int, got: int) -> None:
    """256 tokens are 16 pages of 16."""
    answer = resolved(kv_pages=pages)
    assert answer.max_running_requests == got
    lowered = f"max_running_requests {got}: lowered from 64: the caches hold no more requests of 256 tokens"
    default = "max_running_requests 64: the default; the caches hold 256 tokens of each and more"
    assert reason(answer, "max_running_requests") == (default if got == 64 else lowered)
    asked = resolved(kv_pages=pages, max_running_requests=64)
    assert asked.max_running_requests == 64, "what is asked for is not lowered"
    assert resolved(kv_pages=pages, context_length=16).max_running_requests == min(64, pages)


def test_the_number_of_requests_follows_from_the_memory() -> None:
    """0.85 of 2 GiB less 1 GiB of weights are 716.8 MiB: with 1 MiB a token two requests of 256 tokens."""
    gpu = dataclasses.replace(GPU, memory_free_bytes=2 * GIB)
    wide = dataclasses.replace(CHECKPOINT, kv_bytes_per_token=GIB >> 10)
    answer = resolved(checkpoint=wide, gpu=gpu, kv_pages=None, page_tokens=16)
    assert answer.max_running_requests == 2 and answer.kv_pages * 16 >= 512
    one_more = dataclasses.replace(wide, kv_bytes_per_token=(716 << 20) // (3 * 256 + 16))
    assert resolved(checkpoint=one_more, gpu=gpu, kv_pages=None, page_tokens=16).max_running_requests == 3
    windowed = dataclasses.replace(one_more, window_tokens=64, window_bytes_per_token=1000)
    assert resolved(checkpoint=windowed, gpu=gpu, kv_pages=None, page_tokens=16).max_running_requests == 2


@pytest.mark.parametrize(("states", "got"), [(128, 64), (127, 63), (21, 10), (2, 1)])
def test_every_derived_request_has_a_state_and_a_snapshot(states: int, got: int) -> None:
    """In half of what the weights leave."""
    free_bytes = int(GPU.memory_free_bytes * 0.85) - GIB
    recurrent = dataclasses.replace(CHECKPOINT, state_bytes=free_bytes // 2 // states, kv_bytes_per_token=1)
    answer = resolved(checkpoint=recurrent, gpu=GPU, kv_pages=None)
    assert answer.max_running_requests == got and answer.states >= 2 * got
    if got > 1:
        with pytest.raises(OutOfMemory):
            resolved(checkpoint=recurrent, gpu=GPU, kv_pages=None, max_running_requests=states)


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("mem_fraction", 0.85, "the default; of 8.6 GB free"),
        ("mem_fraction", 0.5, "asked for; of 8.6 GB free"),
        ("max_batch_tokens", 2048, "the default"),
        ("max_batch_tokens", 100, "asked for"),
        ("prefill_chunk_tokens", 512, "the default"),
        ("prefill_chunk_tokens", 50, "asked for"),
        ("context_length", 100, "asked for"),
        ("kv_pages", 999, "asked for"),
    ],
)
def test_every_budget_says_where_it_comes_from(setting: str, value: float, why: str) -> None:
    assert reason(resolved(**{setting: value}), setting) == f"{setting} {value}: {why}"


def test_a_chunk_fits_the_step() -> None:
    answer = resolved(prefill_chunk_tokens=512, max_batch_tokens=100)
    assert answer.prefill_chunk_tokens == 100
    assert reason(answer, "prefill_chunk_tokens").startswith(
        "prefill_chunk_tokens 100: lowered from 512, since "
    )
    assert resolved(prefill_chunk_tokens=50, max_batch_tokens=100).prefill_chunk_tokens == 50


@pytest.mark.parametrize(("cores", "asked", "got"), [(4, None, 3), (1, None, 1), (4, 4, 4), (4, 1, 1)])
def test_threads_leave_the_server_a_core(cores: int, asked: int | None, got: int) -> None:
    answer = resolved(gpu=dataclasses.replace(CPU, cpu_cores=cores), threads=asked)
    assert answer.threads == got
    assert f"threads {got}" in reason(answer, "threads")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_running_requests", 0),
        ("max_batch_tokens", 0),
        ("prefill_chunk_tokens", 0),
        ("page_tokens", -1),
        ("kv_pages", 0),
        ("kv_pages", -4),
        ("threads", 0),
        ("mem_fraction", 0.0),
        ("mem_fraction", 1.01),
        ("kv_cache_dtype", "iq4_xs"),
    ],
)
def test_what_cannot_work_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(**{setting: value})
    assert setting in str(caught.value)
    assert str(value) in str(caught.value)
    assert caught.value.hint


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        resolved("int3")
