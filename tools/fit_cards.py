"""`firebox fit` for every bundled card on the GPUs and tensor-parallel sizes that people run, in one table:

    python tools/fit_cards.py [--gpu gb10 …] [--rows-only] [--fitting-only]

memory        GiB of KV cache that are left on one GPU, "no" with what is missing, or why it cannot be cut
refused       layers that no kernels run
launches      rows of the plan, and the compiles that they share
misfits       launches that do not compile or need more shared memory than there is
emulated      launches that do without the tensor instruction they are written for
spilled       the most bytes that a thread spills in any launch, and where

--rows-only compiles nothing; --fitting-only only what fits the memory. Compiles are cached in
FIREBOX_CACHE_DIR: about 20 s a cell of a cold cache on two cores, 1 s of a warm one. Exit status 1 if a layer
is refused, or a launch does not fit or is emulated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from firebox.cli._fit_model import source_of
from firebox.config import EngineConfig
from firebox.hardware.base import find_gpu
from firebox.kernels._blocks import MOE_BLOCK
from firebox.layers.launches import Launch, rows
from firebox.planning.fit import Fit, Opened, compiled, open_source, plan
from firebox.planning.memory import GIB
from firebox.text.folder import bundled

SIZES = {
    "gb10": (1, 2, 4),
    "rtx-pro-6000-server": (1, 4, 8),
    "rtx-5090": (1, 2, 4, 8),
    "h200": (1, 4, 8),
}
COMPUTES_IN_FLOAT32 = "firebox-tiny"
HEADINGS = ("card", "GPU", "tp", "memory", "refused", "launches", "misfits", "emulated", "spilled")


def main() -> int:
    """Prints the table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rows-only", action="store_true")
    parser.add_argument("--fitting-only", action="store_true")
    asked = parser.parse_args()
    print(_line(HEADINGS), _line(["---"] * len(HEADINGS)), sep="\n")
    sound = True
    for fit in _fits(asked.gpu):
        has_memory = fit.memory is not None and fit.memory.fits
        found = fit if asked.rows_only or (asked.fitting_only and not has_memory) else compiled(fit)
        print(_line(_cells(found)), flush=True)
        sound = (
            sound
            and not _refused(found)
            and all(row.fits and not row.emulated for row in found.launches or ())
        )
    return 0 if sound else 1


def _fits(gpus: list[str]) -> Iterator[Fit]:
    opened: dict[str, Opened] = {}
    for name in gpus:
        gpu = find_gpu(name)
        for card in bundled():
            if card == COMPUTES_IN_FLOAT32:
                continue
            if card not in opened:
                opened[card] = open_source(source_of(card, "auto"), gpu)
            for tp in SIZES[name]:
                yield plan(opened[card], gpu, tp, EngineConfig())


def _cells(fit: Fit) -> Iterator[str]:
    yield from (fit.source.name, fit.gpu.name, str(fit.tp), _memory(fit), _refused(fit) or "none")
    if fit.refusal is not None:
        yield from ("–",) * 4
        return
    planned = [row for _, row in rows(fit.layers, fit.gpu, fit.max_tokens)]
    ours = [row.request for row in planned if row.request is not None]
    yield f"{len(planned)}, {len({repr(request) for request in ours})} compiles"
    if fit.launches is None:
        yield from ("not compiled",) * 3
        return
    yield _names([row for row in fit.launches if not row.fits])
    yield _names([row for row in fit.launches if row.emulated])
    yield _spilled(fit.launches)


def _memory(fit: Fit) -> str:
    if fit.memory is None:
        return str(fit.refusal).partition("; ")[0]
    if not fit.memory.fits:
        return f"no: {fit.memory.missing_bytes / GIB:.0f} GiB are missing"
    return f"{fit.memory.kv_tokens * fit.memory.cache.per_token / GIB:.1f}"


def _refused(fit: Fit) -> str:
    """All layers of any kind; of experts it is an answer of fit that the model does not run."""
    refused = (layers for layers in fit.layers if layers.refusal is not None)
    return "; ".join(f"{'experts' if e.op == MOE_BLOCK else e.op}: {e.refusal}" for e in refused)


def _names(launches: list[Launch]) -> str:
    return ", ".join(dict.fromkeys(_name(launch) for launch in launches)) or "none"


def _name(launch: Launch) -> str:
    return f"{launch.planned.operation.name}: {launch.planned.op}"


def _spilled(launches: tuple[Launch, ...]) -> str:
    worst = max(launches, key=lambda launch: launch.compiled.spill_bytes if launch.compiled else 0)
    spilled = worst.compiled.spill_bytes if worst.compiled else 0
    return f"{spilled} ({_name(worst)})" if spilled else "0"


def _line(cells: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
