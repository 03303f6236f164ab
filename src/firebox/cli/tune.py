"""`firebox tune MODEL --gpu … --tp …`: finds kernel configurations and writes them for kernels."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.hardware.base import Gpu
    from firebox.planning.fit import Source
    from firebox.tuning.run import Tuned, Work
    from firebox.tuning.spread import Places

SERVERS_SHARE = 0.45  # of the budget: files for SGLang and vLLM, which compile their own kernel
UNPROVED = "unproved"  # the folder of files that have not shown a gain
OPS = ("moe", "linear", "attention", "all")
UNITS = {"s": 1, "m": 60, "h": 3600}


def tune(
    model: Annotated[str, typer.Argument(help="a card, a folder or a Hugging Face id")],
    gpu: Annotated[
        str | None, typer.Option(help="gb10, rtx-pro-6000, h200, …; default: this machine's")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model")] = 1,
    op: Annotated[str, typer.Option(help=f"what is tuned: {', '.join(OPS)}")] = "moe",
    budget: Annotated[str, typer.Option(help="the most time it takes: 180s, 5m")] = "300s",
    predict: Annotated[
        bool, typer.Option("--predict", help="without the GPU: by estimate, and marked so")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="default: where kernels look, FIREBOX_CACHE_DIR/tuned")
    ] = None,
    drafts: Annotated[int, typer.Option(min=0, help="tokens drafted for each request and step")] = 0,
    prefill_chunk_tokens: Annotated[int, typer.Option(min=1, help="as in serve")] = 512,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="the largest step")] = 4096,
    dtype: Annotated[str, typer.Option(help="compute dtype")] = "auto",
    requantize: Annotated[str, typer.Option(help="as in serve: none, fp8")] = "none",
    prove: Annotated[
        bool, typer.Option("--prove", help="install only what makes the engine faster, in pairs")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help="a Ray cluster to compile and measure on: its address")
    ] = None,
    seeds: Annotated[
        list[Path],
        typer.Option("--import", help="a tuning file of SGLang or vLLM: its tiles compete in theirs"),
    ] = [],  # noqa: B006 (typer copies it)
    servers: Annotated[bool, typer.Option(help="files for SGLang and vLLM too")] = True,
    layers: Annotated[int, typer.Option(min=1, help="with --prove: layers that the engine runs")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Kernel configurations for a model, in minutes: compiled on all cores, ranked by an estimate, measured
    on the GPU, written as tuned/<gpu>/*.json and, for SGLang and vLLM, under the names they look up. With
    --predict the GPU need not be here. Whatever stops it, what was found stays and the next call goes on
    from there."""
    if op not in OPS:
        raise ConfigError(f"--op {op}", hint=f"there are: {', '.join(OPS)}")
    budget_s = seconds(budget)
    from firebox.cli._fit_model import source_of
    from firebox.env import read
    from firebox.tuning.run import sizes_of
    from firebox.tuning.run import tune as run

    on, here = _gpu(gpu, predict=predict, far=ray is not None)
    if prove and (not here or ray is not None or tp > 1 or op != "moe"):
        raise ConfigError(
            "--prove", hint="it runs the engine here: without --predict and --ray, with --tp 1 --op moe"
        )
    source = source_of(model, dtype, requantize)
    home = out or read().cache_dir / "tuned"
    folder = home / UNPROVED if prove else home
    works = _works(source, on, tp, op)
    sizes = sizes_of(drafts, prefill_chunk_tokens, max_batch_tokens)
    theirs_s = budget_s * SERVERS_SHARE if servers and op in ("moe", "all") else 0.0
    done: list[Tuned] = []
    with ExitStack() as stack:
        places = stack.enter_context(_places(on, ray, measure=here))
        progress = stack.enter_context(_bar())
        try:
            for tuned in run(works, on, folder, places, sizes, budget_s - theirs_s, progress):
                done.append(tuned)
        except KeyboardInterrupt:
            print("stopped; what was found is kept", file=sys.stderr)
    theirs = _for_servers(source, on, tp, folder, theirs_s, seeds) if theirs_s else []
    _show(done, theirs, as_json=as_json)
    if not done or (prove and not _proved(source, layers, folder, home, done)):
        raise typer.Exit(1)


def _proved(source: Source, layers: int, new: Path, home: Path, done: Sequence[Tuned]) -> bool:
    """Runs the engine with the new files and without, and installs them if that pays."""
    from firebox.config import Config, EngineConfig, ModelConfig
    from firebox.text.folder import resolve_folder
    from firebox.tuning.prove import prove, worth_installing
    from firebox.tuning.write import merge

    folder, least = str(resolve_folder(source.name)), min(layers, int(source.config["num_hidden_layers"]))
    of = ModelConfig(
        model=folder, load_format="dummy", layers=least, dtype=source.dtype,
        requantize="fp8" if source.requantise else "none",
    )  # fmt: skip
    gains = []
    for gain in prove(Config(model=of, engine=EngineConfig(device="cuda", prefix_cache=False)), new):
        gains.append(gain)
        print(
            f"{gain.case}: {gain.before_ms:.3f} ms before, {gain.after_ms:.3f} after: "
            f"{gain.share.value:+.2%} ({gain.share.low:+.2%} to {gain.share.high:+.2%})",
            file=sys.stderr,
        )
    pays = worth_installing(gains)
    for tuned in done if pays else ():
        merge(home / tuned.file.relative_to(new), tuned.work.tunable, tuned.entries)
    print("installed" if pays else f"no gain: not installed; the files stay in {new}", file=sys.stderr)
    return pays


def seconds(text: str) -> float:
    """ "180s", "5m", "1h" or a plain number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--budget {text}", hint="a time such as 180s or 5m")
    return float(found[1]) * UNITS[found[2] or "s"]


def _gpu(name: str | None, *, predict: bool, far: bool) -> tuple[Gpu, bool]:
    """What is tuned for, and whether it can be measured: here, or with `far` elsewhere."""
    from firebox.hardware.base import find_gpu
    from firebox.hardware.probe import probe_gpu

    there = None if predict and name is not None else probe_gpu()
    wanted = there if name is None else find_gpu(name)
    if wanted is None:
        raise ConfigError("there is no GPU here", hint="--gpu NAME --predict works without one")
    if predict or far:
        return wanted, not predict
    if there is None or there.name != wanted.name:
        raise ConfigError(
            f"there is no {wanted.name} here to measure on", hint="--predict ranks by an estimate instead"
        )
    return there, True


def _works(source: Source, gpu: Gpu, tp: int, op: str) -> list[Work]:
    from firebox.tuning.problems import works_of

    works, refusals = works_of(source, gpu, tp, op)
    if not works:
        raise ConfigError(
            f"{source.name} has nothing to tune for --op {op} on {gpu.name}",
            hint="; ".join(refusals) or "another --op",
        )
    return works


def _places(gpu: Gpu, ray: str | None, *, measure: bool) -> AbstractContextManager[Places]:
    from firebox.tuning.spread import cluster, this_machine

    return this_machine(gpu, measure=measure) if ray is None else cluster(ray, gpu, measure=measure)


class _bar:
    """A progress bar on stderr, with the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._rows: dict[tuple[int, str], Any] = {}

    def __enter__(self) -> Any:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, work: Work, what: str, done: int, of: int) -> None:
        key = (id(work), what)
        if key not in self._rows:
            self._rows[key] = self._bar.add_task(f"{what} {work.tunable.OP}", total=of)
        self._bar.update(self._rows[key], completed=done, total=of)


def _for_servers(
    source: Source, gpu: Gpu, tp: int, folder: Path, budget_s: float, seeds: Sequence[Path]
) -> list[Path]:
    """The files that SGLang and vLLM look up; none, and a line that says why, where they read none."""
    from firebox.errors import UnsupportedFormat
    from firebox.tuning.servers.predict import predict_files
    from firebox.tuning.write import commit

    try:
        report = predict_files(source, gpu, tp, folder, budget_s, seeds=seeds, commit=commit())
    except UnsupportedFormat as error:
        print(f"no files for other servers: {error}", file=sys.stderr)
        return []
    return list(report.paths)


def _show(done: Sequence[Tuned], theirs: Sequence[Path], *, as_json: bool) -> None:
    if as_json:
        found = {"problems": [_document(tuned) for tuned in done], "servers": [str(path) for path in theirs]}
        print(json.dumps(found))
        return
    for tuned in done:
        report = tuned.report
        print(f"{tuned.work.tunable.OP}, {tuned.work.layers} layers: {tuned.work.problem}")
        for entry in tuned.entries:
            against = "" if entry.stock_us is None else f", stock {entry.stock_us:.1f}"
            parts = "; ".join(c.name.removeprefix(f"{c.path} ") for c in entry.option.parts.values())
            print(
                f"  {entry.task.tokens:5} tokens {entry.option.us:9.1f} us {entry.how}{against}: "
                f"{entry.option.path}: {parts}"
            )
        dropped = ", ".join(f"{count} {why}" for why, count in sorted(report.dropped.items()))
        print(
            f"  {report.candidates} candidates, {report.compiled} compiled, {report.measured} measured"
            f"{'; ' + dropped if dropped else ''}; written to {tuned.file}"
        )
        for name, why in report.failed.items():
            print(f"  failed: {name}: {why}")
    if theirs:
        print("for SGLang and vLLM, predicted:")
    for path in theirs:
        print(f"  {path}")


def _document(tuned: Tuned) -> dict[str, Any]:
    return {
        "op": tuned.work.tunable.OP,
        "layers": tuned.work.layers,
        "key": tuned.entries[0].task.key if tuned.entries else "",
        "file": str(tuned.file),
        "entries": {
            str(e.task.tokens): {
                "path": e.option.path,
                "us": e.option.us,
                "how": e.how,
                "stock_us": e.stock_us,
                "parts": {name: c.numbers for name, c in e.option.parts.items()},
            }
            for e in tuned.entries
        },
        "candidates": tuned.report.candidates,
        "compiled": tuned.report.compiled,
        "measured": tuned.report.measured,
        "dropped": dict(tuned.report.dropped),
        "failed": tuned.report.failed,
    }
