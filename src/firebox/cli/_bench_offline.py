"""`firebox bench offline MODEL`: the engine alone, without a server."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from firebox.cli.options import takes
from firebox.config import Config
from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.bench._offline import AnyRow, Decode, Offline
    from firebox.bench._step import Profile

SET_HERE = ("served_model_name", "max_running_requests", "prefix_cache")  # the last two follow from the rows
BATCHES, CONTEXTS, PREFILLS = "1,2,4,5,8,10,16,32,64,128,256", "128,2048,32768", "2048,8192,32768"


@takes("model", "engine", without=SET_HERE)
def offline(
    config: Config,
    *,
    batches: Annotated[str, typer.Option(help="requests that decode together; empty: no decode")] = BATCHES,
    contexts: Annotated[str, typer.Option(help="tokens that each of them has before it")] = CONTEXTS,
    prefill: Annotated[str, typer.Option(help="lengths of prompts, each run alone; empty: none")] = PREFILLS,
    tokens: Annotated[int, typer.Option(min=4, help="timed steps a row")] = 64,
    granted: Annotated[
        bool,
        typer.Option(
            "--granted/--computed", help="contexts that count as computed, or whose prompts are run"
        ),
    ] = True,
    profile: Annotated[bool, typer.Option(help="on a GPU: one step of each row under the profiler")] = True,
    within: Annotated[float | None, typer.Option(help="seconds after which no row is begun")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document as the last line")] = False,
) -> None:
    """Measures MODEL in this process: decode, prefill, and what a step consists of. Rows go to stderr as JSON
    lines as they come. Exit 1 if a row failed or is void."""
    import msgspec

    from firebox.bench._offline import Settings
    from firebox.bench.offline import measure
    from firebox.text.folder import resolve_folder

    model = dataclasses.replace(config.model, model=str(resolve_folder(config.model.model)))
    settings = Settings(
        config=dataclasses.replace(config, model=model),
        name=named(config),
        batches=numbers(batches, "--batches"),
        contexts=numbers(contexts, "--contexts"),
        prefills=numbers(prefill, "--prefill"),
        tokens=tokens,
        granted=granted,
        profile=profile,
        within_s=within,
    )

    def on_row(row: AnyRow) -> None:
        print(msgspec.json.encode({type(row).__name__: row}).decode(), file=sys.stderr, flush=True)

    report = measure(settings, on_row)
    print("\n".join(table(report)))
    if as_json:
        print(msgspec.json.encode(report).decode())
    failed = any(missing.failed for missing in report.not_measured)
    raise typer.Exit(1 if failed or any(row.void for row in report.decode) else 0)


def named(config: Config) -> str:
    """The model as the report calls it: with its number of layers where that is not all."""
    layers = config.model.layers
    return config.model.model if layers is None else f"{config.model.model}:layers={layers}"


def numbers(text: str, flag: str) -> list[int]:
    """Of "1,2,4"; empty: none. Raises ConfigError."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise ConfigError(f"{flag} is {text!r}", hint="numbers from 1 on with commas between, such as 1,8,64")
    return found


def table(report: Offline) -> Sequence[str]:
    """The rows as text, 110 characters wide."""
    lines = [
        f"{report.model} in {report.format} on {report.device}, {report.layers} layers, "
        f"copy {report.copy_gb_s:.0f} GB/s, pool {report.kv_tokens} tokens, ready in {report.load_s:.1f} s",
        f"{'context':>8}{'batch':>6}{'ms/token':>10}{'tok/s':>10}{'roof ms':>9}{'of roof':>9}"
        f"{'replay':>9}{'host':>7}{'gaps':>7}{'experts':>14}  steps",
    ]
    lines += [_decode_line(row) for row in report.decode]
    for prompt in report.prefill:
        lines.append(
            f"prefill {prompt.tokens}: first token after {prompt.ttft_ms:.1f} ms, "
            f"{prompt.tokens_per_s:.0f} tokens/s, {prompt.share_of_roof:.3f} of {prompt.roof}"
        )
    for row in _broken_down(report.decode):
        lines += _breakdown(f"context {row.context}, batch {row.batch}", row.profile)
    for prompt in report.prefill:
        lines += _breakdown(f"prefill {prompt.tokens}", prompt.profile)
    lines += [f"not measured: {missing.what}: {missing.why}" for missing in report.not_measured]
    return lines


def _decode_line(row: Decode) -> str:
    """A void row has no figures here."""
    at = f"{row.context:>8}{row.batch:>6}"
    if row.void is not None:
        return f"{at}  void: {row.void}"
    experts = (
        "–" if row.experts is None else f"{row.experts:.1f} of {row.experts_expected or float('nan'):.1f}"
    )
    gaps = "–" if row.profile is None else f"{row.profile.gaps:.1%}"
    return (
        f"{at}{row.ms_per_token:>10.3f}{row.tokens_per_s:>10.1f}{row.roof_ms:>9.3f}{row.share_of_roof:>9.3f}"
        f"{_or_dash(row.replay_ms, 9)}{_or_dash(row.host_ms, 7)}{gaps:>7}{experts:>14}  "
        + ", ".join(f"{count} {mode}" for mode, count in row.modes.items())
    )


def _broken_down(rows: Sequence[Decode]) -> Iterator[Decode]:
    """Of those with a profile the smallest and the largest batch of each context; JSON has the others'."""
    with_profile = [row for row in rows if row.profile is not None and row.void is None]
    for context in dict.fromkeys(row.context for row in with_profile):
        batches = [row.batch for row in with_profile if row.context == context]
        at_ends = (min(batches), max(batches))
        yield from (row for row in with_profile if row.context == context and row.batch in at_ends)


def _breakdown(what: str, found: Profile | None) -> Iterator[str]:
    """The kernels of one step or prompt, where they were seen."""
    if found is None:
        return
    yield (
        f"{what}: {found.total_ms:.3f} ms under the profiler, {found.launches} launches, "
        f"gaps {found.gaps:.1%}"
    )
    for kernel in found.kernels:
        share = kernel.us / found.total_ms / 1e3 if found.total_ms else 0.0
        yield f"  {kernel.name:<60.60}{kernel.launches:>6}{kernel.us:>10.1f} us{share:>8.1%}"


def _or_dash(value: float | None, width: int) -> str:
    return "–".rjust(width) if value is None else f"{value:>{width}.3f}"
