from __future__ import annotations

import itertools
import random
from collections import Counter

from firebox.matrix.cells import Cell, cells, order
from firebox.matrix.spec import parse

TEXT = """
command = "serve --port {port} {moe} {graph} {ep}"
[axes]
moe = ["a", "b", "c"]
graph = ["off", "full", "piecewise"]
ep = [1, 2, 4, 8]
[repeat]
rounds = ROUNDS
seed = SEED
"""


def spec_of(rounds: int = 1, seed: int = 0, more: str = ""):
    return parse(TEXT.replace("ROUNDS", str(rounds)).replace("SEED", str(seed)) + more)


def order_of(spec) -> list[Cell]:
    known = {cell.id: cell for cell in cells(spec)}
    return [known[cell] for cell, _ in order(spec, tuple(known.values()))]


def discrepancy(turns: list[Cell]) -> float:
    """The most by which any value is ahead of or behind its share of the cells so far."""
    share = Counter(item for cell in turns for item in cell.axes.items())
    had, worst = Counter(), 0.0
    for done, cell in enumerate(turns, start=1):
        had.update(cell.axes.items())
        worst = max(worst, *(abs(had[item] - share[item] * done / len(turns)) for item in share))
    return worst


def test_every_cell_comes_once_a_round():
    spec = spec_of(rounds=3)
    turns = order(spec, cells(spec))
    assert len(turns) == 3 * 36
    assert set(Counter(turns).values()) == {1}
    for number in range(3):
        assert len({cell for cell, at in turns if at == number}) == 36
    assert [at for _, at in turns] == sorted(at for _, at in turns), "a round ends before the next begins"


def test_no_value_is_ever_far_ahead_of_its_share():
    ours = [discrepancy(order_of(spec_of(seed=seed))) for seed in range(20)]
    planned = list(cells(spec_of()))
    shuffled = [discrepancy(random.Random(seed).sample(planned, 36)) for seed in range(20)]
    assert max(ours) < 2.0, ours
    assert sum(ours) < 0.6 * sum(shuffled), "no better than chance"


def test_no_cell_is_favoured_by_its_place():
    """Over many seeds a cell's mean place is the middle: 4 standard errors for the worst of 36 cells."""
    seeds, places = 300, Counter()
    for seed in range(seeds):
        for place, cell in enumerate(order_of(spec_of(seed=seed))):
            places[cell.id] += place
    error = (36**2 / 12) ** 0.5 / seeds**0.5
    assert all(abs(total / seeds - 17.5) < 4 * error for total in places.values()), places


def test_rounds_differ_and_repetitions_are_not_back_to_back():
    spec = spec_of(rounds=4)
    turns = [cell for cell, _ in order(spec, cells(spec))]
    rounds = [turns[i : i + 36] for i in range(0, 144, 36)]
    assert len({tuple(each) for each in rounds}) == 4
    two = parse('command = "x {port} {a}"\n[axes]\na = [1, 2]\n[repeat]\nrounds = 30')
    pair = [cell for cell, _ in order(two, cells(two))]
    assert all(first != second for first, second in itertools.pairwise(pair))


def test_the_seed_decides_the_order():
    assert order_of(spec_of(seed=1)) == order_of(spec_of(seed=1)) != order_of(spec_of(seed=2))


def test_an_id_is_stable_and_says_its_values():
    ids = [cell.id for cell in cells(spec_of())]
    assert len(set(ids)) == 36
    assert ids == [cell.id for cell in cells(spec_of(rounds=5, seed=9))], "rounds and seed change no result"
    assert ids[0].startswith("moe-a_graph-off_ep-1~")


def test_what_changes_results_changes_ids():
    ids = {cell.id for cell in cells(spec_of())}
    changed = ("[load]\noutput_tokens = 64", "[limits]\nstart_s = 5", '[environment]\nX = "1"')
    for more in changed:
        assert not ids & {cell.id for cell in cells(spec_of(more=more))}, more
    other = parse(TEXT.replace("serve", "serve2").replace("ROUNDS", "1").replace("SEED", "0"))
    assert not ids & {cell.id for cell in cells(other)}
    assert ids == {cell.id for cell in cells(spec_of(more="[limits]\nstop_s = 3"))}


def test_another_value_of_an_axis_leaves_the_other_cells_alone():
    ids = {cell.id for cell in cells(spec_of())}
    more = parse(TEXT.replace("[1, 2, 4, 8]", "[1, 2, 4, 8, 16]").replace("ROUNDS", "1").replace("SEED", "0"))
    assert ids < {cell.id for cell in cells(more)}
