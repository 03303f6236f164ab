"""`firebox VERB …`: finds the verbs, and turns our errors into a message, a hint and an exit status.

Exit status: 0 yes, 1 the answer is no or something failed, 2 the call was wrong. stdout is data, stderr is
the log.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import firebox
from firebox.errors import CheckpointError, ConfigError, FireboxError, RequestError
from firebox.find import load, names

WRONG_CALL = (ConfigError, CheckpointError, RequestError)


def main() -> None:
    """The entry point of the `firebox` command and of `python -m firebox`."""
    try:
        build()()
    except FireboxError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint is not None:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WRONG_CALL) else 1)


def build() -> typer.Typer:
    """The command line with every verb that has a file."""
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    app.callback()(_root)
    for name in names("cli"):
        verb = getattr(load("cli", name), name, None)
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name)
        elif callable(verb) and name != "main":
            app.command(name)(verb)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"firebox {firebox.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version)] = False,
) -> None:
    """Serves quantised mixture-of-experts language models on GPUs with 99 KiB of shared memory, and on a
    plain CPU.
    """
