"""A tolerance that a broken kernel could pass is a defect: every kernel's own check, under Triton's
interpreter, finds nothing wrong with it as it is, and something with a fault in its device code."""

from __future__ import annotations

import pytest

from tests.support.interpreted_faults import GROUPS
from tests.support.interpreter import interpreted
from tests.support.sanitized import kernel_files


@pytest.mark.parametrize("group", GROUPS)
def test_each_fault_is_found_and_nothing_else(group: str) -> None:
    found = interpreted("interpreted_faults", group)
    assert len(found) == sum(len(faults) for _, faults in GROUPS[group])
    for fault, sound, broken in found:
        assert not sound, (fault, sound)
        assert broken, fault


def test_every_kernel_has_a_fault() -> None:
    files = {fault.file for looks in GROUPS.values() for _, faults in looks for fault in faults}
    assert files >= kernel_files(), kernel_files() - files
