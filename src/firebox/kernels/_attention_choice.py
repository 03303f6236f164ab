"""Which tile each kernel of attention takes, and among how many blocks decode divides the keys.

Tiles are measured ones (_tuned.py, attention.json) where there are any: those of the nearest number of tokens
in the step. A measured tile of decode serves requests whose rows make blocks as large as its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from firebox.hardware.base import Gpu
from firebox.kernels._veto import Choice, remembers, why_not

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels._attention import Config, Problem

TUNED_FILE = "attention"  # the file in tuned/<gpu>/
DECODE, EXTEND = "decode", "extend"
APART = "apart"  # the path of entries where more launches than one were faster


@functools.cache
def key(kernel: str, problem: Problem) -> str:
    """How attention.json calls a problem of DECODE, EXTEND or another kernel of attention."""
    p = problem
    dtype, kv = (str(dtype).removeprefix("torch.") for dtype in (p.dtype, p.kv_dtype))
    sizes = ("heads", "kv_heads", "head_dim", "value_dim", "page_tokens")
    masks = [name for name in ("window", "sinks", "tree") if getattr(p, name)]
    return " ".join([kernel, dtype, f"kv={kv}", *(f"{name}={getattr(p, name)}" for name in sizes), *masks])


def decode_config(problem: Problem, gpu: Gpu, queries: int, tokens: int) -> Config:
    """The tile for requests of up to `queries` queries in a step of `tokens`."""
    return decode_tile(problem, gpu, queries, measured(DECODE, problem, gpu, tokens))


def extend_config(problem: Problem, gpu: Gpu, tokens: int) -> Config:
    """The tile for longer requests in a step of `tokens`."""
    from firebox.kernels import attention_extend

    return measured(EXTEND, problem, gpu, tokens) or attention_extend.default(problem, gpu)


def choice_of(kernel: str, problem: Problem, config: Config) -> Choice:
    """What is vetoed of a tile of DECODE or EXTEND."""
    return (kernel, problem, config)


@remembers
@functools.cache
def measured(kernel: str, problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    """The tile of the tuned file, which calls its kernel so; None where there is none, or where its results
    were wrong."""
    found = entry(kernel, problem, gpu, tokens)
    return None if found is None or why_not(choice_of(kernel, problem, found)) else found


def entry(kernel: str, problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    """The tile of the tuned file, whatever its results were; None where there is none, or APART."""
    from firebox.kernels import _tuned
    from firebox.kernels._attention import Config

    found = _tuned.measured(gpu.name, TUNED_FILE, key(kernel, problem), tokens)
    return None if found is None or found["path"] == APART else Config(**found["config"])


def decode_tile(problem: Problem, gpu: Gpu, queries: int, tuned: Config | None) -> Config:
    """`tuned` where it serves requests of so many queries, else the default."""
    from firebox.kernels import attention_decode

    if tuned is not None and tuned.block_m == attention_decode.block_rows(problem, gpu, queries):
        return tuned
    return attention_decode.default(problem, gpu, queries)


@remembers
@functools.cache
def failed(problem: Problem, gpu: Gpu, tokens: int) -> str:
    """Which tiles of the tuned file gave wrong results, or ""."""
    found = [(kernel, entry(kernel, problem, gpu, tokens)) for kernel in (DECODE, EXTEND)]
    reasons = [why_not(choice_of(kernel, problem, config)) for kernel, config in found if config is not None]
    return "".join(f"; instead of {reason}" for reason in reasons if reason)


def splits(
    problem: Problem, gpu: Gpu, config: Config, requests: int, queries: int, contexts: tuple[int, int],
    window_tokens: int,
) -> int:  # fmt: skip
    """Among how many blocks decode divides the keys of a request. `queries`: the most of a request;
    `contexts`: tokens of the longest, and of all divided by the requests."""
    from firebox.kernels import attention_decode

    longest, mean = contexts
    if window_tokens:  # nothing before the first query's window is read
        most = window_tokens + queries
        longest, mean = min(longest, most), min(mean, most)
    programs = problem.kv_heads * -(-problem.group * queries // config.block_m) * requests
    places = attention_decode.places(problem, config, gpu)
    whole, fewest = (
        count(problem, config) for count in (attention_decode.whole_tiles, attention_decode.min_tiles)
    )
    return attention_decode.split_count(programs, (longest, mean), places, config.block_n, whole, fewest)
