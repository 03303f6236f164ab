"""A test that carries `sanitize("kernel", …)` names the files of src/firebox/kernels that it launches; here
it is held to that. tests/cpu/kernels/test_sanitized.py holds the names against the folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def launches_what_it_says(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("sanitize")
    if marker is None:
        yield
        return
    from firebox.kernels.launch import OBSERVERS
    from tests.support.sanitized import file_of

    launched: set[str] = set()

    def observe(compile_request: object) -> None:
        launched.add(file_of(compile_request))

    OBSERVERS.append(observe)
    yield
    OBSERVERS.remove(observe)
    missing = set(marker.args) - launched
    assert not missing, f"said to launch {sorted(missing)}; launched {sorted(launched)}"
