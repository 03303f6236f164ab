"""Results on disk, one file a key. A file that is not what was written counts as absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class ResultCache:
    """JSON documents in `folder`, which is made when the first one is written. Several processes may share
    it.

    <folder>/<key>.json    line 1: SHA-256 of line 2; line 2: the document
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> dict[str, Any] | None:
        """The document of `key`; None where there is none, or (said in the log) none that is whole."""
        path = self.folder / f"{key}.json"
        try:
            digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            digest = text = ""
        if digest != _digest(text):
            _log.warning("%s is damaged; it is made again", path)
            return None
        document: dict[str, Any] = json.loads(text)
        return document

    def write(self, key: str, document: dict[str, Any]) -> None:
        """Stores the document. Who reads meanwhile sees the old one or the new one, never a part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".new", delete=False) as file:
            file.write(f"{_digest(text)}\n{text}")
        os.replace(file.name, self.folder / f"{key}.json")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
