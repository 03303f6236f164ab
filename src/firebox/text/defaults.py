"""The sampling that a checkpoint's makers recommend: generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from firebox.errors import CheckpointError

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, float]:
    """The values of `NAMES` that generation_config.json sets; a request's own value always wins. Empty
    without the file.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return {name: content[name] for name in NAMES if content.get(name) is not None}
