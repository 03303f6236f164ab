from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from firebox.errors import CheckpointError
from firebox.text.defaults import sampling_defaults
from firebox.text.folder import bundled, resolve_folder


def test_folder_wins_over_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "firebox-tiny").mkdir()
    (tmp_path / "firebox-tiny" / "config.json").write_text("{}")
    assert resolve_folder("firebox-tiny") == tmp_path / "firebox-tiny"


def test_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = resolve_folder("firebox-tiny")
    assert folder.is_absolute()
    assert (folder / "tokenizer.json").is_file()
    assert folder == bundled()["firebox-tiny"]


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    for name, sentence in [
        (str(tmp_path), r"has no config\.json"),
        (str(tmp_path / "file"), "is a file"),
        ("no-such-model", "there is no model 'no-such-model'"),
        ("a/b/c", "there is no model"),
    ]:
        with pytest.raises(CheckpointError, match=sentence) as caught:
            resolve_folder(name)
        assert caught.value.hint


def test_hub_id_comes_from_the_cache_and_else_from_the_network(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    calls: list[bool] = []

    def cached(model: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        calls.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert resolve_folder("org/model") == tmp_path
    assert calls == [True], "a cached model must not ask the network"

    def not_cached(model: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        return cached(model, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    assert resolve_folder("org/model") == tmp_path


def test_hub_id_without_cache_and_network(monkeypatch):
    def offline(model: str, **options: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: cannot reach the hub$") as caught:
        resolve_folder("org/model")
    assert "give a folder" in (caught.value.hint or "")


def test_sampling_defaults(tmp_path: Path):
    assert sampling_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_k": 20, "top_p": null, "do_sample": true, "eos_token_id": 1}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        sampling_defaults(tmp_path)
