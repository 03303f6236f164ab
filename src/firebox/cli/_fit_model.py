"""What `firebox fit MODEL` does: reads config.json, asks planning, prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firebox.config import EngineConfig
    from firebox.kernels.plan import Chosen
    from firebox.layers.launches import Launch, Layers
    from firebox.planning.fit import Fit, Source
    from firebox.planning.memory import Memory
    from firebox.planning.roof import Roof

WIDE_CHARACTERS = 220  # of a table that is not for a terminal
NARROWEST_PATH = 12  # characters of a choice's path, in the lines below a table
PARTIAL = (
    "this check is partial: memory, roof and the launches of all kernels. Composed of torch operators "
    "on a GPU, and so not checked: "
)


def fit_model(
    source: Source, gpu: str, divided: Mapping[str, int], engine: EngineConfig, *, as_json: bool,
    strict: bool = False,
) -> bool:  # fmt: skip
    """Prints the answer; True: it fits, with `strict` without fallbacks. `divided`: tp, ep and drafts, as
    plan takes them."""
    from firebox.hardware.base import find_gpu
    from firebox.planning.fit import compiled, open_source, plan

    on = find_gpu(gpu)
    found = compiled(plan(open_source(source, on), on, engine=engine, **divided))
    if as_json:
        print(json.dumps(found.document()))
    else:
        _show(found, strict=strict)
    return found.fits and not (strict and found.fallbacks)


def source_of(model: str, dtype: str, requantize: str = "none") -> Source:
    """What planning needs of a card, a folder or a Hugging Face id."""
    from firebox.config import ModelConfig, check_choice
    from firebox.planning.fit import Source
    from firebox.text.folder import resolve_folder
    from firebox.weights.checkpoint import open_checkpoint

    check_choice(ModelConfig, "dtype", dtype)
    check_choice(ModelConfig, "requantize", requantize)
    checkpoint = open_checkpoint(resolve_folder(model))
    stored = frozenset(checkpoint.names()) if checkpoint.shards else None
    computes_in = checkpoint.dtype if dtype == "auto" else dtype
    config, requantise = checkpoint.text_config, requantize == "fp8"
    return Source(model, checkpoint.model_type, config, computes_in, stored, requantise)


def _show(fit: Fit, *, strict: bool) -> None:
    chosen = fit.choices
    for layers in fit.layers:
        rows = [launch for launch in fit.launches or () if launch.layers is layers]
        if rows:
            _show_launches(fit, layers, rows)
            for line in _choice_lines([choice for of, choice in chosen if of is layers]):
                print(line)
    if fit.memory is not None:
        print("\n".join(_memory_lines(fit.memory)))
    if fit.roof is not None:
        print("\n".join(_roof_lines(fit.roof)))
    print(PARTIAL + (", ".join(fit.not_planned) or "nothing"))
    for sentence in fit.planned_only:
        print(f"planned only: {sentence}")
    for problem in fit.problems:
        print(f"does not fit: {problem}")
    for fallback in fit.fallbacks if strict else ():
        print(f"--strict: {fallback}")
    for help in fit.help:
        print(f"would help: {help}")
    what = f"{fit.source.name} on {fit.setting.gpus} × {fit.gpu.name}"
    print(f"{what}: {'fits' if fit.fits else 'does not fit'}, as far as was checked", flush=True)


def _show_launches(fit: Fit, layers: Layers, launches: Sequence[Launch]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{layers.op} in {layers.format}, {layers.layers} of them, on {fit.gpu.name}, tp {fit.tp}"
    if fit.setting.ep > 1:
        title += f", ep {fit.setting.ep}"
    table = Table(title=title, title_justify="left")
    for heading in ("tokens", "bytes", "limit", "registers", "spilled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("operation", "kernel", "config", "chosen", "instruction", "native", "verdict"):
        table.add_column(heading, no_wrap=heading not in ("config", "verdict"))
    for launch in launches:
        table.add_row(*_cells(launch.document()))
    Console(width=None if sys.stdout.isatty() else WIDE_CHARACTERS, highlight=False).print(table)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    from firebox.planning._verdict import tile

    yield _range(*row["tokens"])
    for key in ("shared_bytes", "limit_bytes", "registers", "spill_bytes"):
        yield f"{row[key]:,}"
    yield row["operation"]
    yield row["kernel"]
    yield tile(row["config"])
    yield f"{row['path']}, {row['why'].partition(',')[0].partition(':')[0]}"
    yield row["instruction"]
    yield f"{'yes' if row['native'] else 'no'}{', weight-only' if row['weight_only'] else ''}"
    yield row["error"] or ("fits" if row["fits"] else "does not fit")


def _range(first: int, last: int) -> str:
    return f"{first}–{last}" if last > first else str(first)


def _choice_lines(choices: Sequence[Chosen]) -> Iterator[str]:
    """What each operation chooses at which numbers of tokens, and why nothing else; losers of one reason
    together. A choice that is made since another one is not has one reason for both."""
    width = max((len(choice.operation.name) for choice in choices), default=0)
    for choice in choices:
        reasons: dict[str, list[str]] = {}
        for path, why in choice.losers:
            if why != choice.why:
                reasons.setdefault(why, []).append(path)
        losers = [f"not {', '.join(paths)}: {why}" for why, paths in reasons.items()]
        where = f"{choice.operation.name:{width}}  {_range(choice.first, choice.last):>9}"
        yield f"  {where}  {choice.path:{NARROWEST_PATH}}  {'; '.join([choice.why, *losers])}"


def _memory_lines(memory: Memory) -> Iterator[str]:
    """The ledger, GiB a line."""
    document = memory.document()
    formulas: dict[str, str] = document["formulas"]
    yield "memory of one GPU, GiB"
    yield _line("all of it", memory.gpu_bytes)
    for name, found in memory.weights.items():
        if found:
            yield _line(f"weights: {name.replace('_', ' ')}", found)
    yield _line("weights, all", memory.weights_bytes)
    for key, formula in formulas.items():
        if document[key]:
            yield _line(key.removesuffix("_bytes"), document[key], formula)
    yield _line(
        "KV cache",
        max(0, memory.left_bytes - memory.snapshots_bytes),
        f"{memory.kv_tokens:,} tokens of {memory.cache.per_token:,} bytes",
    )


def _line(name: str, found: int, note: str = "") -> str:
    return f"  {name:28}{found / 2**30:8.2f}  {note}".rstrip()


def _roof_lines(roof: Roof) -> Iterator[str]:
    """Tokens per second at each batch."""
    yield (
        f"roof at {roof.context_tokens} tokens of context, {roof.bandwidth_gb_s:,.0f} GB/s a GPU "
        f"({roof.source}), without communication"
    )
    for batch, step in roof.steps.items():
        yield (
            f"  batch {batch:2}: {roof.tokens_per_s(batch):9,.1f} tokens/s; a step reads "
            f"{step.weights / 1e9:.2f} GB of weights and {step.cache / 1e9:.2f} GB of cache on each GPU "
            f"(weights alone: {roof.weights_only_tokens_per_s(batch):,.1f} tokens/s)"
        )
