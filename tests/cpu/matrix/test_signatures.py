"""Every known failure is recognised in a line as its program prints it, and by no entry before its own; lines
that only look like failures are not taken for any."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import pytest

from firebox.matrix.base import Verdict
from firebox.matrix.classify import match, signatures

FOUND = tomllib.loads((Path(__file__).parent / "log_lines.toml").read_text(encoding="utf-8"))
LINES, HARMLESS = FOUND["failures"], FOUND["healthy"]["lines"]


@pytest.mark.parametrize("name", LINES)
def test_a_real_line_is_recognised_by_its_own_entry(name):
    found = match(LINES[name])
    assert found is not None
    assert found[0].name == name


@pytest.mark.parametrize("line", HARMLESS)
def test_what_only_looks_like_a_failure_is_none(line):
    found = match(line)
    assert found is None, found


def test_every_entry_has_a_line_here_and_all_it_needs():
    known = [signature for signature, _ in signatures()]
    assert set(LINES) == {signature.name for signature in known}
    assert len(known) >= 40
    assert max(Counter(signature.name for signature in known).values()) == 1
    for signature in known:
        address = urlparse(signature.source)
        assert address.scheme == "https" and address.netloc == "github.com", signature.name
        assert address.path.split("/")[3] in ("issues", "pull"), signature.name
        assert signature.cause and signature.remedy, signature.name
        assert signature.verdict not in (Verdict.STABLE, Verdict.INFEASIBLE), signature.name


def test_the_verdicts_that_a_log_can_show_all_occur():
    shown = {signature.verdict for signature, _ in signatures()}
    assert shown >= {
        Verdict.OUT_OF_SHARED_MEMORY,
        Verdict.ILLEGAL_INSTRUCTION,
        Verdict.OUT_OF_MEMORY,
        Verdict.COMPILE_ERROR,
        Verdict.NCCL,
        Verdict.HANG,
    }
