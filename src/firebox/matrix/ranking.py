"""Which stable cell is the fastest, as far as the measurements can tell: places with ties."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from firebox.bench.statistics import Mean, mean, tied
from firebox.matrix.base import Row


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A cell's place at one concurrency: 1 + the cells that are certainly faster. `shared`: cells that cannot
    be told from the best cell of this place share it. `tok_s`: wall throughput."""

    place: int
    shared: bool
    cell: str
    tok_s: Mean


def ranking(measured: Sequence[tuple[str, Sequence[Row]]], concurrency: int) -> tuple[Place, ...]:
    """The places at a concurrency; `measured`: cells with the rows of all their rounds."""
    values = {cell: _values(rows, concurrency) for cell, rows in measured}
    found = sorted(
        ((mean(of), cell) for cell, of in values.items() if of), key=lambda each: (-each[0].value, each[1])
    )
    groups: list[list[tuple[Mean, str]]] = []
    for each in found:
        if groups and tied(values[groups[-1][0][1]], values[each[1]]):
            groups[-1].append(each)
        else:
            groups.append([each])
    places, before = [], 0
    for group in groups:
        places += [
            Place(place=before + 1, shared=len(group) > 1, cell=cell, tok_s=middle) for middle, cell in group
        ]
        before += len(group)
    return tuple(places)


def _values(rows: Sequence[Row], concurrency: int) -> list[float]:
    """Every repetition of every round."""
    found: list[float] = []
    for row in rows:
        if row.concurrency == concurrency and row.output_tok_s_wall is not None:
            found += row.repeats or (row.output_tok_s_wall,)
    return found
