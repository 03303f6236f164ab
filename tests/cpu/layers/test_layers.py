"""Layers against their formulas in float64 and against transformers' own modules with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeMoE,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP, GptOssRotaryEmbedding
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb as qwen_rotary

from firebox.find import load, names
from firebox.formats import bf16, mxfp4
from firebox.formats.base import OneOf, Slot
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.dense import DenseBlock
from firebox.layers.embedding import Embedding
from firebox.layers.head import Head
from firebox.layers.linear import Linear
from firebox.layers.moe import MoeBlock
from firebox.layers.moe_names import MoeNames
from firebox.layers.norm import RMSNorm
from firebox.layers.rope import Yarn, rotary_tables, rotate
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

GLM = load("models", "glm4_moe").TINY
QWEN = load("models", "qwen3_moe").TINY
QWEN_3_5 = load("models", "qwen3_5_moe").TINY["text_config"]
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


def slots(layer: Any, layout: int = 0) -> list[Slot]:
    """The layer's slots; of weights that are stored in several ways those of one layout."""
    found: list[Slot] = []
    for entry in layer.slots():
        found += entry.layouts[layout] if isinstance(entry, OneOf) else [entry]
    return found


def targets(layer: Any) -> dict[str, torch.Tensor]:
    """Tensor name → the memory that it goes to; every tensor of its target's shape, no name twice."""
    found: dict[str, torch.Tensor] = {}
    for slot in slots(layer):
        (name, spec), *more = slot.tensors.items()
        assert not more and name not in found and spec.shape == slot.target.shape, name
        found[name] = slot.target
    return found


def fill(layer: Any, state: dict[str, torch.Tensor], layout: int = 0) -> None:
    """As the loader does: `state` holds exactly the tensors that the layer asks for."""
    wanted = slots(layer, layout)
    specs = [(name, spec) for slot in wanted for name, spec in slot.tensors.items()]
    assert sorted(name for name, _ in specs) == sorted(state)
    for name, spec in specs:
        assert state[name].shape == spec.shape and state[name].dtype in spec.dtypes, name
    for slot in wanted:
        slot.fill({name: state[name] for name in slot.tensors})


# ---- norm


@pytest.mark.parametrize("module", [Glm4MoeRMSNorm, Qwen3MoeRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(module: type[torch.nn.Module], dtype: torch.dtype, eps: float) -> None:
    """Bit for bit as transformers computes it, and as the formula says."""
    norm, reference = RMSNorm(build(dtype), "norm", 48, eps), module(48, eps=eps).to(dtype)
    norm.weight.copy_(1 + normal(48, scale=0.3))
    reference.load_state_dict({"weight": norm.weight})
    x = (normal(7, 3, 48) * normal(7, 1, 1, scale=10)).to(dtype)
    found = norm(x)
    assert found.dtype == dtype and torch.equal(found, reference(x))
    wide = x.double()
    formula = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    assert relative_error(found, formula) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_rms_norm_plus_one(dtype: torch.dtype) -> None:
    """The checkpoint stores weight − 1; the 1 is added before rounding. In float32 bit for bit as
    transformers computes it; in bf16 transformers rounds later."""
    norm = RMSNorm(build(dtype), "norm", 48, 1e-6, plus_one=True)
    stored, x = normal(48, scale=0.3).to(dtype), (normal(7, 3, 48) * normal(7, 1, 1, scale=10)).to(dtype)
    fill(norm, {"norm.weight": stored})
    assert torch.equal(norm.weight, (stored.double() + 1).to(dtype))
    reference = Qwen3_5MoeRMSNorm(48, eps=1e-6).to(dtype)
    reference.load_state_dict({"weight": stored})
    found = norm(x)
    assert found.dtype == dtype and relative_error(found, reference(x)) < 6e-3
    assert dtype != torch.float32 or torch.equal(found, reference(x))


def test_rms_norm_of_zeros_is_zero() -> None:
    norm = RMSNorm(build(), "norm", 8, 1e-6)
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


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_as_in_transformers(truncate: bool) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.3,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": truncate,
    }
    config = AutoConfig.for_model("gpt_oss", head_dim=64, rope_parameters=parameters)
    expected = GptOssRotaryEmbedding(config)(torch.ones(1), torch.arange(600).unsqueeze(0))
    found = rotary_tables(600, 64, 150000.0, CPU, Yarn(8.0, 512, 1.3, 32.0, 1.0, truncate))
    plain = rotary_tables(600, 64, 150000.0, CPU)
    for table, theirs, unstretched in zip(found, expected, plain, strict=True):
        assert torch.allclose(table, theirs[0], atol=1e-4)
        assert not torch.allclose(table, unstretched * 1.3, atol=1e-2)


def test_scores_after_rotation_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(64, 16, 10000.0, CPU)
    q, k = normal(1, 1, 16, seed=1), normal(1, 1, 16, seed=2)

    def score(p: int, s: int) -> float:
        return float((rotate(q, cos[p], sin[p]) * rotate(k, cos[s], sin[s])).sum())

    assert score(5, 2) == pytest.approx(score(60, 57), abs=1e-5) != pytest.approx(score(5, 3), abs=1e-2)


# ---- experts


def randomise(reference: torch.nn.Module) -> None:
    with torch.no_grad():
        for number, (name, parameter) in enumerate(reference.named_parameters()):
            scale = 1.0 if name == "gate.weight" else parameter.shape[-1] ** -0.5
            parameter.copy_(normal(*parameter.shape, seed=number, scale=scale))
        for name, buffer in reference.named_buffers():
            assert name == "gate.e_score_correction_bias", name
            buffer.copy_(normal(*buffer.shape, seed=99, scale=0.2))


def fill_moe(
    block: MoeBlock, reference: torch.nn.Module, norm: torch.Tensor, inter: int, layout: int = 0
) -> None:
    """Gives both the same weights, under the published names: one gate, up and down an expert, or, as layout
    1, all experts in one tensor, as transformers has them."""
    randomise(reference)
    state = dict(reference.state_dict())
    if layout == 0:
        gate_up, down = state.pop("experts.gate_up_proj"), state.pop("experts.down_proj")
        for e in range(gate_up.shape[0]):
            gate, up = gate_up[e].split(inter)
            state[f"experts.{e}.gate_proj.weight"], state[f"experts.{e}.up_proj.weight"] = gate, up
            state[f"experts.{e}.down_proj.weight"] = down[e]
        assert set(targets(block)) == {"norm.weight", *(f"mlp.{name}" for name in state)}
    fill(block, {"norm.weight": norm, **{f"mlp.{name}": tensor for name, tensor in state.items()}}, layout)


@torch.inference_mode()
def compare_moe(
    block: MoeBlock, reference: torch.nn.Module, hidden: int, inter: int, layout: int = 0
) -> torch.Tensor:
    """Our block, residual to residual, against x + reference(norm(x)); returns which experts were chosen."""
    weight = 1 + normal(hidden, scale=0.1)
    fill_moe(block, reference, weight, inter, layout)
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
    built = build(**settings)
    return MoeBlock(
        built,
        RMSNorm(built, "norm", 64, 1e-5),
        MoeNames.usual("mlp"),
        inter=48,
        experts=16,
        top_k=4,
        shared_experts=shared,
        scoring="sigmoid",
        renormalise=renormalise,
        routed_scale=1.5,
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


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_routing_without_shared_experts(backend: str, renormalise: bool, layout: int) -> None:
    """With one tensor per expert and with all experts in one."""
    config = AutoConfig.for_model(**QWEN | {"norm_topk_prob": renormalise})
    built = build(moe_backend=backend)
    block = MoeBlock(
        built,
        RMSNorm(built, "norm", 64, 1e-5),
        MoeNames.usual("mlp"),
        inter=48,
        experts=8,
        top_k=3,
        shared_experts=0,
        scoring="softmax",
        renormalise=renormalise,
        routed_scale=1.0,
    )
    compare_moe(block, Qwen3MoeSparseMoeBlock(config), 64, 48, layout)


def test_gated_shared_expert() -> None:
    built = build()
    block = MoeBlock(
        built,
        RMSNorm(built, "norm", 64, 1e-5),
        MoeNames.usual("mlp", shared="shared_expert"),
        inter=48,
        experts=8,
        top_k=3,
        shared_experts=1,
        shared_gate=True,
        scoring="softmax",
        renormalise=True,
        routed_scale=1.0,
    )
    compare_moe(block, Qwen3_5MoeSparseMoeBlock(AutoConfig.for_model(**QWEN_3_5)), 64, 48)


def gpt_oss_block(format: Any) -> MoeBlock:
    built = build(format_of=lambda path: format if path.startswith("mlp.experts.") else bf16.Format())
    return MoeBlock(
        built,
        RMSNorm(built, "norm", 64, 1e-5),
        MoeNames(router="mlp.router", expert="", fused="mlp.experts"),
        interleaved=True,
        inter=32,
        experts=8,
        top_k=3,
        shared_experts=0,
        scoring="softmax_top_k",
        renormalise=False,
        routed_scale=1.0,
        biases=True,
        activation="clamped_swiglu",
        limit=1.5,
        alpha=1.702,
    )


@torch.inference_mode()
def test_experts_as_gpt_oss_in_transformers() -> None:
    """Biases, clamped SwiGLU, gate and up rows in turn; unquantised, and the same weights in MXFP4, whose
    values transformers unpacks."""
    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=3,
        swiglu_limit=1.5,
        swiglu_alpha=1.702,
    )
    reference = GptOssMLP(config)
    randomise(reference)
    packed = {}
    for part, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        generator = torch.Generator().manual_seed(rows + columns)
        groups = columns // 32
        blocks = torch.randint(256, (8, rows, groups, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, (8, rows, groups), dtype=torch.uint8, generator=generator)
        packed |= {f"mlp.experts.{part}_blocks": blocks, f"mlp.experts.{part}_scales": scales}
        values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [experts, in, out]
        getattr(reference.experts, part).copy_(values)
    weight, x = 1 + normal(64, scale=0.1), normal(67, 64, seed=5, scale=2.0)
    state = {"norm.weight": weight, **{f"mlp.{name}": t for name, t in reference.state_dict().items()}}
    small = {name: t for name, t in state.items() if not name.endswith("_proj")}
    h = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = x + reference(h.unsqueeze(0))[0][0]
    for format, stored in ((bf16.Format(), state), (mxfp4.Format(), small | packed)):
        block = gpt_oss_block(format)
        fill(block, stored)
        block.finish()
        assert relative_error(block(x), expected) < 2e-6, format.name


# ---- linear, dense, embedding, head


def test_linear_stacks_its_parts_in_order() -> None:
    linear = Linear(build(), 6, {"p.q": 4, "p.k": 2, "p.v": 3}, bias=True)
    state = {
        name: target.copy_(normal(*target.shape, seed=i))
        for i, (name, target) in enumerate(targets(linear).items())
    }
    assert set(state) == {f"p.{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    x = normal(5, 6)
    expected = torch.cat([x @ state[f"p.{part}.weight"].T + state[f"p.{part}.bias"] for part in "qkv"], -1)
    assert torch.allclose(linear(x), expected, atol=1e-6)


def test_each_part_of_a_linear_has_its_own_format() -> None:
    built = build(format_of=lambda path: mxfp4.Format() if path == "p.k" else bf16.Format())
    linear = Linear(built, 64, {"p.q": 4, "p.k": 2})
    blocks, scales = torch.full((2, 2, 16), 0x72, dtype=torch.uint8), torch.tensor([[127, 128], [126, 127]])
    q = normal(4, 64)
    fill(linear, {"p.q.weight": q, "p.k.blocks": blocks, "p.k.scales": scales.to(torch.uint8)})
    pairs = torch.tensor([1.0, 6.0]).repeat(32)  # what the codes 2 and 7 stand for
    assert torch.equal(linear.weight[:4], q)
    assert torch.equal(linear.weight[4:], pairs * torch.tensor([[1.0, 2], [0.5, 1]]).repeat_interleave(32, 1))


@pytest.mark.parametrize("finished", [True, False])
def test_dense_block(finished: bool) -> None:
    block = DenseBlock(build(), RMSNorm(build(), "norm", 24, 1e-5), "mlp", 40)
    state = {
        name: target.copy_(normal(*target.shape, seed=i, scale=0.3)).double()
        for i, (name, target) in enumerate(targets(block).items())
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
    embedding = Embedding(build(), "embed_tokens", 101, 24)
    fill(embedding, {"embed_tokens.weight": normal(101, 24)})
    assert torch.equal(embedding.weight, normal(101, 24))
    final_norm = RMSNorm(build(), "norm", 24, 1e-5)
    head = Head(build(), final_norm, "lm_head", 101, embedding.weight if tied else None)
    filled = targets(head)
    assert set(filled) == ({"norm.weight"} if tied else {"norm.weight", "lm_head.weight"})
    for number, target in enumerate(filled.values()):
        target.copy_(normal(*target.shape, seed=number + 7))
    weight = (embedding.weight if tied else filled["lm_head.weight"]).double()
    norm = filled["norm.weight"].double()
    if finished:
        head.finish()
    x = normal(5, 24)
    expected = norm * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() @ weight.T
    found = head(x)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-6
    assert torch.equal(embedding(torch.tensor([3, 100, 3])), embedding.weight[[3, 100, 3]])


def test_logits_of_a_bf16_head_are_float32() -> None:
    built = build(torch.bfloat16)
    head = Head(built, RMSNorm(built, "norm", 24, 1e-5), "lm_head", 101)
    for target in targets(head).values():
        target.copy_(normal(*target.shape))
    head.finish()
    assert head(normal(2, 24).to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", names("models"))
def test_a_model_with_a_tied_head_equals_transformers(name: str, tmp_path: Path) -> None:
    config = load("models", name).TINY | {"tie_word_embeddings": True}
    if "text_config" in config:
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path, config)
    prompt = [5, 17, 200, 3, 99, 12]
    reference = load_reference(folder)
    assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    expected = reference_greedy(reference, prompt, 24)
    assert InProcessEngine(folder).generate([prompt], GREEDY) == [expected]
    assert len(set(expected)) > 3
