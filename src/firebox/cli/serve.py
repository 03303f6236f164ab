"""`firebox serve [MODEL]`: the OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firebox.cli._explanation import explanation
from firebox.cli._profile import with_profile
from firebox.cli.options import takes
from firebox.config import Config

if TYPE_CHECKING:
    from firebox.engine.client import Ready


@takes("model", "engine", "server")
def serve(
    config: Config,
    *,
    context: typer.Context,
    profile: Annotated[
        Path | None,
        typer.Option(help="TOML file of settings, named as in docs/config.md; flags given here win"),
    ] = None,
) -> None:
    """Serves MODEL over OpenAI's HTTP API until SIGTERM or Ctrl-C, which let running answers finish."""
    if profile is not None:
        config = with_profile(config, profile, context)
    from firebox.engine.client import EngineProcess
    from firebox.server.listen import bind
    from firebox.text.folder import resolve_folder

    name = config.model.served_model_name or Path(config.model.model).name
    folder = resolve_folder(config.model.model)
    model = dataclasses.replace(config.model, model=str(folder), served_model_name=name)
    config = dataclasses.replace(config, model=model)
    listener = bind(config.server)
    process = EngineProcess.start(config)  # as early as can be: it loads while the server imports

    try:
        from firebox.answer.progress import loading
        from firebox.server.run import run

        with contextlib.ExitStack() as bar:
            on_load_progress = bar.enter_context(loading(name))

            def on_ready(ready: Ready, url: str) -> None:
                bar.close()
                if config.server.explain:
                    print(explanation(ready), file=sys.stderr)
                print(f"firebox serves {name} at {url}", file=sys.stderr, flush=True)

            status = run(
                process, listener, config, folder, on_load_progress=on_load_progress, on_ready=on_ready
            )
    finally:
        process.stop()
    raise typer.Exit(status)
