"""Stage `card`: README.md of the model folder, every figure taken from the JSON files of the other stages."""

from __future__ import annotations

import json
from pathlib import Path

from tools.train_tiny.spec import WORK

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(folder: Path) -> None:
    """Writes README.md into `folder`."""
    corpus, training, measured = (
        json.loads((WORK / f"{name}.json").read_text()) for name in ("corpus", "training", "evaluation")
    )
    recipe, last = training["recipe"], training["history"][-1]
    file_share = 1 - recipe["chat_share"]
    values = {
        **corpus,
        **recipe,
        **measured,
        "hardware": training["hardware"],
        "torch": training["torch"],
        "evaluate_torch": measured["torch"],
        "seconds": round(training["seconds"]),
        "tokens_per_s": training["tokens_per_s"],
        "tokens_millions": round(training["tokens"] / 1e6),
        "epochs": round(training["tokens"] * file_share / corpus["training_tokens"]),
        "distinct": measured["parameters"],
        "stored_millions": f"{measured['stored_parameters'] / 1e6:.2f}",
        "megabytes": f"{measured['weights_bytes'] / 1e6:.1f}",
        "chat_percent": round(100 * recipe["chat_share"]),
        "long_percent": round(100 * recipe["long_share"]),
        "repeat_percent": round(100 * recipe["repeat_start"]),
        "busiest": last["busiest_expert"],
        "train_loss": last["train_main"],
        "probe_loss": last["held_out_main"],
        "samples": "\n".join(_sample(sample) for sample in measured["samples"]),
    }
    (folder / "README.md").write_text(TEMPLATE.read_text(encoding="utf-8").format(**values), encoding="utf-8")


def _sample(sample: dict) -> str:
    asked = "chat" if sample["prompt"].startswith("Write") else "completion"
    ending = "ends by itself" if sample["ended"] else "cut at 160 tokens"
    return f"{asked}, {ending}: `{sample['prompt'].strip()}`\n```python\n{sample['text'].rstrip()}\n```"
