"""The cells of a grid: combinations of axis values less those skipped, and the order in which they run.

Time favours nobody: a machine gets warmer, a page cache fuller, a neighbour busier. So each round has its own
random order, in which every value of every axis is spread evenly over the round: at any point, each value has
had nearly its share of the cells so far. Repetitions of a cell are in different rounds, never back to back.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from firebox.errors import ConfigError
from firebox.matrix.spec import Scalar, Setting, Spec, skips

Turn = tuple[str, int]  # a cell's id, and the round


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration. `id`: readable, and a hash of all that its result depends on, so that a changed
    specification finds no old results. `argv` and `env` still say {port}."""

    id: str
    axes: Mapping[str, Scalar]
    argv: tuple[str, ...]
    env: Mapping[str, str]


def cells(spec: Spec) -> tuple[Cell, ...]:
    """All combinations that no constraint leaves out, in the order of the axes. Raises ConfigError if none
    is left."""
    constraints = skips(spec)
    found = []
    for settings in itertools.product(*spec.axes.values()):
        chosen = dict(zip(spec.axes, settings, strict=True))
        values = {axis: setting.name for axis, setting in chosen.items()}
        if not any(skip.holds(values) for skip in constraints):
            found.append(_cell(spec, chosen))
    if not found:
        raise ConfigError("the constraints skip every cell", hint="; ".join(spec.skips))
    return tuple(found)


def order(spec: Spec, planned: Sequence[Cell]) -> tuple[Turn, ...]:
    """Every cell once a round."""
    turns: list[Turn] = []
    for number in range(spec.repeat.rounds):
        cells_of_round = _spread(planned, random.Random(f"{spec.repeat.seed}/{number}"))
        if turns and len(cells_of_round) > 1 and cells_of_round[0].id == turns[-1][0]:
            cells_of_round[0], cells_of_round[1] = cells_of_round[1], cells_of_round[0]
        turns += [(cell.id, number) for cell in cells_of_round]
    return tuple(turns)


def _cell(spec: Spec, chosen: Mapping[str, Setting]) -> Cell:
    argv = _argv(spec.command, chosen)
    env = dict(spec.environment)
    for setting in chosen.values():
        env.update(setting.env)
    limits = (spec.limits.start_s, spec.limits.cell_s, spec.limits.silence_s)
    matters = msgspec.json.encode([argv, sorted(env.items()), spec.health, spec.load, limits])
    words = [re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{axis}-{value.name}") for axis, value in chosen.items()]
    return Cell(
        id=f"{'_'.join(words)}~{hashlib.sha256(matters).hexdigest()[:8]}",
        axes={axis: setting.name for axis, setting in chosen.items()},
        argv=argv,
        env=env,
    )


def _argv(command: Sequence[str], chosen: Mapping[str, Setting]) -> tuple[str, ...]:
    argv: list[str] = []
    for part in command:
        whole = chosen.get(part[1:-1]) if part.startswith("{") and part.endswith("}") else None
        argv += whole.flags if whole is not None and whole.text is None else [_with_texts(part, chosen)]
    for axis, setting in chosen.items():
        if f"{{{axis}}}" not in command:
            argv += setting.flags
    return tuple(argv)


def _with_texts(part: str, chosen: Mapping[str, Setting]) -> str:
    for axis, setting in chosen.items():
        part = part.replace(f"{{{axis}}}", setting.text or "")
    return part


def _spread(planned: Sequence[Cell], random_: random.Random) -> list[Cell]:
    """Always the cell whose values are furthest behind their share; chance decides among equals."""
    left = random_.sample(list(planned), len(planned))
    share = Counter((axis, value) for cell in planned for axis, value in cell.axes.items())
    had: Counter[tuple[str, Scalar]] = Counter()
    turns: list[Cell] = []
    while left:
        done = (len(turns) + 1) / len(planned)
        ahead = {value: had[value] + 1 - share[value] * done for value in share}
        chosen = min(left, key=lambda cell: sum(ahead[item] for item in cell.axes.items()))
        left.remove(chosen)
        turns.append(chosen)
        had.update(chosen.axes.items())
    return turns
