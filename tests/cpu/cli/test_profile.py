"""`serve --profile FILE`: under the command line, over the defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from firebox.cli._profile import with_profile
from firebox.cli.options import takes
from firebox.config import Config, EngineConfig, ModelConfig, ServerConfig
from firebox.errors import ConfigError


def config_of(tmp_path: Path, text: str, *arguments: str) -> Config:
    """What `serve --profile` makes of a file and a command line."""
    got: list[Config] = []

    @takes("model", "engine", "server")
    def verb(
        config: Config, *, context: typer.Context, profile: Annotated[Path | None, typer.Option()] = None
    ) -> None:
        """As serve begins."""
        assert profile is not None
        got.append(with_profile(config, profile, context))

    file = tmp_path / "profile.toml"
    file.write_text(text)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(verb)
    result = CliRunner().invoke(app, [*arguments, "--profile", str(file)])
    if result.exception is not None:
        raise result.exception
    return got[0]


def test_settings_of_every_group_are_taken(tmp_path):
    text = 'model = "m"\nmoe_backend = "x"\nmem_fraction = 1\nprefix_cache = false\nport = 7\nkv_pages = 9'
    assert config_of(tmp_path, text) == Config(
        model=ModelConfig(model="m"),
        engine=EngineConfig(moe_backend="x", mem_fraction=1.0, prefix_cache=False, kv_pages=9),
        server=ServerConfig(port=7),
    )


def test_the_command_line_wins_even_with_a_default_value(tmp_path):
    text = 'model = "m"\nport = 7\ncuda_graph = "off"\nprefix_cache = false'
    found = config_of(tmp_path, text, "n", "--port", "30000", "--prefix-cache")
    assert (found.model.model, found.server.port, found.engine.prefix_cache) == ("n", 30000, True)
    assert found.engine.cuda_graph == "off"


def test_an_empty_profile_changes_nothing(tmp_path):
    assert config_of(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('moe_backen = "x"', "has 'moe_backen', which is no setting", "did you mean 'moe_backend'"),
        ('moe-backend = "x"', "has 'moe-backend'", "moe_backend"),
        ('[environment]\nX = "1"', "has 'environment'", "docs/config.md"),
        ('port = "7"', "port is '7'", "int is meant"),
        ("port = true", "port is True", "int is meant"),
        ("port = 7.0", "port is 7.0", "int is meant"),
        ("prefix_cache = 0", "prefix_cache is 0", "bool is meant"),
        ('cuda_graph = "piecewise"', "cuda_graph is 'piecewise'", "decode, off"),
        ("x = ", "is not TOML", None),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, message, hint):
    with pytest.raises(ConfigError) as refused:
        config_of(tmp_path, text)
    assert message in str(refused.value)
    if hint:
        assert hint in refused.value.hint


def test_a_wrong_setting_is_refused_even_where_the_command_line_wins(tmp_path):
    with pytest.raises(ConfigError, match="no setting"):
        config_of(tmp_path, "prt = 7", "--port", "1")


def test_serve_has_it():
    from firebox.cli.main import build

    result = CliRunner().invoke(build(), ["serve", "--profile", "/no/such/file.toml"])
    assert isinstance(result.exception, ConfigError)
    assert "/no/such/file.toml cannot be read" in str(result.exception)


def test_every_setting_can_stand_in_a_profile(tmp_path):
    lines, expected = [], {}
    for group in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), group.name)):
            if isinstance(field.default, bool):
                expected[field.name] = not field.default
                lines.append(f"{field.name} = {str(not field.default).lower()}")
    found = config_of(tmp_path, "\n".join(lines))
    for name, value in expected.items():
        (have,) = (getattr(g, name) for g in (found.model, found.engine, found.server) if hasattr(g, name))
        assert have is value, name
