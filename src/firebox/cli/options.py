"""Command-line options made from the config's fields: one place says what can be set, and how it is called.

`context_length` becomes `--context-length`, a bool gets its `--no-` twin, `choices` close the values, and the
field `model` is the argument MODEL.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import typer

from firebox.config import Config

Verb = Callable[..., Any]


def takes(*groups: str, without: Collection[str] = ()) -> Callable[[Verb], Verb]:
    """Gives a verb `verb(config, …)` an option for every field of these groups of Config ("model", "engine",
    "server"), but those `without`, which keep their defaults.

    The verb's own parameters, keyword-only, stay its options.
    """

    def decorate(verb: Verb) -> Verb:
        own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
        fields = {group: _parameters(group, without) for group in groups}

        @functools.wraps(verb)
        def with_config(**given: Any) -> Any:
            parts = {
                group: type(getattr(Config(), group))(**{p.name: given.pop(p.name) for p in parameters})
                for group, parameters in fields.items()
            }
            return verb(Config(**parts), **given)

        parameters = [*(p for group in fields.values() for p in group), *own]
        parameters.sort(key=lambda p: p.name != "model")  # the argument first
        del with_config.__wrapped__  # its signature is not the command's
        with_config.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_config.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_config

    return decorate


def _parameters(group: str, without: Collection[str]) -> list[inspect.Parameter]:
    config = getattr(Config(), group)
    types = typing.get_type_hints(type(config))
    fields = [field for field in dataclasses.fields(config) if field.name not in without]
    return [_parameter(field, types[field.name]) for field in fields]


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    help, choices = field.metadata["help"], field.metadata["choices"]
    flag = "--" + field.name.replace("_", "-")
    if field.name == "model":
        declared: Any = typer.Argument(help=help)
    elif kind is bool:
        declared = typer.Option(f"{flag}/--no-{flag[2:]}", help=help)
    else:
        declared = typer.Option(flag, help=help)
    if choices:
        kind = Literal[choices]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, declared],
    )
