"""Layers against their formulas in float64 and against transformers' own modules with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeMoE,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as glm_rotary
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb as qwen_rotary

from firebox.find import load, names
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.linear import Linear
from firebox.layers.moe import MoeBlock
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import rotary_tables, rotate
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

GLM = load("models", "glm4_moe").TINY
QWEN = load("models", "qwen3_moe").TINY
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> Build:
    return Build(probe_cpu(), CPU, dtype, dtype, max_positions=64, **settings)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (found.double() - expected.double()).pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt()
    )


# ---- norm


@pytest.mark.parametrize("module", [Glm4MoeRMSNorm, Qwen3MoeRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(module: type[torch.nn.Module], dtype: torch.dtype, eps: float) -> None:
    """Bit for bit as transformers computes it, and as the formula says."""
    norm, reference = RMSNorm(build(dtype), 48, eps), module(48, eps=eps).to(dtype)
    norm.weight.copy_(1 + normal(48, scale=0.3))
    reference.load_state_dict({"weight": norm.weight})
    x = (normal(7, 3, 48) * normal(7, 1, 1, scale=10)).to(dtype)
    found = norm(x)
    assert found.dtype == dtype and torch.equal(found, reference(x))
    wide = x.double()
    formula = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    assert relative_error(found, formula) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_rms_norm_of_zeros_is_zero() -> None:
    norm = RMSNorm(build(), 8, 1e-6)
    norm.weight.fill_(2.0)
    assert torch.equal(norm(torch.zeros(2, 8)), torch.zeros(2, 8))


# ---- rotary embedding


@pytest.mark.parametrize("partial", [0.5, 1.0, 0.25])
def test_rotary_as_glm4_moe_in_transformers(partial: float) -> None:
    config = AutoConfig.for_model(**GLM | {"partial_rotary_factor": partial})
    config.rope_parameters["partial_rotary_factor"] = partial
    _compare_rotary(Glm4MoeRotaryEmbedding(config), glm_rotary, int(32 * partial), 10000.0)


def test_rotary_as_qwen3_moe_in_transformers() -> None:
    _compare_rotary(Qwen3MoeRotaryEmbedding(AutoConfig.for_model(**QWEN)), qwen_rotary, 32, 1000000.0)


def _compare_rotary(embedding: torch.nn.Module, apply: Any, rotary_dim: int, theta: float) -> None:
    positions = torch.tensor([0, 1, 2, 17, 300, 511])
    q, k = normal(6, 4, 32), normal(6, 2, 32)
    reference_cos, reference_sin = embedding(q, positions.unsqueeze(0))
    expected_q, expected_k = apply(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), reference_cos, reference_sin
    )
    cos, sin = (table[positions].unsqueeze(1) for table in rotary_tables(512, rotary_dim, theta, CPU))
    assert torch.equal(rotate(q, cos, sin), expected_q[0].transpose(0, 1))
    assert torch.equal(rotate(k, cos, sin), expected_k[0].transpose(0, 1))


def test_rotary_by_the_formula() -> None:
    """Dimension i turns with half + i by position · theta^(−2i / rotary_dim); the rest stands still."""
    rotary_dim, head_dim, theta = 12, 20, 500.0
    cos, sin = rotary_tables(40, rotary_dim, theta, CPU)
    x = normal(40, 3, head_dim)
    found = rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))
    for position in (0, 1, 5, 39):
        for i in range(rotary_dim // 2):
            turn = torch.polar(
                torch.tensor(1.0).double(), torch.tensor(position * theta ** (-2 * i / rotary_dim)).double()
            )
            pair = (
                torch.complex(x[position, :, i].double(), x[position, :, rotary_dim // 2 + i].double()) * turn
            )
            assert torch.allclose(found[position, :, i].double(), pair.real, atol=1e-5)
            assert torch.allclose(found[position, :, rotary_dim // 2 + i].double(), pair.imag, atol=1e-5)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:]) and torch.equal(found[0], x[0])


def test_scores_after_rotation_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(64, 16, 10000.0, CPU)
    q, k = normal(1, 1, 16, seed=1), normal(1, 1, 16, seed=2)

    def score(p: int, s: int) -> float:
        return float((rotate(q, cos[p], sin[p]) * rotate(k, cos[s], sin[s])).sum())

    assert score(5, 2) == pytest.approx(score(60, 57), abs=1e-5) != pytest.approx(score(5, 3), abs=1e-2)


# ---- experts


def fill_moe(block: MoeBlock, reference: torch.nn.Module, norm: torch.Tensor, inter: int) -> None:
    """Gives both the same weights, under the published names: one gate, up and down an expert."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(reference.named_parameters()):
            scale = 1.0 if name == "gate.weight" else parameter.shape[-1] ** -0.5
            parameter.copy_(normal(*parameter.shape, seed=number, scale=scale))
        for name, buffer in reference.named_buffers():
            assert name == "gate.e_score_correction_bias", name
            buffer.copy_(normal(*buffer.shape, seed=99, scale=0.2))
    state = dict(reference.state_dict())
    gate_up, down = state.pop("experts.gate_up_proj"), state.pop("experts.down_proj")
    for e in range(gate_up.shape[0]):
        state[f"experts.{e}.gate_proj.weight"], state[f"experts.{e}.up_proj.weight"] = gate_up[e].split(inter)
        state[f"experts.{e}.down_proj.weight"] = down[e]
    slots = {slot.name: slot.target for slot in block.slots("norm", "mlp")}
    slots.pop("norm.weight").copy_(norm)
    assert set(slots) == {f"mlp.{name}" for name in state}
    for name, tensor in state.items():
        assert slots[f"mlp.{name}"].shape == tensor.shape
        slots[f"mlp.{name}"].copy_(tensor)


@torch.inference_mode()
def compare_moe(block: MoeBlock, reference: torch.nn.Module, hidden: int, inter: int) -> torch.Tensor:
    """Our block, residual to residual, against x + reference(norm(x)); returns which experts were chosen."""
    weight = 1 + normal(hidden, scale=0.1)
    fill_moe(block, reference, weight, inter)
    block.finish()
    x = normal(67, hidden, seed=5, scale=2.0)
    h = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    before = x.clone()
    assert relative_error(block(x), x + reference(h.unsqueeze(0))[0]) < 2e-6
    assert torch.equal(x, before)
    assert relative_error(block(x[3:4]), x[3:4] + reference(h[3:4].unsqueeze(0))[0]) < 2e-6
    return reference.gate(h)[2]


def glm_config(**changes: Any) -> Any:
    return AutoConfig.for_model(**GLM | {"n_routed_experts": 16, "num_experts_per_tok": 4} | changes)


def glm_block(groups: int, kept: int, shared: int, renormalise: bool, **settings: Any) -> MoeBlock:
    return MoeBlock(
        build(**settings),
        hidden=64,
        inter=48,
        experts=16,
        top_k=4,
        shared_experts=shared,
        scoring="sigmoid",
        renormalise=renormalise,
        routed_scale=1.5,
        eps=1e-5,
        expert_groups=groups,
        kept_groups=kept,
    )


@pytest.mark.parametrize("module", [Glm4MoeMoE, DeepseekV3MoE])
@pytest.mark.parametrize(
    ("groups", "kept", "shared", "renormalise"),
    [(4, 2, 1, True), (4, 2, 2, True), (4, 2, 2, False), (4, 1, 1, True), (8, 3, 2, True), (2, 2, 1, False)],
)
def test_group_limited_routing_as_in_transformers(
    module: type[torch.nn.Module], groups: int, kept: int, shared: int, renormalise: bool
) -> None:
    changes = {
        "n_group": groups,
        "topk_group": kept,
        "n_shared_experts": shared,
        "norm_topk_prob": renormalise,
    }
    if module is DeepseekV3MoE:
        changes["model_type"] = "deepseek_v3"
    config = glm_config(**changes)
    block = glm_block(groups, kept, shared, renormalise)
    chosen = compare_moe(block, module(config), 64, 48)
    assert ((chosen // (16 // groups)).sort(-1).values.diff(dim=-1) != 0).sum(-1).max() < kept, (
        "groups are not limited"
    )


def test_the_limit_to_groups_changes_who_is_chosen() -> None:
    """Otherwise the test above could not tell group-limited routing from plain routing."""
    limited, plain = Glm4MoeMoE(glm_config(n_group=4, topk_group=2)), Glm4MoeMoE(glm_config())
    fill_moe(glm_block(4, 2, 1, True), limited, torch.ones(64), 48)
    plain.load_state_dict(limited.state_dict())
    h = normal(67, 64, seed=5)
    differ = (limited.gate(h)[2].sort(-1).values != plain.gate(h)[2].sort(-1).values).any(-1)
    assert differ.float().mean() > 0.3


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_plain_routing_with_shared_experts(backend: str, shared: int, renormalise: bool) -> None:
    """The fused kernel and the composition of torch operators; a shared MLP of two experts' width."""
    block = glm_block(1, 1, shared, renormalise, moe_backend=backend)
    compare_moe(block, Glm4MoeMoE(glm_config(n_shared_experts=shared, norm_topk_prob=renormalise)), 64, 48)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_routing_without_shared_experts(backend: str, renormalise: bool) -> None:
    config = AutoConfig.for_model(**QWEN | {"norm_topk_prob": renormalise})
    block = MoeBlock(
        build(moe_backend=backend),
        hidden=64,
        inter=48,
        experts=8,
        top_k=3,
        shared_experts=0,
        scoring="softmax",
        renormalise=renormalise,
        routed_scale=1.0,
        eps=1e-5,
    )
    compare_moe(block, Qwen3MoeSparseMoeBlock(config), 64, 48)


# ---- linear, dense, embedding, head


def test_linear_stacks_its_parts_in_order() -> None:
    linear = Linear(build(), 6, {"q": 4, "k": 2, "v": 3}, bias=True)
    state = {
        slot.name: slot.target.copy_(normal(*slot.target.shape, seed=i))
        for i, slot in enumerate(linear.slots("p."))
    }
    assert set(state) == {f"p.{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    x = normal(5, 6)
    expected = torch.cat([x @ state[f"p.{part}.weight"].T + state[f"p.{part}.bias"] for part in "qkv"], -1)
    assert torch.allclose(linear(x), expected, atol=1e-6)


@pytest.mark.parametrize("finished", [True, False])
def test_dense_block(finished: bool) -> None:
    block = DenseBlock(build(), 24, 40, 1e-5)
    state = {
        slot.name: slot.target.copy_(normal(*slot.target.shape, seed=i, scale=0.3)).double()
        for i, slot in enumerate(block.slots("norm", "mlp"))
    }
    assert set(state) == {"norm.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))}
    if finished:
        block.finish()
    x = normal(9, 24)
    h = state["norm.weight"] * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    gate, up = h @ state["mlp.gate_proj.weight"].T, h @ state["mlp.up_proj.weight"].T
    expected = x + (gate * gate.sigmoid() * up) @ state["mlp.down_proj.weight"].T
    assert relative_error(block(x), expected) < 2e-6


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_head(finished: bool, tied: bool) -> None:
    embedding = Embedding(build(), 101, 24)
    embedding.weight.copy_(normal(101, 24))
    head = Head(build(), 24, 101, 1e-5, embedding.weight if tied else None)
    slots = {slot.name: slot.target for slot in head.slots("norm", "lm_head")}
    assert set(slots) == ({"norm.weight"} if tied else {"norm.weight", "lm_head.weight"})
    for number, target in enumerate(slots.values()):
        target.copy_(normal(*target.shape, seed=number + 7))
    weight = (embedding.weight if tied else slots["lm_head.weight"]).double()
    norm = slots["norm.weight"].double()
    if finished:
        head.finish()
    x = normal(5, 24)
    expected = norm * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() @ weight.T
    found = head(x)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-6
    assert torch.equal(embedding(torch.tensor([3, 100, 3])), embedding.weight[[3, 100, 3]])


def test_logits_of_a_bf16_head_are_float32() -> None:
    head = Head(build(torch.bfloat16), 24, 101, 1e-5)
    for slot in head.slots("norm", "lm_head"):
        slot.target.copy_(normal(*slot.target.shape))
    head.finish()
    assert head(normal(2, 24).to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", names("models"))
def test_a_model_with_a_tied_head_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, load("models", name).TINY | {"tie_word_embeddings": True})
    prompt = [5, 17, 200, 3, 99, 12]
    expected = reference_greedy(load_reference(folder), prompt, 24)
    assert InProcessEngine(folder).generate([prompt], GREEDY) == [expected]
    assert len(set(expected)) > 3
