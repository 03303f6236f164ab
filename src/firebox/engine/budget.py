"""What settings leave open, from the checkpoint and the machine: how large caches are, how many requests run,
where the memory goes. Each derivation leaves a line that says why.
"""

from __future__ import annotations

from dataclasses import dataclass

from firebox.config import (
    MOST_RUNNING,
    SHORT_CONTEXT_TOKENS,
    EngineConfig,
    ModelConfig,
    check_choice,
    kv_format_of,
)
from firebox.errors import ConfigError, OutOfMemory
from firebox.hardware.base import Gpu

CPU_KV_BYTES = 256 * 1024 * 1024  # a CPU is for trying: more only by --kv-pages


@dataclass(frozen=True)
class CheckpointFacts:
    """What `resolve` needs to know of a checkpoint; `weights.checkpoint` reads it from config.json.

    `model_type`: the file in models/ that serves it; `dtype`: the checkpoint's compute dtype;
    `context_tokens`: the longest context it was made for; `weights_bytes`: bytes of its tensors in the
    compute dtype; `kv_bytes_per_token`: over all layers that keep every token, in the cache's dtype;
    `window_bytes_per_token`: over all layers that keep only the last `window_tokens` (None: there are
    none); `state_bytes`: over all recurrent layers, per request. Estimates of engine/memory.py, 0 on a CPU:
    `workspace_bytes` of a step, `graphs_bytes`, and `loader_bytes` that go when loading ends.
    """

    model_type: str
    dtype: str
    context_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int
    window_tokens: int | None = None
    window_bytes_per_token: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0
    graphs_bytes: int = 0
    loader_bytes: int = 0


@dataclass(frozen=True)
class MemoryLine:
    """Memory that `what` is going to take, and how the number was made."""

    what: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Resolved:
    """The engine's settings with nothing left open, and one line of reason for each derived one. `kv_format`:
    a file of formats/kv. `memory`: the budget, line by line."""

    dtype: str
    kv_format: str
    context_tokens: int
    max_running_requests: int
    max_batch_tokens: int
    prefill_chunk_tokens: int
    page_tokens: int
    kv_pages: int
    window_pages: int
    states: int
    threads: int
    reasons: tuple[str, ...]
    memory: tuple[MemoryLine, ...] = ()


def resolve(config: EngineConfig, dtype: str, checkpoint: CheckpointFacts, gpu: Gpu) -> Resolved:
    """Fills every open setting from the checkpoint and the machine. Pure: same arguments, same answer.

    Where no number of running requests is asked for, there are MOST_RUNNING, or the largest number below of
    which the caches hold SHORT_CONTEXT_TOKENS each (the whole context, if that is shorter), with a recurrent
    state and a snapshot of it.

    Raises ConfigError for values that cannot work and OutOfMemory when the budget does not hold the weights
    and one KV page.
    """
    _check_ranges(config)
    asked, config = config.page_tokens, config.on(gpu)
    why = "asked for" if asked else f"the default on a {'GPU' if gpu.kind == 'cuda' else 'CPU'}"
    reasons = [f"page_tokens {config.page_tokens}: {why}"]
    check_choice(ModelConfig, "dtype", dtype)

    compute_dtype = checkpoint.dtype if dtype == "auto" else dtype
    kv_format = kv_format_of(config.kv_cache_dtype, compute_dtype)
    reasons.append(f"dtype {compute_dtype}: {'the checkpoint says so' if dtype == 'auto' else 'asked for'}")
    reasons.append(
        f"kv_cache_dtype {kv_format}: "
        + ("the compute dtype" if config.kv_cache_dtype == "auto" else f"asked for ({config.kv_cache_dtype})")
    )

    context_tokens = _context_tokens(config.context_length, checkpoint.context_tokens, reasons)
    reasons += [f"max_batch_tokens {config.max_batch_tokens}: {_source(config, 'max_batch_tokens')}"]
    chunk_tokens = _chunk_tokens(config, reasons)

    budget_bytes, why = _cache_budget(config, checkpoint, gpu)
    reasons.append(
        f"mem_fraction {config.mem_fraction}: {_source(config, 'mem_fraction')}; of "
        f"{gpu.memory_free_bytes / 1e9:.1f} GB free"
    )
    max_running = _max_running(config, checkpoint, context_tokens, budget_bytes, reasons)
    states = _states(max_running, checkpoint, budget_bytes, reasons)
    window_pages = _window_pages(config, max_running, checkpoint)
    if window_pages:
        reasons.append(_window_reason(config, max_running, checkpoint, window_pages))
    budget_bytes -= _states_bytes(states, checkpoint) + _window_bytes(window_pages, config, checkpoint)
    kv_pages = _kv_pages(config, context_tokens * max_running, checkpoint, budget_bytes, why, reasons)
    if kv_pages * config.tokens_a_page < context_tokens:
        reasons.append(
            f"context_length {kv_pages * config.tokens_a_page}: "
            f"{kv_pages} KV pages of {config.tokens_a_page} tokens hold no more"
        )
        context_tokens = kv_pages * config.tokens_a_page
    memory = _memory(config, checkpoint, gpu, kv_pages, window_pages, states)
    threads = config.threads or max(1, gpu.cpu_cores - 1)
    reasons.append(
        f"threads {threads}: " + ("asked for" if config.threads else "one core is left to the server process")
    )
    return Resolved(
        dtype=compute_dtype,
        kv_format=kv_format,
        context_tokens=context_tokens,
        max_running_requests=max_running,
        max_batch_tokens=config.max_batch_tokens,
        prefill_chunk_tokens=chunk_tokens,
        page_tokens=config.tokens_a_page,
        kv_pages=kv_pages,
        window_pages=window_pages,
        states=states,
        threads=threads,
        reasons=tuple(reasons),
        memory=memory,
    )


def _check_ranges(config: EngineConfig) -> None:
    for name in (
        "max_running_requests",
        "max_batch_tokens",
        "prefill_chunk_tokens",
        "page_tokens",
        "kv_pages",
        "threads",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}", hint="it must be at least 1")
    if not 0.0 < config.mem_fraction <= 1.0:
        raise ConfigError(
            f"mem_fraction is {config.mem_fraction}", hint="a share between 0 and 1, such as 0.85"
        )


def _context_tokens(asked: int | None, made_for: int, reasons: list[str]) -> int:
    if asked is None:
        reasons.append(f"context_length {made_for}: max_position_embeddings of the checkpoint")
        return made_for
    if asked < 1 or asked > made_for:
        raise ConfigError(
            f"context_length is {asked}", hint=f"this checkpoint was made for 1 to {made_for} tokens"
        )
    reasons.append(f"context_length {asked}: asked for")
    return asked


def _source(config: EngineConfig, name: str) -> str:
    """Of a setting that has a default."""
    return "the default" if getattr(config, name) == getattr(EngineConfig, name) else "asked for"


def _chunk_tokens(config: EngineConfig, reasons: list[str]) -> int:
    tokens, name = min(config.prefill_chunk_tokens, config.max_batch_tokens), "prefill_chunk_tokens"
    lowered = f"lowered from {config.prefill_chunk_tokens}, since a step has {tokens} (max_batch_tokens)"
    why = lowered if tokens < config.prefill_chunk_tokens else _source(config, name)
    reasons.append(f"{name} {tokens}: {why}")
    return tokens


def _max_running(
    config: EngineConfig,
    checkpoint: CheckpointFacts,
    context_tokens: int,
    budget_bytes: int,
    reasons: list[str],
) -> int:
    """As asked for, or as `resolve` says; no more than a step has tokens."""
    asked, most = config.max_running_requests, config.most_running
    short_tokens, running = min(SHORT_CONTEXT_TOKENS, context_tokens), most
    if asked is None:
        enough = (n for n in range(most, 0, -1) if _holds(n, config, checkpoint, short_tokens, budget_bytes))
        running = next(enough, 1)
    if running < most:
        why = f"lowered from {most}: the caches hold no more requests of {short_tokens} tokens"
    elif running < (asked or MOST_RUNNING):
        why = "every running request needs a token of max_batch_tokens"
    else:
        why = "asked for" if asked else f"the default; the caches hold {short_tokens} tokens of each and more"
    reasons.append(f"max_running_requests {running}: {why}")
    return running


def _holds(
    running: int, config: EngineConfig, checkpoint: CheckpointFacts, short_tokens: int, budget_bytes: int
) -> bool:
    """Do the caches hold so many requests of `short_tokens`, with a recurrent state and a snapshot each?"""
    states = _most_states(running, checkpoint, budget_bytes)
    if checkpoint.state_bytes and states < 2 * running:
        return False
    pages = running * -(-short_tokens // config.tokens_a_page)
    if config.kv_pages:
        return pages <= config.kv_pages
    kv_bytes = (pages + 1) * config.tokens_a_page * checkpoint.kv_bytes_per_token
    windows = _window_bytes(_window_pages(config, running, checkpoint), config, checkpoint)
    return kv_bytes + windows + _states_bytes(states, checkpoint) <= budget_bytes


def _cache_budget(config: EngineConfig, checkpoint: CheckpointFacts, gpu: Gpu) -> tuple[int, str]:
    """Bytes for everything the layers keep, and where the number comes from."""
    fixed_bytes = checkpoint.weights_bytes + checkpoint.workspace_bytes + checkpoint.graphs_bytes
    budget_bytes = int(gpu.memory_free_bytes * config.mem_fraction) - fixed_bytes
    least_bytes = checkpoint.kv_bytes_per_token * config.tokens_a_page + checkpoint.state_bytes
    if budget_bytes < max(least_bytes, checkpoint.loader_bytes - fixed_bytes + checkpoint.weights_bytes):
        further = {
            "workspace": checkpoint.workspace_bytes,
            "graphs": checkpoint.graphs_bytes,
            "loading": checkpoint.loader_bytes,
        }
        raise OutOfMemory(
            f"{gpu.memory_free_bytes * config.mem_fraction / 1e9:.1f} GB "
            f"(mem_fraction {config.mem_fraction} of what is free) do not hold "
            f"{checkpoint.weights_bytes / 1e9:.1f} GB of weights, "
            + "".join(f"{size / 1e9:.1f} GB for {what}, " for what, size in further.items() if size)
            + f"and one KV page of {least_bytes / 1e6:.1f} MB",
            hint="a smaller model, a higher --mem-fraction, or more memory",
        )
    if gpu.kind == "cpu" and budget_bytes > CPU_KV_BYTES:
        return CPU_KV_BYTES, f"{CPU_KV_BYTES // 2**20} MiB on a CPU"
    return budget_bytes, f"{config.mem_fraction} of {gpu.memory_free_bytes / 1e9:.1f} GB free, less weights"


def _memory(
    config: EngineConfig, checkpoint: CheckpointFacts, gpu: Gpu, kv_pages: int, window_pages: int, states: int
) -> tuple[MemoryLine, ...]:
    """The budget line by line. Raises OutOfMemory if that is more than there is, which only sizes that were
    asked for can cause."""
    free_bytes = gpu.memory_free_bytes
    budget_bytes = int(free_bytes * config.mem_fraction)
    kv_bytes = (kv_pages + 1) * config.tokens_a_page * checkpoint.kv_bytes_per_token
    window_bytes = _window_bytes(window_pages, config, checkpoint)
    source = "MemAvailable" if gpu.unified_memory or gpu.kind == "cpu" else "the driver's free memory"
    lines = (
        MemoryLine("weights", checkpoint.weights_bytes, "as they are stored and kept"),
        MemoryLine("KV pages", kv_bytes, f"{kv_pages} of {config.tokens_a_page} tokens, and page 0"),
        MemoryLine("window pages", window_bytes, f"{window_pages} of them, and page 0"),
        MemoryLine("states", _states_bytes(states, checkpoint), f"{states} of recurrent layers, and slot 0"),
        MemoryLine("workspace", checkpoint.workspace_bytes, "counted, and a step's activations estimated"),
        MemoryLine("graphs", checkpoint.graphs_bytes, "one for each batch size (estimate)"),
    )
    kept = tuple(line for line in lines if line.bytes)
    if sum(line.bytes for line in kept) > budget_bytes:
        said = " + ".join(f"{line.bytes / 1e9:.2f} GB of {line.what}" for line in kept)
        have = f"{budget_bytes / 1e9:.2f} GB (mem_fraction {config.mem_fraction} of {source})"
        raise OutOfMemory(
            f"{have} do not hold {said}",
            hint="fewer --kv-pages or none given, fewer --max-running-requests, or a higher --mem-fraction",
        )
    loader = MemoryLine("loader peak", checkpoint.loader_bytes, "while weights are read (estimate)")
    why = f"1 - mem_fraction {config.mem_fraction} of {free_bytes / 1e9:.2f} GB, {source}"
    return (*kept, *([loader] if loader.bytes else ()), MemoryLine("reserve", free_bytes - budget_bytes, why))


def _states_bytes(states: int, checkpoint: CheckpointFacts) -> int:
    """Slot 0 included."""
    return (states + 1) * checkpoint.state_bytes if states else 0


def _window_bytes(pages: int, config: EngineConfig, checkpoint: CheckpointFacts) -> int:
    """Page 0 included."""
    return (pages + 1) * config.tokens_a_page * checkpoint.window_bytes_per_token if pages else 0


def _states(max_running: int, checkpoint: CheckpointFacts, budget_bytes: int, reasons: list[str]) -> int:
    """A recurrent state for each running request and up to twice as many snapshots, in half of the budget."""
    if not checkpoint.state_bytes:
        return 0
    fitting = budget_bytes // 2 // checkpoint.state_bytes
    if fitting <= max_running:
        raise OutOfMemory(
            f"{max_running} running requests need {max_running * checkpoint.state_bytes / 1e9:.1f} GB of "
            f"recurrent state, and prefix hits some more; the budget for it is {budget_bytes / 2e9:.1f} GB",
            hint=f"--max-running-requests {max(1, fitting // 2)}",
        )
    states = _most_states(max_running, checkpoint, budget_bytes)
    reasons.append(
        f"states {states}: {max_running} running requests, the rest for snapshots; "
        f"{states * checkpoint.state_bytes / 2**20:.0f} MiB"
    )
    return states


def _most_states(running: int, checkpoint: CheckpointFacts, budget_bytes: int) -> int:
    """Three a request, in half of the budget."""
    if not checkpoint.state_bytes:
        return 0
    return min(3 * running, budget_bytes // 2 // checkpoint.state_bytes)


def _window_pages(config: EngineConfig, running: int, checkpoint: CheckpointFacts) -> int:
    """What every running request's window and the next step's tokens can reach, and as much again for cached
    prefixes."""
    if checkpoint.window_tokens is None:
        return 0
    per_request = -(-checkpoint.window_tokens // config.tokens_a_page) + 2
    return 2 * (running * per_request + -(-config.max_batch_tokens // config.tokens_a_page))


def _window_reason(config: EngineConfig, running: int, checkpoint: CheckpointFacts, pages: int) -> str:
    page_bytes = checkpoint.window_bytes_per_token * config.tokens_a_page
    return (
        f"window_pages {pages}: windows of {checkpoint.window_tokens} tokens for {running} requests and "
        f"a step's {config.max_batch_tokens} tokens, twice; {pages * page_bytes / 2**20:.0f} MiB"
    )


def _kv_pages(
    config: EngineConfig,
    useful_tokens: int,
    checkpoint: CheckpointFacts,
    budget_bytes: int,
    why: str,
    reasons: list[str],
) -> int:
    """Those that are asked for, or as many as the memory budget allows and `useful_tokens` can fill."""
    if config.kv_pages:
        reasons.append(f"kv_pages {config.kv_pages}: asked for")
        return config.kv_pages
    page_bytes = max(1, checkpoint.kv_bytes_per_token * config.tokens_a_page)
    pages = budget_bytes // page_bytes - 1  # page 0 is nobody's
    useful_pages = -(-useful_tokens // config.tokens_a_page)
    if pages < 1:
        raise OutOfMemory(
            f"nothing is left of {why} for KV pages", hint="fewer --max-running-requests, or more memory"
        )
    if useful_pages < pages:
        pages, why = useful_pages, "max_running_requests of context_length each"
    reasons.append(
        f"kv_pages {pages}: {why}; {pages * config.tokens_a_page} tokens, "
        f"{pages * page_bytes / 2**20:.0f} MiB"
    )
    return pages
