"""The self-test of a small model's whole launch plan under Triton's interpreter, on the CPU in float16, with
a fault or without, and prints what came of it as JSON.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_self_test MODEL FORMAT FAULT [strict]

FAULT: "none", or what is a tenth too large: "few" products, "experts" of many tokens, a "norm", a
gated "delta of few" tokens and its states "of chunks"; or "few raises": products of few tokens ask for more
shared memory than there is.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from firebox.engine import self_test, trials
from firebox.engine.self_test import Setup
from firebox.errors import LaunchRefused
from firebox.find import load
from firebox.formats.select import formats_of
from firebox.hardware.base import find_gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode, linear_few, moe_combine, rms_norm
from firebox.kernels.plan import Planned, Setting
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.layers.launches import layers_of, rows
from tests.support import quick_interpreter
from tests.support.small_models import small_config

META, MAX_TOKENS = torch.device("meta"), 70
QUANTISED: dict[str, dict[str, Any]] = {
    "bf16": {},
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
}
# What is broken, and the operations that are tested then: others would take their time and show nothing.
FAULTS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "few": (linear_few, "out", ("o", "head", "experts")),
    "experts": (moe_combine, "out", ("experts",)),
    "norm": (rms_norm, "out", ("norm",)),
    "few raises": (linear_few, "", ("o", "head")),
    "delta of few": (gated_delta_decode, "y", ("delta",)),
    "delta of chunks": (gated_delta_chunk, "state", ("delta",)),
}


def planned(model: str, format: str) -> Callable[[], list[Planned]]:
    """The plan as it is whenever it is asked for."""
    gpu, config = find_gpu("gb10"), small_config(model)
    config = config | config.get("text_config", {})
    if QUANTISED[format]:
        config = config | {"quantization_config": QUANTISED[format]}
    build = Build(
        gpu, META, torch.float16, torch.float16, 64, format_of=formats_of(config),
        shared=Device(gpu, META, MAX_TOKENS),
    )  # fmt: skip
    module = load("models", model)
    made = module.Model(module.Config.from_hf(config), build)
    setting = Setting(gpu, kv_dtype=torch.float16)
    layers = layers_of(made, setting)
    assert not [alike.refusal for alike in layers if alike.refusal]
    return lambda: [row for _, row in rows(layers, gpu, MAX_TOKENS)]


def break_(kernel: Any, name: str) -> None:
    """From now on everything that it writes to `name` is a tenth too large; without a name it raises."""
    run, names = kernel.run, list(inspect.signature(kernel.run).parameters)

    def wrong(*arguments: Any, **named: Any) -> None:
        if not name:
            raise OutOfResources(147_456, 101_376, "shared memory")
        run(*arguments, **named)
        (named[name] if name in named else arguments[names.index(name)]).mul_(1.1)

    kernel.run = wrong


def main(model: str, format: str, fault: str, *strict: str) -> None:
    quick_interpreter.begin()
    plan = planned(model, format)
    if fault != "none":
        kernel, name, operations = FAULTS[fault]
        break_(kernel, name)
        whole = plan
        plan = lambda: [row for row in whole() if row.operation.name in operations]  # noqa: E731
    asked: list[str] = []
    known = trials.trial_of

    def trial_of(operation: Any, setup: Setup) -> Any:
        asked.append(operation.name)
        return known(operation, setup)

    self_test.trial_of = trial_of
    setup, found = Setup(find_gpu("gb10"), torch.device("cpu"), MAX_TOKENS), dict[str, Any]()
    results: list[Any] = []
    test = self_test.test
    self_test.test = lambda rows, setup: results.append(test(rows, setup)) or results[-1]
    began = time.perf_counter()
    try:
        found["lines"] = list(self_test.self_test(plan, setup, mode="auto", strict=bool(strict)))
        found["tried"] = len(asked)
        found["again"] = list(self_test.self_test(plan, setup, mode="auto", strict=bool(strict)))
        found["tried again"] = len(asked) - found["tried"]
    except LaunchRefused as error:
        found["refused"] = str(error)
    found["seconds"] = time.perf_counter() - began
    found["errors"] = [[r.launch, r.tokens, r.error, r.limit] for r in results[0].results]
    found["untested"] = results[0].untested
    if "refused" not in found:
        found["rows"] = [
            [row.operation.name, row.op, row.first, row.last, row.path, row.why] for row in plan()
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
