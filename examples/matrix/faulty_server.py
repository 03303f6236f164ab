"""A Firebox server that fails in a chosen way: what examples/matrix/firebox-cpu-faults.toml starts.

    python faulty_server.py --moe triton --graph piecewise --attention paged --ep 1 --port 30000

It stands for a server whose configurations are not all sound. Which axis values fail, and how, is FAULTS;
the first line that fits wins, and where none fits the bundled model is served as it is. Messages are those
that real servers print.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from firebox.answer import Answer, Piece
from firebox.cli.main import main as firebox

SHARED_MEMORY = (
    "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: "
    "101376. Reducing block sizes or `num_stages` may help."
)
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of "
    "31.36 GiB of which 1.12 GiB is free."
)
NCCL = (
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3"
)
PTXAS = "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"
AFTER_PIECES = 3  # a crash in the middle of a request: so many pieces have been sent
LOOPS = (
    ("in this", " village", " the river", " runs slowly", " and "),
    ("my brother", " never", " closed", " the window", ", so "),
    ("whoever", " counted", " these", " apples", " was wrong, "),
    ("a letter", " from", " the ministry", " arrived", " again, "),
)
Fault = Callable[[], None]


def crash(message: str) -> Fault:
    """Ends at the start, with a traceback."""

    def fault() -> None:
        print('Traceback (most recent call last):\n  File "worker.py", line 1, in run')
        print(message, flush=True)
        sys.exit(1)

    return fault


def illegal_instruction() -> None:
    """Ends by SIGILL, without a word."""
    os.kill(os.getpid(), signal.SIGILL)


def slow_start() -> None:
    """Loads for longer than anybody waits."""
    time.sleep(3600)


def engine_dies() -> None:
    """The engine process dies in the middle of an answer, with the message that names why."""

    def after(answer: Answer, piece: Piece) -> Piece:
        if len(answer.ids) > AFTER_PIECES:
            print(SHARED_MEMORY, flush=True)
            _kill_engine()
        return piece

    _change_pieces(after)


def hang() -> None:
    """Takes requests, and never sends a token."""
    Answer.__anext__ = _never  # type: ignore[method-assign]


def garbage() -> None:
    """Streams exclamation marks, as fast as text."""
    _change_pieces(lambda answer, piece: piece._replace(text="!" * len(piece.ids)))


def repetition() -> None:
    """Says the same over and over, in each answer something else."""
    chosen: dict[Answer, tuple[str, ...]] = {}  # the answers themselves: an id may come back
    loops = itertools.cycle(LOOPS)

    def instead(answer: Answer, piece: Piece) -> Piece:
        if answer not in chosen:
            chosen[answer] = next(loops)
        words, at = chosen[answer], len(answer.ids)
        return piece._replace(text="".join(words[(at + i) % len(words)] for i in range(len(piece.ids))))

    _change_pieces(instead)


def no_word() -> None:
    """Ends, and does not say why."""
    sys.exit(3)


FAULTS: tuple[tuple[dict[str, str], Fault], ...] = (
    ({"graph": "piecewise"}, crash(SHARED_MEMORY)),
    ({"moe": "cutlass", "ep": "2"}, garbage),
    ({"attention": "flash", "ep": "2"}, crash(NCCL)),
    ({"moe": "marlin", "graph": "full"}, repetition),
    ({"attention": "flash", "graph": "full"}, engine_dies),
    ({"attention": "flash", "moe": "triton"}, slow_start),
    ({"attention": "flash", "moe": "cutlass"}, hang),
    ({"attention": "flash", "moe": "marlin"}, illegal_instruction),
    ({"moe": "marlin", "ep": "2"}, crash(OUT_OF_MEMORY)),
    ({"moe": "triton", "graph": "decode", "ep": "2"}, crash(PTXAS)),
    ({"moe": "marlin", "graph": "decode"}, no_word),
)


def main(arguments: Sequence[str]) -> None:
    """Fails as the axis values say, or serves."""
    parser = argparse.ArgumentParser()
    for axis in ("moe", "graph", "attention", "ep"):
        parser.add_argument(f"--{axis}", required=True)
    values, serve = parser.parse_known_args(arguments)
    for when, fault in FAULTS:
        if all(getattr(values, axis) == value for axis, value in when.items()):
            fault()
            break
    sys.argv = ["firebox", "serve", *serve]
    firebox()


def _change_pieces(change: Callable[[Answer, Piece], Piece]) -> None:
    original = Answer._take

    def take(answer: Answer, deltas: list) -> Piece:  # type: ignore[type-arg]
        return change(answer, original(answer, deltas))

    Answer._take = take  # type: ignore[method-assign]


async def _never(answer: Answer) -> Piece:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets that event")


def _kill_engine() -> None:
    """This process' child: the engine."""
    with open(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/children") as children:
        for pid in children.read().split():
            os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
