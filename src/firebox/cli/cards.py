"""`firebox cards`: the models that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def cards(as_json: Annotated[bool, typer.Option("--json", help="one JSON document")] = False) -> None:
    """Lists the bundled models and model cards; a card has a config but no weights."""
    from firebox.text.folder import bundled

    rows = [describe(folder) for folder in bundled().values()]
    if as_json:
        print(json.dumps({"cards": rows}))
        return
    print(f"{'name':28} {'model_type':14} {'layers':>6} {'experts':>7}  weights")
    for row in rows:
        weights = "yes" if row["has_weights"] else "no"
        print(f"{row['name']:28} {row['model_type']:14} {row['layers']:6} {row['experts']:7}  {weights}")


def describe(folder: Path) -> dict[str, Any]:
    """A bundled model in five fields. Multimodal configs keep the language model's numbers one level down."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = {**config, **config.get("text_config", {})}
    return {
        "name": folder.name,
        "model_type": config["model_type"],
        "layers": text["num_hidden_layers"],
        "experts": next((text[name] for name in EXPERTS if name in text), 0),
        "has_weights": any(folder.glob("*.safetensors")),
    }
