"""`firebox fit MODEL --gpu … --tp …`: would the model run there, and how fast could it be? (`_fit_model.py`)

`firebox fit --moe-config FILE --gpu …`: would a tuning file made for SGLang or vLLM launch there, and would
it ever be looked up?
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.kernels.compile import Compiled
    from firebox.planning._foreign_kernel import Tile
    from firebox.planning._foreign_model import ExpertShape
    from firebox.planning.foreign import Verdict

WIDE_CHARACTERS = 140  # of a table that is not for a terminal


def fit(
    gpu: Annotated[str, typer.Option(help="what to plan for: gb10, rtx-pro-6000, h200, …")],
    model: Annotated[
        str | None, typer.Argument(help="a card, a folder or a Hugging Face id; default: firebox-tiny")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs that share the model; default 1")] = None,
    ep: Annotated[
        int | None,
        typer.Option(help="groups of GPUs that share out the routed experts; default 1"),
    ] = None,
    num_drafts: Annotated[
        int | None, typer.Option(help="tokens beside its own that a request's decode step checks; default 0")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="compute dtype; default: the checkpoint's")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="as in serve: bf16, fp8, …; default: the compute dtype")
    ] = None,
    requantize: Annotated[
        str | None, typer.Option(help="as in serve: none, fp8 for every unquantised projection; default none")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="tokens that one request must be able to hold; default 4096")
    ] = None,
    max_running_requests: Annotated[int | None, typer.Option(min=1, help="as in serve")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="as in serve")] = None,
    moe_config: Annotated[
        Path | None, typer.Option(help="a fused-MoE tuning file of SGLang or vLLM, under its own name")
    ] = None,
    of_model: Annotated[
        str | None, typer.Option("--model", help="with --moe-config: the model that the file should be for")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit status 1 where a choice is a fallback, too")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """What will run and whether it fits, without the GPU and without weights: memory, the speed that memory
    bandwidth allows, and every kernel launch, compiled. With --moe-config: compiles every entry
    of a tuning file instead. Exit status 1 if something does not fit."""
    engine: dict[str, Any] = {
        "kv_cache_dtype": kv_cache_dtype,
        "context_length": context_length,
        "max_running_requests": max_running_requests,
        "max_batch_tokens": max_batch_tokens,
    }
    given = {name: value for name, value in engine.items() if value is not None}
    if moe_config is not None:
        others = {
            "dtype": dtype,
            "requantize": requantize,
            "ep": ep,
            "num_drafts": num_drafts,
            "strict": strict or None,
        }
        unused = [*given, *(name for name, value in others.items() if value is not None)]
        if unused:
            raise ConfigError(f"--moe-config does not go with --{unused[0].replace('_', '-')}")
        raise typer.Exit(0 if _judge(moe_config, gpu, model, of_model, tp, as_json) else 1)
    if of_model is not None:
        raise ConfigError(
            f"--model {of_model} is for --moe-config", hint=f"firebox fit {of_model} --gpu {gpu}"
        )
    gc.disable()  # nearly all of it lives until the process ends with the answer: half a second of three
    from firebox.cli._fit_model import fit_model, source_of
    from firebox.config import DEFAULT_MODEL, EngineConfig

    settings = EngineConfig(**given)
    divided = {"tp": 1 if tp is None else tp, "ep": 1 if ep is None else ep, "drafts": num_drafts or 0}
    source = source_of(model or DEFAULT_MODEL, dtype or "auto", requantize or "none")
    fits = fit_model(source, gpu, divided, settings, as_json=as_json, strict=strict)
    raise typer.Exit(0 if fits else 1)


def _judge(
    file: Path, gpu: str, model: str | None, of_model: str | None, tp: int | None, as_json: bool
) -> bool:
    from firebox.hardware.base import find_gpu
    from firebox.planning.foreign import judge

    if model is not None:
        raise ConfigError(f"--moe-config takes no MODEL ({model!r})", hint=f"--model {model}")
    verdict = judge(file, find_gpu(gpu), _shape(of_model, tp))
    if as_json:
        print(json.dumps(verdict.document()))
    else:
        _show(verdict)
    return verdict.fits


def _shape(model: str | None, tp: int | None) -> ExpertShape | None:
    if model is None:
        if tp is not None:
            raise ConfigError("--tp needs --model here", hint="the file's name already holds its share")
        return None
    from firebox.planning._foreign_model import expert_shape
    from firebox.text.folder import resolve_folder
    from firebox.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(resolve_folder(model))
    cut = 1 if tp is None else tp
    return expert_shape(model, checkpoint.model_type, checkpoint.text_config, cut)


def _show(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{verdict.judged_as} on {verdict.gpu.name}", title_justify="left")
    for heading in ("tokens", "tile", "warps", "stages", "bytes", "limit", "registers", "spilled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("instruction", "native", "verdict"):
        table.add_column(heading)
    for key in verdict.keys:
        table.add_row(key, *_cells(verdict.tiles[key], verdict.keys[key]))
    console = Console(width=None if sys.stdout.isatty() else WIDE_CHARACTERS, highlight=False)
    console.print(table)
    print(_summary(verdict), flush=True)
    for warning in verdict.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _cells(tile: Tile, compiled: Compiled) -> Iterator[str]:
    yield f"{tile.block_m}×{tile.block_n}×{tile.block_k}{' TMA' if tile.tma else ''}"
    yield str(tile.num_warps)
    yield str(tile.num_stages)
    for number in (compiled.shared_bytes, compiled.limit_bytes, compiled.registers, compiled.spill_bytes):
        yield f"{number:,}"
    yield compiled.instruction
    yield "yes" if compiled.native else "no"
    yield compiled.error or ("fits" if compiled.fits else "does not fit")


def _summary(verdict: Verdict) -> str:
    from firebox.planning._foreign_name import SPELLED

    misfits = sum(not compiled.fits for compiled in verdict.keys.values())
    entries = len(verdict.keys)
    who = " and ".join(SPELLED[server] for server in verdict.looked_up_by) or "no server"
    judged = f"all {entries} entries fit" if verdict.fits else f"{misfits} of {entries} entries do not fit"
    return f"{judged} {verdict.gpu.name}; the file's name is looked up by {who}"
