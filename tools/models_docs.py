"""Writes docs/models.md from the rooms, the cards and the tests' own tables; with --check, exits 1 when it is
stale. Run from the checkout's root as `python -m tools.models_docs`."""

from __future__ import annotations

import argparse
import ast
import functools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from firebox.attention.base import CacheSpec
from firebox.cache.specs import LatentSpec, PagedSpec, RecurrentSpec, WindowSpec, cache_needs
from firebox.engine.outline import make_model
from firebox.find import load, names
from firebox.formats import fp8_block
from firebox.formats.base import Format, WeightSlot
from firebox.formats.select import formats_of
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.models.base import Model
from firebox.weights.checkpoint import open_checkpoint
from firebox.weights.cuts import SIZES, working_sizes
from firebox.weights.load import chosen_slots
from tests.cpu.models import test_quantised_checkpoints as quantised
from tests.support.published import PUBLISHED, Published
from tests.support.quantise import excepting

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "models.md"
CARDS = ROOT / "src" / "firebox" / "assets" / "cards"
KINDS = {PagedSpec: "paged", WindowSpec: "window", LatentSpec: "latent", RecurrentSpec: "recurrent"}
OWN = re.compile("(cpu/(layers|models|weights)|e2e)/")  # the tests that are about models
ANNOUNCED = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
# the tests' recipes have small groups, to suit small models; published checkpoints have these
GROUPS: dict[str, dict[str, Any]] = {
    "fp8_block": {"weight_block_size": [128, 128]},
    "awq": {"group_size": 128},
    "gptq": {"group_size": 128},
}
LAYERS = 4  # cards have 3 dense ones before the first sparse one, or 3 linear ones before a full one
HEAD = """# Models and formats

<!-- Made by tools/models_docs.py from src/firebox/models, src/firebox/formats, the bundled cards and the
tests' tables. Change those, then run `python -m tools.models_docs`; `make check` fails while this file is
stale. -->

Which architectures and weight formats Firebox reads, what proves each, and where tensor parallelism may cut.
All of it runs on a CPU, where weights are dequantised when they are loaded. On an NVIDIA GPU weights stay in
their format; layers that the kernels refuse are composed of torch operators there, and the ledger says why.
"""


def document() -> str:
    """The whole of docs/models.md."""
    parts = (_architectures, _published, _formats, _kv_formats, _cards, _limits)
    return "\n".join([HEAD, *(part() for part in parts)])


# ---- architectures


def _architectures() -> str:
    rows = [
        (f"`{name}`", _checkpoints(name), ", ".join(_cache_kinds(name)), _mtp(name), _tests_of(name))
        for name in names("models")
    ]
    table = _table(("architecture", "checkpoints", "cache kinds", "MTP layers", "more tests by name"), rows)
    everywhere = ", ".join(f"`{path}`" for path in _tests_of_all())
    return f"""## Architectures

Each is one file of `src/firebox/models`, named as the checkpoint's `model_type`, and a case of every test
that runs over the room: {everywhere}.
The first of these compares with transformers, token for token and in logits, what the file's `TINY` config
gives with random weights: alone, in a batch, in chunks of every size, after a prefix hit, and when pages run
out. MTP layers that are kept are loaded and counted; no step runs them yet.

{table}
"""


def _checkpoints(name: str) -> str:
    """From the file's docstring."""
    text = " ".join((load("models", name).__doc__ or "").split())
    found = re.search(r"Checkpoints?: (.+?)\. ", text + " ")
    return found[1] if found else text.partition(",")[0].partition(". ")[0].replace("`", "")


def _tiny(name: str, **changes: Any) -> Model:
    module = load("models", name)
    text = module.TINY | module.TINY.get("text_config", {}) | changes
    model: Model = module.Model(module.Config.from_hf(text), _meta())
    return model


def _meta() -> Build:
    return Build(probe_cpu(), torch.device("meta"), torch.bfloat16, torch.bfloat16, 1)


def _cache_kinds(name: str) -> list[str]:
    specs: Iterable[CacheSpec | None] = _tiny(name).cache_specs
    found = {KINDS[type(spec)] for spec in specs if spec is not None}
    return [kind for kind in KINDS.values() if kind in found]


def _mtp(name: str) -> str:
    return "kept" if _tiny(name, **ANNOUNCED).mtp else "not read"


def _test_files() -> list[tuple[str, str]]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [(file.relative_to(ROOT / "tests").as_posix(), file.read_text(encoding="utf-8")) for file in files]


def _tests_of_all() -> list[str]:
    found = [path for path, text in _test_files() if 'names("models")' in text]
    return sorted(found, key=lambda path: "equal_transformers" not in path)


def _tests_of(name: str) -> str:
    found = [path for path, text in _test_files() if re.search(rf"\b{name}\b", text) and OWN.match(path)]
    return ", ".join(f"`{path}`" for path in found if path not in _tests_of_all())


# ---- what is published


def _published() -> str:
    rows = [_published_row(row) for row in PUBLISHED]
    table = _table(
        ("architecture", "format", "config.json says", "for example", "left in bf16", "test"), rows
    )
    return f"""## Architecture × format

In which formats checkpoints of each are published, besides unquantised (`bf16`, which the tests above run).
Every row is a test of `tests/cpu/models/test_quantised_checkpoints.py`: a `TINY` checkpoint in this format
answers with the greedy tokens of transformers on what the quantised weights mean. Router and embedding are
never quantised, the output matrix not in these tests.

{table}
"""


def _published_row(row: Published) -> tuple[str, ...]:
    if row.recipe not in quantised.BY_NAME:
        section = quantised.GPT_OSS_MXFP4
        test = quantised.test_gpt_oss_in_mxfp4.__name__
    else:
        section = quantised.BY_NAME[row.recipe].section
        test = f"[{row.id}]"
        assert row.id in _test_ids(), f"no test of {row}"
    format = formats_of({"quantization_config": section})("model.layers.0.mlp.experts.0.down_proj")
    left = ", ".join(row.plain) or "–"
    return (f"`{row.model}`", f"`{format.name}`", section["quant_method"], row.example, left, f"`{test}`")


def _test_ids() -> set[str]:
    """The cases of the test that runs the table, as pytest names them."""
    marks = quantised.test_it_answers_as_transformers_on_what_the_weights_mean.pytestmark  # type: ignore[attr-defined]
    return {mark.kwargs["ids"](row) for mark in marks for row in mark.args[1]}


# ---- formats


def _formats() -> str:
    rows = [
        (
            f"`{format.name}`",
            ", ".join(f"`{part}`" for part in format.tensors(512, 512)),
            f"{_bits(format):.4g}",
            str(format.cut_unit(0)),
            str(format.cut_unit(1)),
        )
        for format in _all_formats()
    ]
    table = _table(("format", "tensors of a weight", "bits a weight", "rows in", "columns in"), rows)
    return f"""## Formats

Each is one file of `src/firebox/formats`, here with the tensor names of each spelling; `tests/cpu/formats`
holds them against the libraries that define them. Bits are those of a weight of 512 × 512. Tensor parallelism
cuts output features (rows) and input features (columns) only at multiples of the last two numbers.

{table}
"""


def _all_formats() -> list[Format]:
    """Of each file one in each spelling, with the usual groups."""
    recipes = [{**recipe.section, **GROUPS.get(name, {})} for name, recipe in quantised.BY_NAME.items()]
    sections = [None, quantised.GPT_OSS_MXFP4, *recipes]
    found = [formats_of({"quantization_config": section})("a.weight") for section in sections]
    found = [replace(f, block=(128, 128)) if isinstance(f, fp8_block.Format) else f for f in found]
    spelt = {(format.name, *format.tensors(512, 512)): format for format in reversed(found)}
    files = {name for name, *_ in spelt}
    assert files == set(names("formats")) - {"kv", "layouts", "select"}, files
    return [spelt[key] for key in sorted(spelt)]


def _bits(format: Format) -> float:
    """A float may be stored in two sizes; scales are counted as bf16."""
    stored = sum(
        math.prod(spec.shape) * (2 if len(spec.dtypes) > 1 else spec.dtypes[0].itemsize)
        for spec in format.tensors(512, 512).values()
        if not spec.optional
    )
    return stored * 8 / 512**2


def _kv_formats() -> str:
    rows = []
    for name in names("formats.kv"):
        module = load("formats.kv", name)
        rows.append((f"`{name}`", str(module.DTYPE.itemsize), "yes" if module.SCALED else "no"))
    table = _table(("`--kv-cache-dtype`", "bytes an element", "divided by a layer's scale"), rows)
    return f"""## Formats of the KV cache

Each is one file of `src/firebox/formats/kv`; `tests/cpu/formats/test_kv.py` tests them, and
`tests/cpu/engine/test_kv_cache_dtype.py` tests `fp8` in every architecture. States of recurrent layers are
float32 with all of them.

{table}
"""


# ---- cards


def _cards() -> str:
    rows = [_card_row(folder.name) for folder in sorted(CARDS.iterdir()) if folder.is_dir()]
    columns = ("card", "architecture", "KV bytes a token, bf16", "fp8", "own format", *_columns())
    return f"""## Bundled cards: tensor-parallel sizes that work

Of {", ".join(map(str, SIZES))}, as `firebox.weights.cuts` finds them: for the card as it is, and as if it
were in each of the formats that its architecture is published in, as the table above has them (blocks of
128 × 128; groups of 128 for `awq` and `gptq`, 32 for `int4_group`, 16 for `nvfp4`; `_ct` is the spelling of
compressed-tensors). Windows and recurrent states, which do not grow with every token, are not in the bytes.

{_table(columns, rows)}
"""


def _columns() -> list[str]:
    return ["bf16", *sorted({row.recipe for row in PUBLISHED} - {"mxfp4"})]


def _card_row(name: str) -> tuple[str, ...]:
    model_type, own = _on_meta(name, None)
    formats = {slot.format.name for slot in chosen_slots(own, None) if isinstance(slot, WeightSlot)}
    kv = [cache_needs(own.cache_specs, size).full_bytes_per_token for size in (2, 1)]
    listed = {row.recipe: row for row in PUBLISHED if row.model == model_type}
    cells = []
    for column in _columns():
        if column != "bf16" and column not in listed:
            cells.append("–")
            continue
        section = {} if column == "bf16" else _section(listed[column])
        cells.append(_sizes(_on_meta(name, section)[1]))
    quantised_in = ", ".join(sorted(formats - {"bf16"})) or "bf16"
    return (name, f"`{model_type}`", *(f"{n:,}" for n in kv), f"{quantised_in}: {_sizes(own)}", *cells)


def _section(row: Published) -> dict[str, Any]:
    recipe = quantised.BY_NAME[row.recipe]
    return excepting({**recipe.section, **GROUPS.get(row.recipe, {})}, row.plain)


def _on_meta(name: str, section: Mapping[str, Any] | None) -> tuple[str, Model]:
    """A card's architecture and model; with `section` as its quantization_config, empty for none."""
    checkpoint = open_checkpoint(CARDS / name)
    if section is not None:
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        if "text_config" in config:
            inner = config["text_config"].items()
            config["text_config"] = {key: value for key, value in inner if key != "quantization_config"}
        config |= {"quantization_config": section} if section else {}
        config = _few_layers(config)
        checkpoint = replace(checkpoint, config=config)
    return checkpoint.model_type, make_model(checkpoint, _meta())


def _few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The first layers of each kind: the others have the same shapes."""
    if "text_config" in config:
        return config | {"text_config": _few_layers(config["text_config"])}
    few = {"num_hidden_layers": LAYERS, "layer_types": (config.get("layer_types") or [])[:LAYERS]}
    return config | {key: value for key, value in few.items() if config.get(key)}


def _sizes(model: Model) -> str:
    return " ".join(map(str, working_sizes(model)))


# ---- limits


def _limits() -> str:
    rows = [(f"`{name}`", "; ".join(_required(name))) for name in names("models") if _required(name)]
    return f"""## Limits

Of models that see, the language model is served; their vision towers are not read, and a request with an
image is refused with status 400. A config.json with one of these keys and another value is refused by the
key's name; so are rotary embeddings other than default and YaRN, weights in formats that are not above, and
tensors that no one claims.

{_table(("architecture", "supported values"), rows)}
"""


@functools.cache
def _required(name: str) -> list[str]:
    """From the calls `require(config, key, *values)` in the model's file."""
    tree = ast.parse(Path(load("models", name).__file__ or "").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == "require" and len(call.args) > 2:
            key, values = call.args[1], call.args[2:]
            if isinstance(key, ast.Constant) and all(isinstance(value, ast.Constant) for value in values):
                found[str(key.value)] = ", ".join(f"`{ast.unparse(value)}`" for value in values)
    return [f"`{key}` {values}" for key, values in sorted(found.items())]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """Writes the file, or checks it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not up to date"
    )
    check = parser.parse_args().check
    fresh = document()
    if check and (not TARGET.exists() or TARGET.read_text(encoding="utf-8") != fresh):
        print("docs/models.md is stale: run `python -m tools.models_docs`", file=sys.stderr)
        return 1
    if not check:
        TARGET.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
