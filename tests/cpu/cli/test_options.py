from __future__ import annotations

import dataclasses

import typer
from typer.testing import CliRunner

from firebox.cli.options import takes
from firebox.config import Config


def call(
    *arguments: str,
    groups: tuple[str, ...] = ("model", "engine", "server"),
    without: tuple[str, ...] = (),
):
    """(the config that a verb got, the result)."""
    got: list[Config] = []

    @takes(*groups, without=without)
    def verb(config: Config, *, extra: int = 7) -> None:
        """A verb."""
        got.append(config)
        print(extra)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(verb)
    return got, CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})


def test_no_option_is_the_default_config():
    got, result = call()
    assert got == [Config()]
    assert result.stdout == "7\n"


def test_every_field_has_an_option_that_sets_it():
    for group in ("model", "engine", "server"):
        for field in dataclasses.fields(getattr(Config(), group)):
            arguments, expected = _another_value(field)
            got, result = call(*arguments)
            assert result.exit_code == 0, (field.name, result.output)
            assert getattr(getattr(got[0], group), field.name) == expected
            changed = dataclasses.replace(getattr(Config(), group), **{field.name: expected})
            assert got == [dataclasses.replace(Config(), **{group: changed})], "it must set nothing else"


def _another_value(field: dataclasses.Field) -> tuple[list[str], object]:
    flag = "--" + field.name.replace("_", "-")
    if field.name == "model":
        return ["some/model"], "some/model"
    if isinstance(field.default, bool):
        return [flag if not field.default else "--no-" + flag[2:]], not field.default
    if field.metadata["choices"]:
        other = next(choice for choice in field.metadata["choices"] if choice != field.default)
        return [flag, other], other
    if "int" in str(field.type):
        return [flag, "3"], 3
    if "float" in str(field.type):
        return [flag, "0.5"], 0.5
    return [flag, "text"], "text"


def test_a_verb_has_only_its_groups():
    got, result = call("--port", "1", groups=("model", "engine"))
    assert result.exit_code == 2
    assert "--port" in result.output
    assert not got


def test_a_field_that_is_left_out_has_no_option_and_its_default():
    got, result = call("--no-prefix-cache", without=("prefix_cache",))
    assert result.exit_code == 2 and "--no-prefix-cache" in result.output and not got
    got, result = call("--page-tokens", "8", without=("prefix_cache",))
    assert result.exit_code == 0 and got[0].engine.prefix_cache and got[0].engine.page_tokens == 8


def test_help_is_the_fields_documentation():
    output = call("--help")[1].output
    for group in ("model", "engine", "server"):
        for field in dataclasses.fields(getattr(Config(), group)):
            assert field.metadata["help"] in " ".join(output.split()), field.name
    assert "--no-prefix-cache" in output


def test_a_verbs_own_options_stay():
    assert call("--extra", "9")[1].stdout == "9\n"
