"""What benchmarks/whole_steps.py may change: every choice of a model's step that a tuned file makes, and what
is worth trying instead.

    Choice    (path, tile): tile a kernel's Config, a pair of them for experts, None where a path has none
    Spot      one entry of a file in tuned/, for one number of tokens
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import _attention_choice, _tuned, attention_decode, linear, linear_one, moe_norm_route
from firebox.kernels import attention_rope_decode as rope_kernel
from firebox.kernels._attention import Config as AttentionConfig
from firebox.kernels.plan import Operation
from firebox.layers import dense_gpu, expert_paths, norm_linear_gpu, rope_decode_gpu, route_gpu
from firebox.layers.launches import Layers
from firebox.tuning import linear as linear_tuning

Choice = tuple[str, Any]
APART = ("apart", None)


@dataclass(frozen=True)
class Spot:
    """`space`: path → its tiles, of each half for experts; `elsewhere`: what was measured, for other numbers
    of tokens too; `now`: the choice in use."""

    name: str
    file: str
    key: str
    space: dict[str, tuple[Any, ...]]
    elsewhere: tuple[Choice, ...]
    now: Choice

    def near(self, choice: Choice, most: int) -> Iterator[Choice]:
        """Other choices worth trying instead of `choice`: of its path the `most` tiles most like its own (of
        each half), and of the other paths what was measured elsewhere, or the first tiles."""
        path, tile = choice
        if self.file == "experts":
            for half in (0, 1):
                for other in alike(tile[half], self.space[path][half], most):
                    yield path, (other, tile[1]) if half == 0 else (tile[0], other)
        elif tile is not None:
            yield from ((path, other) for other in alike(tile, self.space[path], most))
        yield from (other for other in self.elsewhere if other[0] != path)
        for other, tiles in self.space.items():
            if other != path and self.file != "experts":
                yield from ((other, one) for one in spread(tiles, most))

    def entry(self, choice: Choice) -> dict[str, Any]:
        """As the file holds it."""
        path, tile = choice
        if self.file == "experts":
            halves = {name: asdict(half) for name, half in zip(("gate_up", "down"), tile, strict=True)}
            return {"path": path, **halves, "how": "measured"}
        config = {} if tile is None and path == "apart" else {"config": tile and asdict(tile)}
        return {"path": path, **config, "how": "measured"}


def distance(one: Any, other: Any) -> float:
    """How little two tiles of a kernel are alike: factors of two, added up; flags that differ count one."""
    theirs = asdict(other)
    return sum(_apart(value, theirs[name]) for name, value in asdict(one).items())


def _apart(one: Any, other: Any) -> float:
    if isinstance(one, bool) or one is None or other is None:
        return float(one != other)
    return abs(math.log2(max(one, 0.5) / max(other, 0.5)))


def alike(tile: Any, tiles: Iterable[Any], most: int) -> list[Any]:
    """The `most` nearest others."""
    others = (other for other in dict.fromkeys(tiles) if other != tile)
    return sorted(others, key=lambda other: distance(tile, other))[:most]


def spread(tiles: Sequence[Any], most: int) -> tuple[Any, ...]:
    """Up to `most` of them, evenly."""
    step = max(1, -(-len(tiles) // max(most, 1)))
    return tuple(tiles[::step])


def spots(layers: Iterable[Layers], tokens: int, gpu: Gpu) -> list[Spot]:
    """Of a model's operations, each once, for steps of `tokens` requests with one query each."""
    found: dict[tuple[str, str], Spot] = {}
    for operation in itertools.chain.from_iterable(one.operations for one in layers):
        for spot in _of(operation, tokens, gpu):
            found.setdefault((spot.file, spot.key), spot)
    return list(found.values())


def _of(operation: Operation, tokens: int, gpu: Gpu) -> Iterator[Spot]:
    p, source = operation.problem, operation.source
    if source is dense_gpu and type(operation) is Operation:
        path = dense_gpu.path_of(p, tokens, gpu)
        yield _spot(
            operation,
            "linear",
            dense_gpu.key(p),
            _linear_space(p, tokens, gpu),
            (path.name, path.config),
            gpu,
        )
    elif source is norm_linear_gpu and tokens == 1:
        tile, space = norm_linear_gpu.config_of(p, gpu, 1), tuple(linear_one.search_space(p.linear, gpu))
        now = ("one", tile) if tile else APART
        yield _spot(operation, "linear", norm_linear_gpu.key(p), {"one": space, "apart": (None,)}, now, gpu)
    elif source is route_gpu and tokens == 1:
        tile, space = route_gpu.config_of(p, gpu, 1), tuple(moe_norm_route.search_space(p.kernel, gpu))
        now = ("one", tile) if tile else APART
        yield _spot(operation, "route", route_gpu.key(p), {"one": space, "apart": (None,)}, now, gpu)
    elif source is rope_decode_gpu:
        yield from _attention(operation, tokens, gpu)
    elif source is expert_paths:
        path = expert_paths.path_of(p, tokens, gpu)
        space = {
            name: tuple(tuple(half.search_space(p, tokens, gpu)) for half in expert_paths.MODULES[name])
            for name in {
                path.name,
                expert_paths.FEW,
                expert_paths.SORTED,
                *((expert_paths.ONE,) if tokens == 1 else ()),
            }
        }
        now = (path.name, (path.gate_up, path.down))
        yield _spot(operation, "experts", expert_paths.key(p), space, now, gpu)


def _linear_space(p: Any, tokens: int, gpu: Gpu) -> dict[str, tuple[Any, ...]]:
    task, space = linear_tuning.task(p, tokens), dict[str, list[Any]]()
    for candidate in linear_tuning.candidates(task, gpu):
        space.setdefault(candidate.path, []).append(candidate.config)
    return {path: tuple(tiles) for path, tiles in space.items()}


def _attention(operation: Operation, tokens: int, gpu: Gpu) -> Iterator[Spot]:
    """Rotation with attention in one launch, and attention alone."""
    both, paged = operation.problem, operation.problem.paged
    tile, kind = rope_decode_gpu.config_of(both, gpu, tokens), rope_decode_gpu.KIND
    space = {kind: tuple(rope_kernel.search_space(both, gpu)), "apart": (None,)}
    key = _attention_choice.key(kind, paged)
    yield _spot(operation, "attention", key, space, (kind, tile) if tile else APART, gpu)
    decode = _attention_choice.DECODE
    usual = _attention_choice.decode_config(paged, gpu, 1, tokens)
    tiles = {decode: tuple(attention_decode.search_space(paged, gpu, 1))}
    yield _spot(operation, "attention", _attention_choice.key(decode, paged), tiles, (decode, usual), gpu)


def _spot(
    operation: Operation, file: str, key: str, space: dict[str, tuple[Any, ...]], now: Choice, gpu: Gpu
) -> Spot:  # fmt: skip
    elsewhere = dict.fromkeys(_stored(entry, file) for entry in _tuned.entries(gpu.name, file, key))
    usable = tuple(choice for choice in elsewhere if choice[0] in space)
    return Spot(operation.name, file, key, space, usable, now)


def _stored(entry: dict[str, Any], file: str) -> Choice:
    path = entry["path"]
    if file == "experts":
        halves = zip(expert_paths.MODULES[path], ("gate_up", "down"), strict=True)
        return path, tuple(module.Config(**entry[part]) for module, part in halves)
    if entry.get("config") is None:
        return path, None
    if file == "attention":
        return path, AttentionConfig(**entry["config"])
    module = {"route": moe_norm_route}.get(file) or {**dense_gpu.MODULES, "many": linear}[path]
    return path, module.Config(**entry["config"])
