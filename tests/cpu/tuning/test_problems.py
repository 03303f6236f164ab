"""Which problems a model has, and that none is listed that no kernel here runs."""

from __future__ import annotations

import pytest
import torch

from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.kernels._attention import Problem as Layer
from firebox.kernels._attention_choice import DECODE, EXTEND
from firebox.kernels._linear import Problem
from firebox.kernels.plan import Library, Operation, Setting
from firebox.layers import dense_gpu
from firebox.layers.launches import Layers, layers_of
from firebox.tuning import attention, experts, linear
from firebox.tuning.problems import MODULES, problems_of
from tests.support.planning import opened

GB10, H200 = find_gpu("gb10"), find_gpu("h200")


def layers(card: str, tp: int = 1) -> tuple[Layers, ...]:
    return layers_of(opened(card).model, Setting(GB10, tp))


def keys(card: str, tp: int = 1, ops: str = "all") -> list[str]:
    return [f"{m.OP}: {m.task(p, 1).key}" for m, p in problems_of(layers(card, tp), ops)]


def test_glm_on_four_gpus() -> None:
    heads = "bfloat16 kv=bfloat16 heads=24 kv_heads=2 head_dim=128 value_dim=128 page_tokens=64"
    assert keys("glm-4.7-fp8", 4) == [
        "experts: fp8_channel hidden=5120 inter=384 experts=161 top_k=9",
        "linear: fp8_channel rows=3584 columns=5120",
        "linear: fp8_channel rows=5120 columns=3072",
        "linear: fp8_channel rows=6144 columns=5120",
        "linear: bf16 rows=160 columns=5120",
        "linear: bf16 rows=37888 columns=5120",
        f"attention: decode {heads}",
        f"attention: extend {heads}",
    ]


def test_gpt_oss() -> None:
    """Attention with a window and without."""
    heads = "bfloat16 kv=bfloat16 heads=64 kv_heads=8 head_dim=64 value_dim=64 page_tokens=64"
    assert keys("gpt-oss-120b") == [
        "experts: mxfp4_nibbles hidden=2880 inter=2880 experts=128 top_k=4",
        "linear: bf16 rows=5120 columns=2880",
        "linear: bf16 rows=2880 columns=4096",
        "linear: bf16 rows=128 columns=2880",
        "linear: bf16 rows=201088 columns=2880",
        *(
            f"attention: {kernel} {heads} {m}"
            for m in ("window sinks", "sinks")
            for kernel in (DECODE, EXTEND)
        ),
    ]
    windows = {p.layer.window: p.window_tokens for _, p in problems_of(layers("gpt-oss-120b"), "attention")}
    assert windows == {True: attention.WINDOW_TOKENS, False: 0}


def test_the_gpu_decides_how_weights_lie() -> None:
    """opened() builds the model for one GPU; a format that only others hold in nibbles is asked for by the
    setting."""
    found = layers_of(opened("gpt-oss-120b").model, Setting(H200))
    ((_, problem),) = problems_of(found, "moe")
    assert problem.format == "mxfp4"


@pytest.mark.parametrize(("op", "module"), [("moe", experts), ("linear", linear), ("attention", attention)])
def test_one_operation(op: str, module: object) -> None:
    some, everything = problems_of(layers("glm-4.7-fp8", 4), op), problems_of(layers("glm-4.7-fp8", 4))
    assert some == [(m, p) for m, p in everything if m is module] and some


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ConfigError, match="--op norms") as refused:
        problems_of((), "norms")
    assert refused.value.hint == "there are: moe, linear, attention, all"


def test_what_torch_runs_is_not_tuned() -> None:
    ours = Operation("o", "bf16", dense_gpu, Problem(64, 128, "bf16"))
    library = Library("qkv", "bf16", dense_gpu, "needs columns a multiple of 16")
    refused = Layers("moe_block", 3, "bf16", refusal="no kernel")
    found = problems_of((Layers("attention_block", 3, "bf16", (library, ours)), refused))
    assert found == [(linear, ours.problem)]


def test_problems_that_share_a_key_are_one() -> None:
    first, second = Problem(64, 128, "bf16", bias=True), Problem(64, 128, "bf16", residual=True)
    operations = tuple(Operation(name, "bf16", dense_gpu, p) for name, p in (("a", first), ("b", second)))
    assert problems_of((Layers("attention_block", 1, "bf16", operations),)) == [(linear, first)]


def test_every_problem_has_candidates_where_its_kernel_serves() -> None:
    numbers = {1, 64, 4096}
    for module, problem in problems_of(layers("glm-4.7-fp8", 4)):
        tasks = (module.task(problem, n) for n in sorted(numbers))
        served = {task.tokens for task in tasks if next(module.candidates(task, GB10), None) is not None}
        kernel = getattr(problem, "kernel", None)
        assert served == ({1, 64} if kernel == DECODE else {64, 4096} if kernel == EXTEND else numbers)


def test_modules_and_files_are_each_others_only() -> None:
    assert len({m.OP for m in MODULES.values()}) == len({m.FILE for m in MODULES.values()}) == len(MODULES)
    (wide,) = {p.context_tokens for p in attention.problems(Layer(8, 1, 128, 128, 16, torch.bfloat16))}
    assert wide == attention.CONTEXT_TOKENS
