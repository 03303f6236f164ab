from __future__ import annotations

from pathlib import Path

import pytest

from firebox.errors import ConfigError
from firebox.matrix.cells import cells
from firebox.matrix.spec import parse, read

ROOT = Path(__file__).resolve().parents[3]
GOOD = """
command = "serve --port {port} --moe {moe} {graph}"
[axes]
moe = ["triton", "marlin"]
[axes.graph]
off = { flags = ["--graph", "off"] }
full = { flags = ["--graph", "full"], env = { DEBUG = "1" } }
"""


def test_flags_go_where_the_command_says_and_variables_to_the_environment():
    found = {tuple(cell.axes.values()): cell for cell in cells(parse(GOOD))}
    full = found["marlin", "full"]
    assert full.argv == ("serve", "--port", "{port}", "--moe", "marlin", "--graph", "full")
    assert dict(full.env) == {"DEBUG": "1"}
    assert dict(found["triton", "off"].env) == {}


def test_flags_go_to_the_end_where_the_command_does_not_name_the_axis():
    (first, *_) = cells(parse(GOOD.replace(" {graph}", "")))
    assert first.argv[-2:] == ("--graph", "off")


def test_true_and_false_are_written_as_toml_writes_them():
    text = 'command = "serve --port {port} --overlap={overlap}"\n[axes]\noverlap = [true, false]'
    assert [cell.argv[-1] for cell in cells(parse(text))] == ["--overlap=true", "--overlap=false"]


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("[axes]", "[axis]", "has no 'axis'", "did you mean 'axes'"),
        ("{port}", "30000", "where {port} goes", "--port {port}"),
        ("{moe}", "auto", "axis moe changes nothing", "--moe {moe}"),
        ("{graph}", "{graf}", "has no 'graf'", "did you mean 'graph'"),
        ("flags = [", "flag = [", "axes.graph.off has no 'flag'", "did you mean 'flags'"),
        ('["triton", "marlin"]', '["triton", "triton"]', "a value twice", None),
        ('["triton", "marlin"]', "[]", "axes.moe has no values", "at least one"),
        ('["triton", "marlin"]', '"triton"', "axes.moe is 'triton'", "a list of values"),
        ('["triton", "marlin"]', "[[1]]", "axes.moe has [1]", "text, a number"),
        ("{graph}", "--g={graph}", "only a part of an argument", "an argument of its own"),
        ('DEBUG = "1"', "DEBUG = 1", "axes.graph.full.env is {'DEBUG': 1}", "a table of texts"),
        ("moe = [", "port = [", "an axis is called 'port'", "not port"),
        ("command = ", "command = 7 #", "command is 7", "firebox serve"),
        ("[axes]", "[axes", "is not TOML", None),
    ],
)
def test_what_cannot_be_is_refused_and_the_near_miss_named(old, new, message, hint):
    assert old in GOOD
    with pytest.raises(ConfigError) as refused:
        parse(GOOD.replace(old, new, 1))
    assert message in str(refused.value)
    if hint:
        assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("[load]\nconcurency = [1]", "[load] has no 'concurency'"),
        ("[load]\nconcurrency = [1, 1]", "load.concurrency is [1, 1]"),
        ("[load]\nconcurrency = [0]", "load.concurrency is 0"),
        ('[load]\noutput_tokens = "8"', "[load]: Expected `int`, got `str`"),
        ("[limits]\nstart_s = 0", "limits.start_s is 0"),
        ("[limits]\nsilence = 3", "[limits] has no 'silence'"),
        ("[limits]\nattempts = 0", "limits.attempts is 0"),
        ("[repeat]\nrounds = 0", "repeat.rounds is 0"),
        ('[fit]\ngpu = "gb11"', "gb11"),
        ('[[skip]]\nif = "x"', "[[skip]] has no 'if'"),
        ("[[skip]]\nwhen = 'moe = \"cutlass\"'", "no value of the axis is 'cutlass'"),
    ],
)
def test_sections_are_read_strictly(extra, message):
    with pytest.raises(ConfigError) as refused:
        parse(f"{GOOD}\n{extra}")
    assert message in f"{refused.value} {refused.value.hint}"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")


def test_the_example_has_36_cells():
    assert len(cells(read(ROOT / "examples" / "matrix" / "firebox-cpu-faults.toml"))) == 36


def test_a_grid_of_which_everything_is_skipped_is_refused():
    text = GOOD + '[[skip]]\nwhen = \'moe = "triton" or not moe = "triton"\''
    with pytest.raises(ConfigError, match="skip every cell"):
        cells(parse(text))
