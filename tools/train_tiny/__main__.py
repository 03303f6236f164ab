"""`python -m tools.train_tiny`: prepares, trains, evaluates, writes the card; `--stage` does one of these."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from tools.train_tiny.spec import ASSET, WORK, Recipe, Sizes

STAGES = ("prepare", "train", "evaluate", "card")


def main() -> None:
    options = parse()
    sizes, recipe = Sizes(), replace(Recipe(), **dict(options.set))
    for stage in [options.stage] if options.stage else STAGES:
        if stage == "prepare":
            from tools.train_tiny.prepare import prepare

            prepare(sizes)
        elif stage == "train":
            from tools.train_tiny.train import train

            train(sizes, recipe, options.device, options.out)
        elif stage == "evaluate":
            evaluate_folder(options.out, options.device)
        else:
            from tools.train_tiny.card import write_card

            write_card(options.out)


def evaluate_folder(folder: Path, device: str) -> None:
    """Measures `folder` and writes evaluation.json into the work folder."""
    from tools.train_tiny.evaluate import evaluate

    paths = json.loads((WORK / "corpus.json").read_text())["held_out_paths"]
    figures = evaluate(folder, dict(np.load(WORK / "tokens.npz")), paths, device)
    (WORK / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="do only this stage (default: all, in order)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ASSET, help="the model folder to write or measure")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field of Recipe",
    )
    return parser.parse_args()


def setting(text: str) -> tuple[str, int | float]:
    """'steps=100' → ('steps', 100), typed like the Recipe's field."""
    name, _, value = text.partition("=")
    kinds = {field.name: type(field.default) for field in fields(Recipe)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"no recipe field '{name}'; fields: {', '.join(kinds)}")
    return name, kinds[name](value)


if __name__ == "__main__":
    main()
