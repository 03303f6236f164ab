"""The launch plan before the port opens: everything that steps of 1 … max_batch_tokens tokens can launch on
an NVIDIA GPU, compiled for that GPU and read back, before any weight is loaded. A choice of which a launch
does not compile or fit is vetoed (kernels/_veto.py), and the plan is made again with the next candidate.
Under --strict, and where there is none, it is refused with its numbers.

Compiles run in processes of their own, one a core; their results and their binaries are kept on disk, so that
a warm start reads them.

Measured: 2 cores, Triton 3.9.0, 2026-11-21, for an H200 at 2,048 tokens: gpt-oss-120b has 79 compiles, 23 s
cold and 0.3 s warm; glm-4.7-fp8 has 70, 19 s cold and 0.7 s warm (0.6 s of which is the model's outline).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from firebox.errors import LaunchRefused
from firebox.kernels import _veto
from firebox.layers.decoder import Decoder

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels.plan import Setting
    from firebox.layers.launches import Launch

log = logging.getLogger(__name__)


def compile_plan(
    model: Decoder, setting: Setting, max_tokens: int, *, strict: bool
) -> tuple[tuple[Launch, ...], list[str]]:
    """All launches of `model`, which may be on the meta device, compiled; and a line for each choice that was
    replaced. Raises LaunchRefused."""
    from firebox.layers.launches import launches, layers_of

    began, replaced = time.perf_counter(), list[str]()
    log.info("compiling the launch plan for %s, where it has not been", setting.gpu.name)
    while True:
        found = launches(layers_of(model, setting), setting.gpu, max_tokens, keep_binaries=True)
        misfits = [launch for launch in found if launch.misfit]
        if not misfits or strict or not all(map(_is_replaceable, misfits)):
            break
        replaced += _veto_all(misfits)
    refuse(found, strict=strict)
    log.info("%s, in %.1f s", summary(found), time.perf_counter() - began)
    return found, replaced


def _is_replaceable(launch: Launch) -> bool:
    """Could another candidate run? Not where the veto changed nothing."""
    choice = launch.planned.compile.choice
    return choice is not None and _veto.why_not(choice) is None


def _veto_all(misfits: Sequence[Launch]) -> Iterator[str]:
    """A line for each choice."""
    for launch in misfits:
        planned, choice = launch.planned, launch.planned.compile.choice
        if choice is None or _veto.why_not(choice) is not None:
            continue
        config = planned.compile.config
        tile = planned.path if config is None else f"{planned.path} with {config}"
        _veto.veto(choice, f"{tile}, {launch.misfit} at {planned.first} tokens")
        line = f"launch plan: not {tile}, because {launch.problem}"
        log.warning("%s", line)
        yield line


def refuse(found: Sequence[Launch], *, strict: bool) -> None:
    """LaunchRefused for the first launch that does not compile or asks for more shared memory than a block
    gets; under `strict` for one that does without its tensor instruction, too."""
    problems = [launch.problem for launch in found if launch.problem]
    if problems:
        hint = (
            "a tile that fits: firebox tune, or without the entry in tuned/ that asks for this one; see fit"
        )
        raise LaunchRefused(f"{problems[0]}{_more(problems)}", hint=hint)
    emulated = [launch.emulation for launch in found if launch.emulation]
    if strict and emulated:
        hint = "without --strict it runs, slower than its format promises"
        raise LaunchRefused(f"--strict: {emulated[0]}{_more(emulated)}", hint=hint)


def summary(found: Sequence[Launch]) -> str:
    """One line of reason for --explain."""
    ours = [launch.compiled for launch in found if launch.compiled is not None]
    most = max(ours, key=lambda compiled: compiled.shared_bytes, default=None)
    new = sum(not compiled.cached for compiled in ours)
    text = f"launch plan: {len(ours)} launches compiled and read back, {new} of them new"
    if most is None:
        return text
    return (
        f"{text}; the most shared memory is {most.shared_bytes} of {most.limit_bytes} bytes ({most.kernel})"
    )


def _more(sentences: Sequence[str]) -> str:
    further = len(dict.fromkeys(sentences)) - 1
    return f", and {further} more" if further else ""
