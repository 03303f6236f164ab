"""Runs kernels/moe_norm_route.py under Triton's interpreter and prints as JSON: `cases`, {case: what
tests/support/norm_route.py finds}; `layer`, what becomes of one token in a layer of a small gpt-oss.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_norm_route
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from firebox.engine.trials import Setup, trial_of
from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned, _veto, launch
from firebox.kernels import moe_norm_route as kernel
from firebox.kernels.moe_norm_route import Config
from firebox.kernels.plan import Operation
from firebox.layers import route_gpu
from firebox.layers._in_one import ONE
from firebox.weights.checkpoint import open_checkpoint
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.interpreted_model import CPU, Recorded
from tests.support.norm_route import compare, in_type
from tests.support.small_models import write_small

TILES = (Config(8, 4), Config(16, 1))  # rows behind the last expert too
GPU = find_gpu("gb10")


def cases() -> dict[str, Any]:
    found = {}
    for number, case in enumerate(kernel.CASES):
        for config in TILES:
            found[f"{number} {config}"] = compare(in_type(case, "f16"), GPU, number, "cpu", config)
    return found


def layer(folder: Path) -> dict[str, Any]:
    """Launches and outputs of one token and of two: without a measurement, with one, and with a veto."""
    block = Recorded(open_checkpoint(write_small(folder, "gpt_oss")), GPU, torch.float16).model.blocks[0][1]
    problem, _ = block._kernels._in_one
    x = torch.randn(2, block.problem.hidden, generator=torch.Generator().manual_seed(0)).half()
    launched: list[str] = []
    launch.OBSERVERS.append(lambda request: launched.append(request.kernel.__name__))

    def run(tokens: int) -> tuple[torch.Tensor, list[str]]:
        launched.clear()
        return block(x[:tokens].clone()), list(launched)

    apart, three = run(1)
    entry = {"path": ONE, "config": asdict(Config(2, 2))}
    tuned = folder / "tuned" / _tuned.folder(GPU.name)
    tuned.mkdir(parents=True)
    (tuned / "route.json").write_text(json.dumps({route_gpu.key(problem): {"1": entry}}))
    _tuned.use(folder / "tuned")
    together, one = run(1)
    again, _ = run(1)
    trial = trial_of(Operation("norm_route", "f16", route_gpu, problem), Setup(GPU, CPU, 2))
    assert trial is not None
    found = {"three": three, "one": one, "two tokens": run(2)[1], "error": relative_error(together, apart)}
    found |= {"again": bool(torch.equal(together, again)), "trial": _told(trial(1)), "of two": trial(2)}
    run_kernel = kernel.run

    def wrong(*arguments: Any, **named: Any) -> None:
        run_kernel(*arguments, **named)
        named["routing_weights"].mul_(1.1)

    kernel.run = wrong
    results = trial(1)
    kernel.run = run_kernel
    choice = next(result.choice for result in results if not result.passed)
    assert choice is not None
    _veto.veto(choice, "a tile that was off")
    return found | {"wrong": _told(results), "vetoed": run(1)[1]}


def _told(results: list[Any]) -> list[Any]:
    return [[result.launch, result.error, result.passed] for result in results]


def main() -> None:
    quick_interpreter.begin()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print(json.dumps({"cases": cases(), "layer": layer(Path(folder))}))


if __name__ == "__main__":
    main()
