"""`--kv-cache-dtype fp8` in whole models: the same however the cache was written, near the unquantised run,
finite beyond 448, with the checkpoint's scales; and what a token takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from firebox.cache.pool import LayerCache
from firebox.config import Config, EngineConfig
from firebox.engine.outline import facts
from firebox.errors import ConfigError, UnknownTensor, UnsupportedFormat
from firebox.find import load, names
from firebox.formats.kv import fp8
from firebox.hardware.probe import probe_cpu
from firebox.weights.checkpoint import open_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine
from tests.support.quantise import read_tensors, write_tensors

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
TOKENS = 8
CHUNKS = (1, 2, 3, 7, 13, 16, 17, 24, 39)
# What sums in another order change in float32, relative to the largest logit. Without any quantisation the
# steepest of these models shows 1.1e-5 from one chunk size to another.
LAST_BIT = 3e-5


@pytest.fixture(scope="module", params=names("models"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), load("models", request.param).TINY)


def prompt_of(tokens: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 320) for _ in range(tokens)]


class Run:
    """A request's tokens, the logits of every step that sampled [steps, vocab], and the rows that each tensor
    of the caches was given, token after token."""

    def __init__(self, engine: InProcessEngine, prompt: list[int], chunk: int | None = None) -> None:
        rows: dict[int, list[torch.Tensor]] = {}
        with spied(engine, rows) as logits:
            if chunk is not None:
                engine.restart(prefill_chunk_tokens=chunk)
            (self.ids,) = engine.generate([prompt], msgspec.structs.replace(GREEDY, max_tokens=TOKENS))
        self.logits = torch.cat([row[-1:] for row in logits])
        self.rows = [torch.cat(parts) for parts in rows.values()]  # [tokens, heads, dim] each

    def codes_moved(self, whole: Run) -> int:
        """How many codes differ from those that `whole` wrote for the same tokens, which this run's are the
        last of. Only codes of values that differ may, and few of them."""
        moved = count = 0
        for ours, theirs in zip(self.rows, whole.rows, strict=True):
            theirs = theirs[-len(ours) :]
            differ = fp8.encode(ours, 1.0).view(torch.uint8) != fp8.encode(theirs, 1.0).view(torch.uint8)
            assert not differ[ours == theirs].any()
            assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()
            moved, count = moved + int(differ.sum()), count + ours.numel()
        assert moved < 1e-3 * count, f"{moved} of {count} codes"
        return moved

    def agrees(self, whole: Run) -> bool:
        """The same tokens, and the same logits: to `LAST_BIT` where all codes are the same; were they?"""
        assert self.ids == whole.ids
        moved = self.codes_moved(whole)
        difference = (self.logits - whole.logits).abs().max() / whole.logits.abs().max()
        assert difference < (1e-2 if moved else LAST_BIT), f"{moved} codes moved, logits by {difference}"
        return moved == 0


@contextmanager
def spied(engine: InProcessEngine, rows: dict[int, list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """Lists the logits, and in `rows` what each tensor of the caches is given."""
    logits: list[torch.Tensor] = []
    model: Any = engine.runner.model
    compute, write = model.logits, LayerCache.write

    def spy(x: torch.Tensor) -> torch.Tensor:
        logits.append(compute(x))
        return logits[-1]

    def record(self: LayerCache, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        for part, given in ((self.k, k), (self.v, v)):
            if given is not None:
                rows.setdefault(id(part), []).append(given.clone())
        write(self, slots, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "logits", spy)
        patch.setattr(LayerCache, "write", record)
        yield logits


def test_the_same_however_the_cache_was_written(folder: Path) -> None:
    """Prefill = prefill in chunks of many sizes = decode from the first token on (chunks of 1), token for
    token, and to `LAST_BIT` in every logit where all codes are the same.

    A code is a function of its value alone. But a value itself is only the same to float32's last bit when
    products are summed in another order, and the few that lie so near to the middle between two codes may
    take the other one: a step of 2^-3 of one number among thousands. So codes that differ must belong to
    values that differ, in the last bits, and must be rare."""
    engine = InProcessEngine(folder, kv_cache_dtype="fp8")
    prompt = prompt_of(40)
    whole = Run(engine, prompt)
    assert len(set(whole.ids)) > 2 and whole.logits.shape[0] == TOKENS
    same = [chunk for chunk in CHUNKS if Run(engine, prompt, chunk).agrees(whole)]
    assert len(same) >= 3, f"{same}: too few chunk sizes gave the same codes"


def test_the_same_after_a_prefix_hit(folder: Path) -> None:
    """It reads the very pages that the cold run wrote."""
    engine = InProcessEngine(folder, kv_cache_dtype="fp8")
    same = []
    for tokens in (33, 50, 70, 100):
        prompt = prompt_of(tokens, seed=tokens)
        cold = Run(engine, prompt)
        before = engine.scheduler.stats().cached_prompt_tokens
        warm = Run(engine, prompt)
        assert engine.scheduler.stats().cached_prompt_tokens >= before + 16
        assert len(warm.rows[0]) <= len(cold.rows[0]) - 16
        same.append(warm.agrees(cold))
    assert sum(same) >= 2, same


# ---- near the unquantised run


def prompt_logits(engine: InProcessEngine, prompt: list[int]) -> torch.Tensor:
    """[tokens, vocab]."""
    with spied(engine, {}) as logits:
        engine.generate([prompt], msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    return torch.cat(logits)


def store_in(engine: InProcessEngine, format: Any) -> None:
    """The caches' rows go through `format` from now on."""
    engine.runner._caches = tuple(
        dataclasses.replace(cache, format=format) if isinstance(cache, LayerCache) else cache
        for cache in engine.runner._caches
    )


def noise(seed: int) -> Any:
    """A KV format in float32 that puts every number off by something even in ±2^-4 of it."""
    generator = torch.Generator().manual_seed(seed)

    def encode(rows: torch.Tensor, scale: float) -> torch.Tensor:
        return rows * (1 + (2 * torch.rand(rows.shape, generator=generator) - 1) * 2**-4)

    return SimpleNamespace(
        DTYPE=torch.float32, SCALED=False, encode=encode, decode=lambda stored, scale: stored
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS."""
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def test_near_the_unquantised_run(folder: Path) -> None:
    """e4m3 rounds a number by at most 2^-4 of it. How far that carries depends on the model: these random
    ones are steep, and a token near the border between two experts changes sides. So the bound is what the
    same model makes of the worst rounding: every stored number off by something even in ±2^-4 of it (0.036
    RMS, against e4m3's 0.026). A format with one bit of mantissa less (0.052) is beyond it."""
    plain = InProcessEngine(folder, kv_cache_dtype="float32", attention_backend="torch_reference")
    prompts = [prompt_of(60, seed) for seed in range(4)]
    exact = torch.cat([prompt_logits(plain, prompt) for prompt in prompts])
    quantised = InProcessEngine(folder, kv_cache_dtype="fp8")
    found = relative_error(torch.cat([prompt_logits(quantised, prompt) for prompt in prompts]), exact)
    bounds = []
    for seed in range(3):
        plain.restart(prefill_chunk_tokens=512)
        store_in(plain, noise(seed))
        logits = torch.cat([prompt_logits(plain, prompt) for prompt in prompts])
        bounds.append(relative_error(logits, exact))
    assert 1e-3 < found < sum(bounds) / len(bounds)


def test_beyond_448_it_saturates(folder: Path, tmp_path: Path) -> None:
    """Keys and values far beyond the largest code: the logits stay finite, and a scale brings them back."""
    tensors = read_tensors(folder)
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    grown = {
        name: tensor * (3000.0 if name.endswith(("v_proj.weight", "kv_a_layernorm.weight")) else 1.0)
        for name, tensor in tensors.items()
    }
    assert any(not torch.equal(grown[name], tensors[name]) for name in tensors)
    write_tensors(tmp_path, config, grown)
    engine = InProcessEngine(tmp_path, kv_cache_dtype="fp8")
    run = Run(engine, prompt_of(40))
    assert max(float(rows.abs().max()) for rows in run.rows) > 2 * 448 and run.logits.isfinite().all()
    kept = [c for c in engine.runner._caches if isinstance(c, LayerCache)]
    assert max(float(c.k.float().abs().max().maximum(c.v.float().abs().max())) for c in kept) == 448
    assert not any(c.k.float().isnan().any() or c.v.float().isnan().any() for c in kept)


# ---- the checkpoint's scales


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen"), load("models", "qwen3_moe").TINY)


def with_tensors(source: Path, folder: Path, more: dict[str, torch.Tensor], **section: Any) -> Path:
    config = msgspec.json.decode((source / "config.json").read_bytes())
    if section:
        config["quantization_config"] = section
    write_tensors(folder, config, read_tensors(source) | more)
    return folder


@pytest.mark.parametrize(("k", "v"), [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
def test_a_layers_own_scales(qwen: Path, tmp_path: Path, k: str, v: str) -> None:
    attention = "model.layers.1.self_attn"
    scales = {f"{attention}.{k}": torch.tensor([2.0]), f"{attention}.{v}": torch.tensor([0.5])}
    engine = InProcessEngine(with_tensors(qwen, tmp_path, scales), kv_cache_dtype="fp8")
    assert [cache.scales for cache in engine.runner._caches] == [(1.0, 1.0), (2.0, 0.5), (1.0, 1.0)]
    assert engine.ready.reasons[-1].startswith("kv_scales 0.5 to 2 in 1 of 3 layers")
    # scales that are powers of two move no mantissa: the same answers, from other codes
    plain = InProcessEngine(qwen, kv_cache_dtype="fp8")
    assert plain.ready.reasons[-1] == "kv_scales 1.0 in all 3 layers: the checkpoint has no others"
    prompt = prompt_of(30)
    assert engine.generate([prompt]) == plain.generate([prompt])
    moved, kept = (found.runner._caches[1] for found in (engine, plain))
    assert torch.equal(moved.k.float() * 2, kept.k.float()) or (
        (moved.k.float() * 2 - kept.k.float()).abs().max() < 2**-8  # where 2^-6 · scale is the border
    )
    assert relative_error(moved.v.float() / 2, kept.v.float()) < 2**-8


def test_scales_bring_back_what_is_beyond_448(qwen: Path, tmp_path: Path) -> None:
    values = {n: t * 3000 for n, t in read_tensors(qwen).items() if n.endswith("v_proj.weight")}
    far = with_tensors(qwen, tmp_path / "far", values)
    scales = {n.replace("v_proj.weight", "v_scale"): torch.tensor(3000.0) for n in values}
    scaled = with_tensors(far, tmp_path / "scaled", scales)
    prompt = prompt_of(60)
    exact = prompt_logits(InProcessEngine(far), prompt)
    lost, found = (
        relative_error(prompt_logits(InProcessEngine(path, kv_cache_dtype="fp8"), prompt), exact)
        for path in (far, scaled)
    )
    assert found < 0.15 < 0.5 < lost


def test_of_a_latent_layer_the_keys_scale(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", load("models", "deepseek_v3").TINY)
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.k_proj.k_scale": torch.tensor(0.5), f"{attention}.v_proj.v_scale": torch.ones(1)}
    engine = InProcessEngine(with_tensors(source, tmp_path / "found", scales), kv_cache_dtype="fp8")
    assert [cache.scales for cache in engine.runner._caches] == [(0.5, 0.5), (1.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("stem", ["model.layers", "model.blocks"])
def test_scales_of_kimi_under_both_its_names(tmp_path: Path, stem: str) -> None:
    source = write_checkpoint(tmp_path / "source", load("models", "kimi_k25").TINY)
    scale = {f"language_model.{stem}.2.self_attn.k_scale": torch.tensor(4.0)}
    engine = InProcessEngine(with_tensors(source, tmp_path / "found", scale), kv_cache_dtype="fp8")
    assert [cache.scales[0] for cache in engine.runner._caches] == [1.0, 1.0, 4.0]


def test_a_scale_that_no_layer_takes_is_named(qwen: Path, tmp_path: Path) -> None:
    stray = {"model.layers.7.self_attn.k_scale": torch.ones(1)}
    found = with_tensors(qwen, tmp_path, stray)
    with pytest.raises(UnknownTensor, match=r"layers\.7\.self_attn\.k_scale"):
        InProcessEngine(found, kv_cache_dtype="fp8")
    InProcessEngine(found)  # without FP8 no scale is asked for


def test_scales_for_another_cache_are_refused(qwen: Path, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "int"}
    section = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    found = with_tensors(qwen, tmp_path, {}, **section)
    with pytest.raises(UnsupportedFormat, match="'int'"):
        InProcessEngine(found, kv_cache_dtype="fp8")
    InProcessEngine(found)


def test_random_weights_have_no_random_scales(qwen: Path) -> None:
    engine = InProcessEngine(qwen, load_format="dummy", kv_cache_dtype="fp8")
    assert {cache.scales for cache in engine.runner._caches} == {(1.0, 1.0)}


# ---- what it takes, and who says what


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", 376_832), ("bf16", 376_832), ("bfloat16", 376_832), ("fp8", 188_416), ("float32", 753_664)],
)
def test_bytes_per_token_of_glm_4_7(dtype: str, expected: int) -> None:
    config = dataclasses.replace(Config(), engine=EngineConfig(kv_cache_dtype=dtype))
    found = facts(open_checkpoint(CARDS / "glm-4.7-fp8"), config, probe_cpu())
    assert found.kv_bytes_per_token == expected


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_moe", "deepseek_v3"])
def test_half_of_bf16_in_windows_too_and_states_as_they_are(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, load("models", name).TINY))
    two, one = (
        facts(checkpoint, dataclasses.replace(Config(), engine=EngineConfig(kv_cache_dtype=d)), probe_cpu())
        for d in ("bf16", "fp8")
    )
    assert two.kv_bytes_per_token == 2 * one.kv_bytes_per_token > 0
    assert two.window_bytes_per_token == 2 * one.window_bytes_per_token
    assert (two.window_bytes_per_token > 0) == (name == "gpt_oss")
    assert two.state_bytes == one.state_bytes
    assert (one.state_bytes > 0) == (name == "qwen3_5_moe")


def test_the_cpu_kernel_says_why_it_does_not_run(qwen: Path) -> None:
    engine = InProcessEngine(qwen, kv_cache_dtype="fp8")
    (row,) = [row for row in engine.ready.ledger if row.op == "attention_block"]
    assert row.kernel == "torch" and row.fallback
    assert row.losers["cpu_attention_block"] == (
        "reads a cache in float32 and decodes no other, not torch.float8_e4m3fn"
    )
    with pytest.raises(ConfigError, match="--strict: attention_block"):
        InProcessEngine(qwen, kv_cache_dtype="fp8", strict=True)


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_the_other_formats_answer_too(folder: Path, dtype: str) -> None:
    """Within what their roundings, 2^-9 and 2^-12 of a number at most, may do: an eighth of what 2^-4 may."""
    exact = prompt_logits(InProcessEngine(folder, kv_cache_dtype="float32"), prompt_of(60))
    found = InProcessEngine(folder, kv_cache_dtype=dtype)
    assert {c.k.dtype for c in found.runner._caches if isinstance(c, LayerCache)} == {
        torch.bfloat16 if dtype == "bf16" else torch.float16
    }
    logits = prompt_logits(found, prompt_of(60))
    median = ((logits - exact).pow(2).mean(1) / exact.pow(2).mean(1)).sqrt().median()
    assert 0 < median < (2**-5 if dtype == "bf16" else 2**-7)
