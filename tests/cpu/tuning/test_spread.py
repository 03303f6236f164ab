"""Compiling over a Ray cluster of this machine alone gives what compiling here gives."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.kernels._experts import Problem
from firebox.tuning import experts
from firebox.tuning.spread import LOCAL, cluster, portable, restored, this_machine

GPU = find_gpu("gb10")
PROBLEM = Problem(512, 128, 8, 2, "mxfp4")


def test_a_request_survives_the_journey() -> None:
    task = experts.task(PROBLEM, 64)
    for candidate in experts.candidates(task, GPU):
        request = candidate.request
        assert request is not None
        again = restored(pickle.loads(pickle.dumps(portable(request))))  # noqa: S301 (our own)
        assert again == request and again.kernel is request.kernel


def test_a_cluster_compiles_what_this_machine_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [c.request for c in experts.candidates(experts.task(PROBLEM, 4), GPU)][:5]
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path / "there"))
    with cluster(LOCAL, GPU, measure=False) as places:
        there = places.compile(requests, False)  # type: ignore[arg-type]
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path / "here"))
    with this_machine(GPU, measure=False) as places:
        here = places.compile(requests, False)  # type: ignore[arg-type]
    assert all(found.error is None and found.shared_bytes > 0 for found in here)
    assert [replace(found, seconds=0.0, cached=False) for found in there] == [
        replace(found, seconds=0.0, cached=False) for found in here
    ]


def test_a_cluster_without_a_gpu_cannot_measure() -> None:
    with pytest.raises(ConfigError, match="no GPU"), cluster(LOCAL, GPU, measure=True):
        pass
