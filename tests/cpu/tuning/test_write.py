"""Files in tuned/: what joins what, and that kernels read what was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned
from firebox.kernels._experts import Problem
from firebox.layers.expert_paths import MODULES, path_of, requests
from firebox.tuning import experts
from firebox.tuning.base import Candidate, Option
from firebox.tuning.entries import MEASURED, PREDICTED, Entry
from firebox.tuning.write import folder_of, merge

PROBLEM = Problem(1024, 256, 16, 4, "fp8_channel")
GPU = find_gpu("gb10")


def entry(tokens: int, how: str, problem: Problem = PROBLEM, warps: int = 4, path: str = "few") -> Entry:
    task = experts.task(problem, tokens)
    parts = {
        part: next(
            c
            for c in experts.candidates(task, GPU)
            if (c.path, c.part) == (path, part) and c.config.warps == warps
        )
        for part in experts.PARTS
    }
    return Entry(task, Option(path, parts, 12.345), how)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    _tuned.use(tmp_path)
    yield tmp_path
    _tuned.use()


def write(folder: Path, *entries: Entry) -> Path:
    path = folder_of(folder, GPU.name) / experts.FILE
    merge(path, experts, entries)  # type: ignore[arg-type]
    _tuned.use(folder)
    return path


def test_kernels_read_what_was_written(folder: Path) -> None:
    assert path_of(PROBLEM, 4, GPU).why.startswith("default")
    one = entry(4, PREDICTED)
    path = write(folder, one)
    found = path_of(PROBLEM, 4, GPU)
    assert found.why.startswith("predicted") and found.name == "few"
    assert found.gate_up == one.option.parts["gate_up"].config
    assert found.down == one.option.parts["down"].config
    about = json.loads(path.read_text())[_tuned.ABOUT]
    assert set(about) == {"triton", "date", "commit"} and all(about.values())


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "mxfp4"])
def test_one_tokens_own_tiles_are_read_for_one_token_and_only_measured(format: str, folder: Path) -> None:
    problem = replace(PROBLEM, format=format)
    task = experts.task(problem, 1)
    found: dict[str, list[Candidate]] = {part: [] for part in experts.PARTS}
    for candidate in experts.candidates(task, GPU):
        if candidate.path == "one":
            assert candidate.unproven, "or a prediction could name it"
            found[candidate.part].append(candidate)
    parts = {part: tiles[-1] for part, tiles in found.items()}
    own = Entry(task, Option("one", parts, 9.0), MEASURED)
    write(folder, own, entry(4, MEASURED, problem, warps=2))
    path = path_of(problem, 1, GPU)
    assert (path.name, path.gate_up, path.down) == ("one", *(parts[part].config for part in experts.PARTS))
    launched = requests(problem, 1, path, GPU)
    assert launched == {f"moe_{part}": candidate.request for part, candidate in parts.items()}
    assert path_of(problem, 2, GPU).name == "few"
    other = replace(problem, hidden=2048)  # others take the nearest, of whatever path it is
    write(folder, replace(own, task=experts.task(other, 1)), entry(16, MEASURED, other, path="sorted"))
    two = path_of(other, 2, GPU)
    assert (two.name, two.why.split(",")[0]) == ("sorted", "measured")
    assert not any(c.path == "one" for c in experts.candidates(experts.task(problem, 2), GPU))


def test_other_problems_stay_and_a_prediction_replaces_no_measurement(folder: Path) -> None:
    other = Problem(2048, 256, 16, 4, "fp8_channel")
    write(folder, entry(4, MEASURED))
    write(folder, entry(8, PREDICTED, other), entry(4, PREDICTED, warps=2))
    assert path_of(PROBLEM, 4, GPU).why.startswith("measured")
    assert path_of(PROBLEM, 4, GPU).gate_up.warps == 4
    assert path_of(other, 8, GPU).why.startswith("predicted")
    write(folder, entry(4, MEASURED, warps=2))
    assert path_of(PROBLEM, 4, GPU).gate_up.warps == 2


def test_no_prediction_of_this_machine_stands_in_for_a_measurement_of_the_package(tmp_path: Path) -> None:
    package, here = tmp_path / "package", tmp_path / "here"
    write(package, entry(4, MEASURED))
    write(here, entry(4, PREDICTED, warps=2))
    _tuned.use(package, here)
    assert path_of(PROBLEM, 4, GPU).gate_up.warps == 4
    write(here, entry(4, MEASURED, warps=2))
    _tuned.use(package, here)
    assert path_of(PROBLEM, 4, GPU).gate_up.warps == 2
    _tuned.use()


def test_entries_of_this_machine_reach_from_their_fewest_to_their_most_tokens(tmp_path: Path) -> None:
    package, here = tmp_path / "package", tmp_path / "here"
    write(package, *(entry(tokens, MEASURED) for tokens in (1, 4, 8, 64)))
    write(here, entry(2, MEASURED, warps=2), entry(8, MEASURED, warps=2))
    _tuned.use(package, here)
    warps = {tokens: path_of(PROBLEM, tokens, GPU).gate_up.warps for tokens in (1, 2, 4, 8, 64)}
    assert warps == {1: 4, 2: 2, 4: 2, 8: 2, 64: 4}
    _tuned.use()


def test_an_entry_says_nothing_of_a_prompt_that_is_much_longer(folder: Path) -> None:
    write(folder, entry(1, MEASURED), entry(2, MEASURED))
    near, far = (path_of(PROBLEM, tokens, GPU).why for tokens in (2 * _tuned.REACH, 2 * _tuned.REACH + 1))
    assert near.startswith("measured") and far.startswith("default")


def test_a_file_is_replaced_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, entry(4, MEASURED))
    before = path.read_text()

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        merge(path, experts, [entry(8, MEASURED)])  # type: ignore[arg-type]
    assert path.read_text() == before


def test_what_is_shipped_can_be_read_and_says_how_it_was_found() -> None:
    package = Path(_tuned.__file__).parents[1] / "tuned"
    files = sorted(package.glob("*/experts.json"))
    assert {path.parent.name for path in files} >= {"nvidia_h200", "nvidia_gb10", "nvidia_rtx_5090"}
    for path in files:
        document = json.loads(path.read_text())
        about = document.pop(_tuned.ABOUT, None)
        here = path.parent.name == "nvidia_h200"
        for key, entries in document.items():
            for tokens, entry in entries.items():
                for part, module in zip(experts.PARTS, MODULES[entry["path"]], strict=True):
                    module.Config(**entry[part])  # type: ignore[attr-defined]
                assert _tuned.how(entry) == ("measured" if here else "predicted"), (key, tokens)
        assert about is not None and set(about) == {"triton", "date", "commit"}
