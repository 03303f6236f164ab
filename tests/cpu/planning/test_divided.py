"""Experts divided among GPUs, and decode steps with drafts: what is planned, counted and said of both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from firebox.config import EngineConfig
from firebox.errors import ConfigError
from firebox.hardware.base import find_gpu
from firebox.kernels._experts import Problem
from firebox.kernels.plan import Operation, Setting
from firebox.layers.launches import Layers, rows, workspace_bytes
from firebox.planning.fit import Fit, plan
from tests.support.planning import opened

GB10 = find_gpu("gb10")


def divided(card: str, tp: int, ep: int, drafts: int = 0, **engine: int) -> Fit:
    return plan(opened(card), GB10, tp, EngineConfig(**engine), ep=ep, drafts=drafts)


def operation(fit: Fit, name: str) -> Operation:
    (found,) = {o for layers in fit.layers for o in layers.operations if o.name == name}
    return found


def weights(fit: Fit, name: str) -> int:
    assert fit.memory is not None
    return fit.memory.weights[name]


@pytest.mark.parametrize(
    ("tp", "ep", "experts", "inter", "times"),
    [(4, 1, 160, 384, 1), (4, 2, 80, 768, 1), (4, 4, 40, 1536, 1), (2, 8, 20, 1536, 4), (1, 4, 40, 1536, 4)],
)
def test_where_experts_go(tp: int, ep: int, experts: int, inter: int, times: int) -> None:
    """GLM-4.7 has 160 experts of 1536 columns, of which a token takes 8, and a shared one, which is one more
    of them only where all are in one place. Tokens of all groups meet at the experts."""
    found = divided("glm-4.7-fp8", tp, ep)
    fused = int(ep == 1)
    routed = operation(found, "experts")
    sizes = (5120, inter, experts + fused, 8 + fused)
    assert routed.problem == Problem(*sizes, "fp8_channel", residual=True, shared=fused, normed=ep == 1)
    assert routed.times == times
    last = {row.operation.name: row.last for _, row in rows(found.layers, GB10, 100)}
    assert (last["experts"], last["qkv"]) == (100 * times, 100)
    names = [o.name for layers in found.layers if layers.op == "moe_block" for o in layers.operations]
    assert ("shared_down" in names) is (ep > 1)
    assert operation(found, "o").problem.columns == 96 * 128 // tp


def test_a_gpu_keeps_its_experts_whole_and_its_share_of_the_rest() -> None:
    """On four GPUs either way; a quarter of GLM's rows and of its experts differ in the scales of down, 5120
    for each expert that is there."""
    cut, whole, apart = (
        divided("glm-4.7-fp8", 4, 1),
        divided("glm-4.7-fp8", 4, 4),
        divided("glm-4.7-fp8", 1, 4),
    )
    down_scales = 89 * 4 * 5120
    assert weights(cut, "experts") - weights(whole, "experts") == (160 - 40) * down_scales
    assert weights(whole, "experts") == weights(apart, "experts")
    assert weights(whole, "attention") == weights(cut, "attention")
    assert weights(apart, "attention") == weights(divided("glm-4.7-fp8", 1, 1), "attention")
    assert cut.memory is not None and apart.memory is not None
    assert apart.memory.cache.per_token == 4 * cut.memory.cache.per_token
    assert [fit.setting.gpus for fit in (cut, whole, apart)] == [4, 4, 4]


def test_the_workspace_holds_the_tokens_of_all_groups() -> None:
    routed = operation(divided("glm-4.7-fp8", 1, 4), "experts")
    alone = Layers("moe_block", 1, "fp8_channel", (dataclasses.replace(routed, times=1),))
    together = Layers("moe_block", 1, "fp8_channel", (routed,))
    assert workspace_bytes([together], GB10, 256) == workspace_bytes([alone], GB10, 1024)
    assert workspace_bytes([together], GB10, 256) > 2 * workspace_bytes([alone], GB10, 256)


def test_the_roof_reads_the_same_share_of_experts() -> None:
    """With requests of their own, each of four GPUs reads all of the attention, and a quarter of the
    caches."""
    cut, whole, apart = (divided("gpt-oss-120b", *sizes).roof for sizes in ((2, 1), (2, 2), (1, 4)))
    assert cut is not None and whole is not None and apart is not None
    assert whole.steps[64].weights == pytest.approx(cut.steps[64].weights, rel=0.001)
    assert whole.steps[64].cache == cut.steps[64].cache
    one = divided("gpt-oss-120b", 1, 1).roof
    assert one is not None
    assert (apart.steps[64].cache, apart.steps[1].cache) == (one.steps[64].cache // 4, one.steps[1].cache)
    assert apart.gpus == 4 and apart.steps[64].weights < one.steps[64].weights / 3


def test_gpt_oss_on_four_gpus_has_its_experts_divided() -> None:
    """A quarter of 2,880 columns is no whole number of groups and grows; whole experts need no cut."""
    cut, found = divided("gpt-oss-120b", 4, 1), divided("gpt-oss-120b", 4, 4)
    assert cut.fits and found.fits and found.working_tp == (1, 2, 4, 8, 16)
    assert cut.memory is not None and found.memory is not None
    assert cut.memory.weights["experts"] > 1.03 * found.memory.weights["experts"]
    assert found.planned_only == ("--ep 4: the engine does not divide experts among GPUs yet",)
    document = found.document()
    assert (document["ep"], document["gpus"], document["tp"]) == (4, 4, 4)
    assert document["planned_only"] == list(found.planned_only)
    groups = divided("gpt-oss-120b", 1, 4).planned_only[0]
    assert groups.endswith("budgets and memory are those of one of 4 groups of requests")


def test_a_division_that_is_none() -> None:
    assert divided("gpt-oss-120b", 1, 5).problems == ("--tp 1 --ep 5: 128 experts / 5 is not a whole number",)
    for tp, ep, drafts, sentence in (
        (4, 3, 0, "--tp 4 with --ep 3"), (1, 0, 0, "--ep 0"), (1, 1, 16, "--num-drafts 16"),
        (1, 1, -1, "--num-drafts -1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            divided("gpt-oss-120b", tp, ep, drafts)


# ---- drafts


@pytest.mark.parametrize("card", ["glm-4.7-fp8", "gpt-oss-120b", "kimi-k2.5-int4"])
def test_attention_with_drafts_is_planned_beside_the_other(card: str) -> None:
    """Every layer that attends: the same problem, with trees."""
    without = [o for layers in divided(card, 1, 1).layers for o in layers.operations]
    found = [o for layers in divided(card, 1, 1, 3).layers for o in layers.operations]
    plain = [o.problem for o in without if o.name == "attention"]
    trees = [o.problem for o in found if o.name == "attention with drafts"]
    assert trees and trees == [dataclasses.replace(problem, tree=True) for problem in plain]
    assert [o for o in found if o.name != "attention with drafts"] == without


def test_a_step_of_all_requests_with_their_drafts_is_planned() -> None:
    many = {"max_running_requests": 1000, "max_batch_tokens": 1000}
    assert divided("gpt-oss-120b", 1, 1, 15, **many).max_tokens == 16_000
    assert divided("gpt-oss-120b", 1, 1, 1, **many).max_tokens == 8192
    with_drafts, without = (divided("gpt-oss-120b", 1, 1, n, **many).memory for n in (15, 0))
    assert with_drafts is not None and without is not None
    logits = 2 * 15 * 1000 * 201_088 * 4
    assert with_drafts.workspace_bytes > without.workspace_bytes + logits


def test_drafts_are_tried_on_copies_of_states() -> None:
    one, two = (divided("qwen3.5-397b-a17b-nvfp4", 4, 1, n).memory for n in (0, 2))
    assert one is not None and two is not None and two.cache.state > 0
    assert two.requests_bytes - one.requests_bytes == two.running_requests * two.cache.state
    said = divided("qwen3.5-397b-a17b-nvfp4", 4, 1, 2)
    assert said.planned_only == (
        "--num-drafts 2: the engine does not check drafts yet; what makes them is left out",
    )
    assert said.document()["num_drafts"] == 2 and divided("gpt-oss-20b", 1, 1).planned_only == ()


def test_a_setting_without_either_is_what_it_was() -> None:
    setting = Setting(GB10, 4, torch.bfloat16)
    assert (setting.gpus, setting.expert_tp, setting.groups) == (4, 4, 1)
