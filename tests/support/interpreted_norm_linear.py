"""What becomes of one token and of two in an attention layer of a small Qwen3, under Triton's interpreter:
launches and outputs without a measurement of norm and projection in one launch, with one, and with a veto; as
JSON.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_norm_linear
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
from firebox.kernels import _tuned, _veto, launch, linear_one
from firebox.kernels.linear_one import Config
from firebox.kernels.plan import Operation
from firebox.layers import norm_linear_gpu
from firebox.layers._in_one import ONE
from firebox.weights.checkpoint import open_checkpoint
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.interpreted_model import CPU, Recorded
from tests.support.small_models import write_small

GPU = find_gpu("gb10")


def layer(folder: Path) -> dict[str, Any]:
    block = Recorded(open_checkpoint(write_small(folder, "qwen3_moe")), GPU, torch.float16).model.blocks[0][0]
    kernels = block._run
    problem = kernels._projects
    x = torch.randn(2, block.problem.hidden, generator=torch.Generator().manual_seed(0)).half()
    launched: list[str] = []
    launch.OBSERVERS.append(lambda request: launched.append(request.kernel.__name__))

    def run(tokens: int) -> tuple[torch.Tensor, list[str]]:
        launched.clear()
        return kernels._projected(x[:tokens]), list(launched)

    apart, two = run(1)
    entry = {"path": ONE, "config": asdict(Config(2, 2))}
    tuned = folder / "tuned" / _tuned.folder(GPU.name)
    tuned.mkdir(parents=True)
    (tuned / "linear.json").write_text(json.dumps({norm_linear_gpu.key(problem): {"1": entry}}))
    _tuned.use(folder / "tuned")
    together, one = run(1)
    found = {"two": two, "one": one, "two tokens": run(2)[1], "error": relative_error(together, apart)}
    trial = trial_of(Operation("norm_qkv", "f16", norm_linear_gpu, problem), Setup(GPU, CPU, 2))
    assert trial is not None
    found |= {"trial": _told(trial(1)), "of two": trial(2)}
    run_kernel = linear_one.run

    def wrong(launcher: Any, problem: Any, x: Any, weights: Any, residual: Any, out: Any, gain: Any) -> None:
        run_kernel(launcher, problem, x, weights, residual, out, gain * 1.1)

    linear_one.run = wrong
    results = trial(1)
    linear_one.run = run_kernel
    assert results[0].choice is not None
    _veto.veto(results[0].choice, "a tile that was off")
    return found | {"wrong": _told(results), "vetoed": run(1)[1]}


def _told(results: list[Any]) -> list[Any]:
    return [[result.launch, result.error, result.passed] for result in results]


def main() -> None:
    quick_interpreter.begin()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        print(json.dumps(layer(Path(folder))))


if __name__ == "__main__":
    main()
