"""Tiles by whole steps of the engine, on one NVIDIA GPU: a launch that is fastest alone may keep the memory
from its neighbours, or leave it idle for them, which no bench of one launch shows.

    PYTHONPATH=src:. python benchmarks/whole_steps.py MODEL --out DIR [--tokens 1] [--layers 12]
        [--seconds 300] [--near 6] [--only NAME,…] [--requantize fp8]

The engine runs so many requests of random weights, cut to --layers, behind a prompt of 128. One choice of the
tuned files after the other (--only: those of these operations) is changed to what is most like it, and to
other paths; what makes a step faster stays, until nothing does or the time is over. A choice is compared by
the median step, and one that seems faster is measured again, and the best so far with it. DIR gets every
measurement (steps.jsonl) and what is changed in the end, as files that FIREBOX_CACHE_DIR/tuned may hold;
correctness is for `--self-test on` and for tests/gpu.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from _step_spots import Choice, Spot, spots

from firebox.bench import offline
from firebox.bench._offline import Settings
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _tuned
from firebox.kernels.plan import Setting
from firebox.layers.launches import layers_of
from firebox.planning._parts import Source, open_source
from firebox.text.folder import resolve_folder
from firebox.weights.checkpoint import open_checkpoint

CONTEXT, STEPS, PAGE_TOKENS = 128, 128, 64
MARGIN = 0.003  # of a step, below which two are alike

Choices = dict[tuple[str, str], Choice]
Measure = Callable[[Choices], float]


def descend(
    all_spots: Sequence[Spot],
    measure: Measure,
    near: int,
    in_time: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[Choices, float]:
    """What differs from the choices in use in the end, and the milliseconds of a step with it. Raises
    RuntimeError if the choices in use do not run."""
    best: Choices = {}
    least = measure(best)
    if math.isinf(least):
        raise RuntimeError("the step as it is does not run; steps.jsonl says why")
    say(f"{least:.4f} ms as it is")
    better = True
    while better and in_time():
        better = False
        for spot in all_spots:
            at, tried = (spot.file, spot.key), set[Choice]()
            for choice in spot.near(best.get(at, spot.now), near):
                if choice in tried or not in_time():
                    continue
                tried.add(choice)
                ms = measure({**best, at: choice})
                if ms < least * (1 - MARGIN) and measure({**best, at: choice}) < measure(best) * (1 - MARGIN):
                    say(f"{ms:.4f} ms with {spot.name} by {choice[0]} {choice[1]}")
                    best, least, better = {**best, at: choice}, ms, True
    return best, least


def write(folder: Path, gpu: Gpu, all_spots: Sequence[Spot], choices: Choices, tokens: int) -> None:
    """The files of the changed choices, for so many tokens."""
    entries = {(spot.file, spot.key): spot for spot in all_spots}
    files: dict[str, dict[str, Any]] = {}
    for (file, key), choice in choices.items():
        files.setdefault(file, {})[key] = {str(tokens): entries[file, key].entry(choice)}
    here = folder / _tuned.folder(gpu.name)
    here.mkdir(parents=True, exist_ok=True)
    for old in here.glob("*.json"):
        old.unlink()
    for file, content in files.items():
        (here / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def forget() -> None:
    """All that was derived from tuned files; what has been compiled is found again on disk."""
    for name, module in list(sys.modules.items()):
        if name.startswith("firebox"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


class Steps:
    """The engine, made again for every measurement."""

    def __init__(self, settings: Settings, gpu: Gpu, folder: Path, log: TextIO) -> None:
        self._settings, self._gpu, self._folder, self._log = settings, gpu, folder, log
        self._roots = _tuned.roots()
        self.spots: list[Spot] = []

    def __call__(self, choices: Choices) -> float:
        """Milliseconds of a median step; infinite if it does not run."""
        tokens, began = max(self._settings.batches), time.monotonic()
        write(self._folder, self._gpu, self.spots, choices, tokens)
        forget()
        _tuned.use(*self._roots, self._folder)
        found, why = math.inf, ""
        try:
            report = offline.measure(self._settings)
            found = min((row.ms_per_token for row in report.decode if row.void is None), default=math.inf)
            why = "".join([*(row.void or "" for row in report.decode), *(r.why for r in report.not_measured)])
        except Exception as error:  # noqa: BLE001 (a tile that does not compile, or not fit, is no candidate)
            why = f"{type(error).__name__}: {error}"[:300]
        row = {"ms": found, "why": why, "s": round(time.monotonic() - began, 2)}
        row["changed"] = [[*at, str(choice)] for at, choice in choices.items()]
        print(json.dumps(row), file=self._log, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return found


def settings_of(model: str, tokens: int, layers: int, requantize: str) -> Settings:
    """Of `firebox bench offline` for one row of decode, without a profile. Raises ConfigError."""
    weights = ModelConfig(
        str(resolve_folder(model)),
        load_format="dummy",
        dtype="bfloat16",
        layers=layers,
        requantize=requantize,
    )
    engine = EngineConfig(
        self_test="off", page_tokens=PAGE_TOKENS, max_batch_tokens=2048, prefill_chunk_tokens=2048
    )
    sizes: dict[str, Any] = {"batches": [tokens], "contexts": [CONTEXT], "prefills": [], "tokens": STEPS}
    return Settings(config=Config(weights, engine), name=model, profile=False, **sizes)


def model_spots(settings: Settings, tokens: int, gpu: Gpu) -> list[Spot]:
    """Of the settings' model as it is cut, in bf16 with pages of 64."""
    checkpoint = open_checkpoint(Path(settings.config.model.model))
    in_fp8 = settings.config.model.requantize == "fp8"
    source = Source(settings.name, checkpoint.model_type, checkpoint.text_config, "bfloat16", None, in_fp8)
    return spots(
        layers_of(open_source(source, gpu).model, Setting(gpu, page_tokens=PAGE_TOKENS)), tokens, gpu
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("tokens", 1), ("layers", 12), ("near", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", default="", help="operations, with commas between")
    parser.add_argument("--requantize", default="none", choices=("none", "fp8"))
    arguments = parser.parse_args()
    gpu = probe_gpu()
    if gpu is None:
        sys.exit("error: this needs an NVIDIA GPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + arguments.seconds
    settings = settings_of(arguments.model, arguments.tokens, arguments.layers, arguments.requantize)
    with (arguments.out / "steps.jsonl").open("a", encoding="utf-8") as log:
        steps = Steps(settings, gpu, arguments.out / "trial", log)
        every = model_spots(settings, arguments.tokens, gpu)
        steps.spots = [s for s in every if not arguments.only or s.name in arguments.only.split(",")]
        best, least = descend(steps.spots, steps, arguments.near, lambda: time.monotonic() < ends, print)
    write(arguments.out / "tuned", gpu, steps.spots, best, arguments.tokens)
    print(f"{least:.4f} ms with {len(best)} choices changed, in {arguments.out / 'tuned'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
