"""Which folder a model's name means."""

from __future__ import annotations

import re
from pathlib import Path

from firebox.errors import CheckpointError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def bundled() -> dict[str, Path]:
    """The models in the package by name: `firebox-tiny` with weights, and cards (a config and a tokenizer at
    most).
    """
    folders = [ASSETS / "firebox-tiny", *sorted((ASSETS / "cards").glob("*"))]
    return {folder.name: folder for folder in folders if (folder / "config.json").is_file()}


def resolve_folder(model: str) -> Path:
    """An existing folder, a bundled name, or a Hugging Face id in the local cache, which is downloaded if it
    is not there.

    Returns an absolute path with a config.json in it; raises CheckpointError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _with_config(path.resolve())
    if model in bundled():
        return bundled()[model]
    if path.exists():
        raise CheckpointError(f"{model} is a file", hint="MODEL is the folder that holds config.json")
    if _HUB_ID.fullmatch(model):
        return _with_config(_from_hub(model))
    raise CheckpointError(
        f"there is no model {model!r}",
        hint=f"a folder, a Hugging Face id such as zai-org/GLM-4.5-Air, or one of: {', '.join(bundled())}",
    )


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json", hint="MODEL is a folder in Hugging Face's layout"
        )
    return folder


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download  # only here: most starts never need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES), local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} is not in the local Hugging Face cache and cannot be downloaded: {_first_line(error)}",
            hint="download it where there is a network (hf download), or give a folder",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
