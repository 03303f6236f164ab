"""A report as JSON, as `firebox bench --json` prints it and as the store keeps it."""

from __future__ import annotations

from typing import Any

import msgspec

from firebox.bench.report.base import Report

DIGITS = 4


def document(report: Report) -> dict[str, Any]:
    """Everything but the answers. Numbers have DIGITS significant ones more than any clock justifies."""
    rows = [_rounded(msgspec.to_builtins(row)) for row in report.rows]
    return {
        "url": report.url,
        "model": report.model,
        "profile": report.profile,
        "firebox": report.firebox,
        "began": report.began,
        "seed": report.seed,
        "passed": report.passed,
        "notes": report.notes,
        "rows": rows,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value
