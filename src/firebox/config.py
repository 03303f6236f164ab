"""Everything a user can set, as frozen dataclasses; the command line and docs/config.md are made from these
fields.

A field's `help` is its documentation; `choices`, where given, is closed. None means "derived": the engine
fills it from the checkpoint and the hardware and records why (engine/budget.py), and `serve --explain` prints
those derivations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from firebox.errors import ConfigError
from firebox.hardware.base import Gpu

DEFAULT_MODEL = "firebox-tiny"
GPU_PAGE_TOKENS, CPU_PAGE_TOKENS = 64, 16
MOST_RUNNING = 64  # requests, where no number is asked for
SHORT_CONTEXT_TOKENS = 256  # of each of them, at least, the caches must hold then


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A config field with its documentation."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and in what arithmetic."""

    model: str = option(
        DEFAULT_MODEL, "Hugging Face id in the local cache, a folder, or the name of a bundled card"
    )
    served_model_name: str | None = option(None, "name in /v1/models; default: the last part of MODEL")
    dtype: str = option(
        "auto",
        "compute dtype; auto: the checkpoint's own",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    load_format: str = option(
        "auto",
        "auto: read the checkpoint; dummy: random values in the real shapes",
        choices=("auto", "dummy"),
    )
    layers: int | None = option(
        None, "with --load-format dummy: only so many of the model's layers, the first ones"
    )
    requantize: str = option(
        "none",
        "fp8: at load, every unquantised projection of attention, dense MLP and shared experts, and the "
        "output matrix, becomes FP8 with a scale for each row; routed experts (quantised or not), norms, "
        "routers, gates, embedding, biases, convolutions and recurrent parameters stay as they are. A CPU "
        "computes with what FP8 makes of them, a GPU's kernels read FP8; what they do not (MLA's kv_b) stays "
        "as it is there",
        choices=("none", "fp8"),
    )
    requantize_limit: float = option(
        0.04,
        "largest relative error that --requantize may cause in a tensor; one above it is refused. Rounding "
        "alone stays below 0.037 (0.026 for normally distributed weights); more means lost range",
    )


@dataclass(frozen=True)
class EngineConfig:
    """The engine's budgets. Units are in the names."""

    context_length: int | None = option(
        None, "tokens a request may hold; default: what the model was made for"
    )
    max_running_requests: int | None = option(
        None,
        f"requests computed together in one step; default: {MOST_RUNNING}, or as many as the caches hold "
        f"with {SHORT_CONTEXT_TOKENS} tokens each",
    )
    max_batch_tokens: int = option(2048, "tokens computed in one step: decode tokens plus prefill chunks")
    prefill_chunk_tokens: int = option(512, "most prompt tokens of one request in one step")
    page_tokens: int | None = option(
        None,
        f"tokens per KV page; default: {GPU_PAGE_TOKENS} on a GPU, for which its attention is tuned, "
        f"{CPU_PAGE_TOKENS} on a CPU",
    )
    kv_pages: int | None = option(None, "KV pages; default: as many as --mem-fraction allows")
    kv_cache_dtype: str = option(
        "auto",
        "how keys and values are stored. auto: in the compute dtype; bfloat16 is another word for bf16; "
        "fp8: e4m3 with the checkpoint's scales for keys and values, where it has them, else 1.0",
        choices=("auto", "bf16", "bfloat16", "float16", "float32", "fp8"),
    )
    mem_fraction: float = option(
        0.85, "share of the memory free at start that weights, KV cache and workspace may take"
    )
    prefix_cache: bool = option(True, "reuse the KV pages of earlier requests with the same prefix")
    attention_backend: str = option(
        "auto", "an attention backend by name; auto: the fastest that accepts the model"
    )
    moe_backend: str = option("auto", "an expert kernel by name; auto: the fastest that accepts the model")
    device: str = option(
        "auto",
        "cuda: an NVIDIA GPU; cpu; auto: a GPU if there is one, unless the model computes in float32",
        choices=("auto", "cuda", "cpu"),
    )
    cuda_graph: str = option(
        "decode",
        "decode: decode steps are captured, one graph for each batch size; off: every step launch by launch",
        choices=("decode", "off"),
    )
    overlap: bool = option(
        True, "on a GPU: launch a decode step before the last one's tokens have reached the host"
    )
    threads: int | None = option(
        None, "CPU threads of the engine process; default: one core is left to the server"
    )
    self_test: str = option(
        "auto",
        "on a GPU, before the port opens: each launch of the plan against its reference. auto: where this "
        "plan has not passed on this GPU, with this driver and these versions, before; on: at every start; "
        "off: never",
        choices=("auto", "on", "off"),
    )
    strict: bool = option(False, "refuse to start where a choice is a fallback")

    def on(self, gpu: Gpu) -> EngineConfig:
        """With the page size that this device has by default, where none is asked for."""
        size = GPU_PAGE_TOKENS if gpu.kind == "cuda" else CPU_PAGE_TOKENS
        return dataclasses.replace(self, page_tokens=self.page_tokens or size)

    @property
    def tokens_a_page(self) -> int:
        """page_tokens, known by now: see `on`."""
        assert self.page_tokens is not None
        return self.page_tokens

    @property
    def most_running(self) -> int:
        """The most requests of a step, of which each needs a token; the budget may lower it where no
        number is asked for."""
        return min(self.max_running_requests or MOST_RUNNING, self.max_batch_tokens)


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(30000, "port to listen on")
    api_key: str | None = option(None, "key that requests must carry as 'Authorization: Bearer KEY'")
    max_queued_requests: int = option(256, "requests waiting beyond those running; one more is answered 429")
    max_body_bytes: int = option(4 * 1024 * 1024, "largest request body; a larger one is answered 413")
    drain_timeout_s: float = option(30.0, "seconds that running requests get to finish after SIGTERM")
    explain: bool = option(False, "print the ledger (what runs, and why) before the port opens")


@dataclass(frozen=True)
class Config:
    """All of it. What one engine process receives is this tree, resolved."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()


def check_choice(group: type, name: str, value: str) -> None:
    """ConfigError, with the choices, if `value` is none of those of the group's field `name`."""
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    if value not in field.metadata["choices"]:
        raise ConfigError(f"{name} is {value!r}", hint=f"one of {', '.join(field.metadata['choices'])}")


def kv_format_of(asked: str, compute_dtype: str) -> str:
    """The name in formats/kv of what `--kv-cache-dtype` asks for. ConfigError if it is none of its
    choices."""
    check_choice(EngineConfig, "kv_cache_dtype", asked)
    name = compute_dtype if asked == "auto" else asked
    return "bf16" if name == "bfloat16" else name
