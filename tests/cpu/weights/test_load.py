"""Checkpoint to model: every tensor arrives, exactly; everything that does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.outline import facts, make_model
from firebox.errors import (
    CheckpointError,
    CorruptShard,
    MissingTensor,
    UnknownTensor,
    UnsupportedFormat,
    UnsupportedModel,
    WrongShape,
)
from firebox.find import load
from firebox.formats.base import OneOf
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.dense import DenseBlock
from firebox.layers.moe import MoeBlock
from firebox.layers.rope import Yarn
from firebox.models.base import Model
from firebox.weights.checkpoint import INDEX, SINGLE, open_checkpoint
from firebox.weights.load import chosen_slots, load_weights
from tests.support.checkpoints import write_checkpoint

BUNDLED = Path(__file__).parents[3] / "src/firebox/assets/firebox-tiny"
# the models whose tensor names the tests below spell out; the contract test loads each model's own checkpoint
MODELS = ("glm4_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text")
GLM = load("models", "glm4_moe").TINY
QWEN = load("models", "qwen3_moe").TINY
# without the rotary section, so that tests can put in their own under its older and newer name
QWEN_5 = {k: v for k, v in load("models", "qwen3_5_moe_text").TINY.items() if k != "rope_parameters"}
TINIES = pytest.mark.parametrize("tiny", [GLM, QWEN, QWEN_5], ids=lambda tiny: tiny["model_type"])


def build(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Build:
    return Build(probe_cpu(), torch.device(device), dtype, dtype, max_positions=64)


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Model, dict[str, torch.Tensor]]:
    """The folder's model, and its weights by name, which outlive `finish`; NaN until filled."""
    checkpoint = open_checkpoint(folder)
    model = make_model(checkpoint, build(dtype))
    return model, emptied(model, checkpoint.names())


def emptied(model: Model, present: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """Where each tensor goes; all NaN now."""
    targets = {name: slot.target for slot in chosen_slots(model, present) for name in slot.tensors}
    for target in targets.values():
        target.fill_(torch.nan)
    return targets


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return dict(checkpoint.tensors(checkpoint.names()))


def is_plus_one(folder: Path, name: str) -> bool:
    """Whether the checkpoint stores this norm's weight − 1: in Qwen3.5 all but the gated delta net's own."""
    names = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
    return open_checkpoint(folder).model_type.startswith("qwen3_5") and name.endswith(names)


def arranged(folder: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the model keeps of a stored tensor, in float32."""
    wide = tensor.double().float()
    if name.endswith("conv1d.weight"):
        return wide.reshape(tensor.shape[0], -1)
    return wide + 1.0 if is_plus_one(folder, name) else wide


def refusal(folder: Path, error: type[CheckpointError]) -> CheckpointError:
    """The error with which loading ends before anything is read."""
    model, targets = empty_model(folder)
    with pytest.raises(error) as caught:
        load_weights(model, open_checkpoint(folder))
    assert type(caught.value) is error
    assert all(target.isnan().all() for target in targets.values())
    return caught.value


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The model's weights by name, after loading."""
    model, targets = empty_model(folder, dtype)
    load_weights(model, open_checkpoint(folder))
    return targets


def resolve_facts(config: dict[str, Any], folder: Path) -> Any:
    """What start-up does first with a config.json."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return facts(open_checkpoint(folder), Config(), probe_cpu())


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that transformers wrote, in several shards."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(folder, load("models", request.param).TINY, shard_bytes=200_000)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(written, tmp_path / "checkpoint")


def shard_with(folder: Path, name: str) -> Path:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / weight_map[name]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---- what arrives


def test_every_tensor_arrives_unchanged(written: Path) -> None:
    """Unchanged but for the two arrangements that `arranged` names."""
    stored = stored_tensors(written)
    found = load_folder(written)
    assert len(open_checkpoint(written).shards) > 1 and set(found) == set(stored)
    same = 0
    for name, tensor in stored.items():
        assert torch.equal(found[name], arranged(written, name, tensor)), name
        same += torch.equal(found[name], tensor)
    assert same == len(stored) or "qwen3_5" in open_checkpoint(written).model_type
    assert same > 0.8 * len(stored)


def test_one_file_or_several_is_the_same_model(written: Path, tmp_path: Path) -> None:
    shutil.copy(written / "config.json", tmp_path)
    save_file(stored_tensors(written), tmp_path / SINGLE)
    several = load_folder(written)
    for name, tensor in load_folder(tmp_path).items():
        assert torch.equal(tensor, several[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(folder: Path, dtype: torch.dtype) -> None:
    narrow: dict[str, torch.Tensor] = {}
    for shard in open_checkpoint(folder).shards:

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
            narrow.update(tensors)

        rewrite(shard, change)
    for name, tensor in load_folder(folder).items():
        assert narrow[name].dtype == dtype and tensor.dtype == torch.float32, name
        assert torch.equal(tensor, arranged(folder, name, narrow[name])), name


def test_narrowing_rounds_to_nearest_even(folder: Path) -> None:
    name = "model.norm.weight"
    ties = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20] * 16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = ties - 1.0 if is_plus_one(folder, name) else ties

    rewrite(shard_with(folder, name), change)
    found = load_folder(folder, torch.bfloat16)[name]
    assert found.dtype == torch.bfloat16
    assert found.float().tolist() == [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7] * 16


def test_progress_grows_to_the_total(written: Path) -> None:
    seen: list[tuple[int, int]] = []
    model, _ = empty_model(written)
    checkpoint = open_checkpoint(written)
    load_weights(model, checkpoint, lambda loaded, total: seen.append((loaded, total)))
    loaded = [entry[0] for entry in seen]
    assert loaded == sorted(set(loaded)) and {total for _, total in seen} == {checkpoint.total_bytes}
    assert 0.9 * checkpoint.total_bytes < loaded[-1] <= checkpoint.total_bytes
    assert 10 < len(seen) <= 100


# ---- what is refused


def test_no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no safetensors files") as caught:
        load_folder(folder)
    assert str(folder) in str(caught.value) and "dummy" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
    ],
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    rewrite(shard_with(folder, name), lambda tensors: tensors.pop(name))
    assert str(refusal(folder, MissingTensor)).endswith(f"lacks {name}")


def test_several_missing_tensors_are_counted(folder: Path) -> None:
    gone = [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(3)]
    for name in gone:
        rewrite(shard_with(folder, name), lambda tensors, name=name: tensors.pop(name))
    assert str(refusal(folder, MissingTensor)).endswith(f"lacks {gone[0]} and 2 more")


@pytest.mark.parametrize(
    "name",
    [
        "made.up",
        "model.layers.1.self_attn.q_proj.weight_scale_inv",
        "model.layers.99.mlp.gate.weight",
        "model.layers.30.input_layernorm.weight",
        "lm_head.bias",
    ],
)
def test_an_unknown_tensor(folder: Path, name: str) -> None:
    shard = shard_with(folder, "model.norm.weight")
    rewrite(shard, lambda tensors: tensors.update({name: torch.zeros(2)}))
    words = str(refusal(folder, UnknownTensor))
    assert name in words and shard.name in words


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda t: t[:-1]),
        ("model.layers.1.self_attn.o_proj.weight", lambda t: t.T.contiguous()),
        ("model.layers.2.mlp.experts.7.down_proj.weight", lambda t: t.T.contiguous()),
        ("model.embed_tokens.weight", lambda t: t[:-1]),
        ("model.layers.2.mlp.gate.weight", lambda t: t.flatten()),
        ("model.norm.weight", lambda t: t[:1]),  # would broadcast
    ],
)
def test_a_wrong_shape(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shapes: list[list[int]] = []

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        shapes.append(list(tensors[name].shape))
        tensors[name] = change(tensors[name]).clone()
        shapes.append(list(tensors[name].shape))

    rewrite(shard_with(folder, name), replace)
    with pytest.raises(WrongShape) as caught:
        load_folder(folder)
    assert str(caught.value) == f"{name} is {shapes[1]}; config.json implies {shapes[0]}"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.7.down_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_wrong_dtype(folder: Path, name: str, dtype: torch.dtype) -> None:
    rewrite(shard_with(folder, name), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedFormat) as caught:
        load_folder(folder)
    stored = str(dtype).removeprefix("torch.")
    assert str(caught.value) == f"{name} is {stored}; its format stores float32, bfloat16, float16"


def test_a_shard_that_ends_early(folder: Path) -> None:
    shard = shard_with(folder, "model.norm.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CorruptShard) as caught:
        load_folder(folder)
    assert str(shard) in str(caught.value)


# ---- other layouts of the same weights


def fused(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All experts of a layer in one tensor, gate rows first, as transformers keeps them in memory."""
    found = {name: tensor for name, tensor in stored.items() if ".mlp.experts." not in name}
    for mlp in {name.partition(".experts.")[0] for name in stored if name not in found}:
        experts = range(sum(n.startswith(f"{mlp}.experts.") and "down_proj" in n for n in stored))
        gate, up, down = (
            torch.stack([stored[f"{mlp}.experts.{e}.{part}_proj.weight"] for e in experts])
            for part in ("gate", "up", "down")
        )
        found[f"{mlp}.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        found[f"{mlp}.experts.down_proj"] = down
    return found


def one_file(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)
    return folder


def test_all_experts_in_one_tensor(written: Path, tmp_path: Path) -> None:
    stored = fused(stored_tensors(written))
    folder = one_file(tmp_path, json.loads((written / "config.json").read_text()), stored)
    found, one_by_one = load_folder(folder), load_folder(written)
    assert set(found) == set(stored) and sum(".experts." in name for name in stored) >= 4
    for name, tensor in stored.items():
        assert torch.equal(found[name], arranged(folder, name, tensor)), name
    rows = found["model.layers.2.mlp.experts.gate_up_proj"][5]
    for part, half in zip(("gate", "up"), rows.chunk(2), strict=True):
        assert torch.equal(half, one_by_one[f"model.layers.2.mlp.experts.5.{part}_proj.weight"])


def test_half_of_each_layout_is_refused(written: Path, tmp_path: Path) -> None:
    stored = stored_tensors(written)
    gate_up = "model.layers.2.mlp.experts.gate_up_proj"
    mixed = stored | {gate_up: fused(stored)[gate_up]}
    del mixed["model.layers.2.mlp.experts.0.gate_proj.weight"]
    folder = one_file(tmp_path, json.loads((written / "config.json").read_text()), mixed)
    assert gate_up in str(refusal(folder, UnknownTensor))


def test_a_model_that_sees_too(tmp_path: Path) -> None:
    """Its language model's tensors stand under another prefix; the vision tower and the MTP layer are left
    out."""
    config = load("models", "qwen3_5_moe").TINY
    alone = write_checkpoint(tmp_path / "alone", load("models", "qwen3_5_moe_text").TINY)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in stored_tensors(alone).items()
    }
    others = {name: torch.zeros(2) for name in ("model.visual.pos_embed.weight", "mtp.fc.weight")}
    found = load_folder(one_file(tmp_path / "sees", config, tensors | others))
    expected = load_folder(alone)
    assert set(found) == set(tensors) and len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name.replace("model.", "model.language_model.", 1)], tensor), name


def test_a_quantised_checkpoint(written: Path, tmp_path: Path) -> None:
    """Codes and scales of a weight in two shards; what is excepted stays as it is."""
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head"],
    }
    plain, codes, scales = stored_tensors(written), {}, {}
    quantised = [n for n in plain if n.endswith("_proj.weight") and ("experts" in n or "self_attn" in n)]
    generator = torch.Generator().manual_seed(0)
    module_slots = make_model(open_checkpoint(one_file(tmp_path, config, {})), build()).slots()
    for slot in module_slots:
        for entry in slot.layouts[0] if isinstance(slot, OneOf) else [slot]:
            for name, spec in entry.tensors.items():
                if name.endswith("weight_scale_inv"):
                    scales[name] = torch.rand(spec.shape, generator=generator) + 0.5
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        codes[weight] = plain[weight].to(torch.float8_e4m3fn)
    assert set(quantised) <= set(codes) and "lm_head.weight" not in codes
    (tmp_path / SINGLE).unlink()
    shards = {"a.safetensors": plain | codes, "b.safetensors": scales}
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    found = load_folder(tmp_path)
    assert set(found) == set(plain) | set(scales)
    for name, tensor in plain.items():
        expected = arranged(tmp_path, name, tensor)
        if name in codes:
            expected = codes[name].float()
            for row in range(expected.shape[0]):
                for block in range(-(-expected.shape[1] // 32)):
                    scale = scales[f"{name}_scale_inv"][row // 32, block]
                    expected[row, block * 32 : (block + 1) * 32] *= scale
        assert torch.equal(found[name], expected), name

    gone = next(iter(scales))
    rewrite(tmp_path / "b.safetensors", lambda tensors: tensors.pop(gone))
    assert str(refusal(tmp_path, MissingTensor)).endswith(f"lacks {gone}")


# ---- tensors that are left out on purpose


def test_a_made_up_name_beside_the_mtp_layer_is_refused(tmp_path: Path) -> None:
    shutil.copy(BUNDLED / "config.json", tmp_path)
    for name in ("model.layers.40.mlp.gate.weight", "model.layers.5.mlp.gate.weight", "mtp.norm.weight"):
        save_file(load_file(BUNDLED / SINGLE) | {name: torch.zeros(2)}, tmp_path / SINGLE)
        assert name in str(refusal(tmp_path, UnknownTensor))


@TINIES
def test_a_tied_head_is_the_embedding(tiny: dict[str, Any], tmp_path: Path) -> None:
    """transformers leaves lm_head out; other tools write it too. Both load, and an untied model needs it."""
    write_checkpoint(tmp_path, tiny | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_folder(tmp_path)
    rewrite(tmp_path / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = load_folder(tmp_path)
    assert "lm_head.weight" not in found and not any(target.isnan().any() for target in found.values())
    rewrite(tmp_path / SINGLE, lambda t: t.pop("lm_head.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert str(refusal(tmp_path, MissingTensor)).endswith("lacks lm_head.weight")


# ---- what a config.json may ask for


@TINIES
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "llama"}, UnsupportedModel, ["'llama'"]),
        ({"model_type": "base"}, UnsupportedModel, ["'base'"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, UnsupportedFormat, ["'bitsandbytes'"]),
        ({"quantization_config": {"bits": 4}}, UnsupportedFormat, ["quant_method", "None"]),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            UnsupportedFormat,
            ["compressed-tensors", "'config_groups'"],
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            UnsupportedFormat,
            ["awq", "'group_size'"],
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            UnsupportedFormat,
            ["gptq", "'group_size'"],
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}},
            UnsupportedFormat,
            ["modelopt", "'quantized_layers'"],
        ),
        ({"dtype": "float8_e4m3fn"}, UnsupportedFormat, ["float8_e4m3fn"]),
        ({"hidden_act": "gelu"}, UnsupportedModel, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_dropout": 0.1}, UnsupportedModel, ["attention_dropout", "0.1"]),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            UnsupportedModel,
            ["'original_max_position_embeddings'"],
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 128}},
            UnsupportedModel,
            ["'factor'"],
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, UnsupportedModel, ["rope", "'linear'"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            UnsupportedModel,
            ["rope", "'llama3'"],
        ),
    ],
)
def test_what_the_code_does_not_implement_is_refused_by_name(
    tiny: dict[str, Any],
    change: dict[str, Any],
    error: type[CheckpointError],
    words: list[str],
    tmp_path: Path,
) -> None:
    resolve_facts(tiny, tmp_path)
    with pytest.raises(error) as caught:
        resolve_facts(tiny | change, tmp_path)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    for value in (False, None):
        resolve_facts(QWEN | {"use_sliding_window": value}, tmp_path)
    with pytest.raises(UnsupportedModel, match="use_sliding_window = True"):
        resolve_facts(QWEN | {"use_sliding_window": True}, tmp_path)


NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "max_position_embeddings",
)


@pytest.mark.parametrize(
    ("tiny", "key"),
    [
        *((tiny, key) for tiny in (GLM, QWEN, QWEN_5) for key in NEEDED if key in tiny),
        *(
            (GLM, key)
            for key in (
                "n_routed_experts",
                "n_shared_experts",
                "first_k_dense_replace",
                "routed_scaling_factor",
            )
        ),
        (QWEN, "num_experts"),
        *(
            (QWEN_5, key)
            for key in (
                "num_experts",
                "shared_expert_intermediate_size",
                "linear_conv_kernel_dim",
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_num_key_heads",
                "linear_num_value_heads",
            )
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else value,
)
def test_a_missing_key_is_named(tiny: dict[str, Any], key: str, tmp_path: Path) -> None:
    for config in ({k: v for k, v in tiny.items() if k != key}, tiny | {key: None}):
        with pytest.raises(UnsupportedModel, match=key):
            resolve_facts(config, tmp_path)


def test_null_where_a_key_might_as_well_be_absent(tmp_path: Path) -> None:
    resolve_facts(
        GLM | {"quantization_config": None, "rope_scaling": None, "rope_parameters": None}, tmp_path
    )


def test_the_rotary_base_under_its_older_and_newer_name() -> None:
    for name in MODELS:
        module = load("models", name)
        tiny = {**module.TINY, **module.TINY.get("text_config", {})}
        plain = {k: v for k, v in tiny.items() if k not in ("rope_theta", "rope_parameters")}
        older = module.Config.from_hf(plain | {"rope_theta": 123.0})
        newer = module.Config.from_hf(
            plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
        )
        assert older == newer and older.rotary == (123.0, None)


def test_yarn_under_its_older_and_newer_name() -> None:
    yarn = {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "attention_factor": 1.5,
    }
    for tiny in (GLM, QWEN, QWEN_5):
        from_hf = load("models", tiny["model_type"]).Config.from_hf
        older = from_hf(tiny | {"rope_theta": 123.0, "rope_scaling": {"type": "yarn", **yarn}})
        newer = from_hf(
            tiny | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 123.0, **yarn}, "rope_theta": 5.0}
        )
        assert older == newer and older.rotary == (123.0, Yarn(4.0, 128, 1.5, beta_fast=16.0))


def test_facts_count_what_transformers_counts(written: Path) -> None:
    """Bytes of weights and of KV per token, against the parameters of transformers' own model."""
    found = facts(open_checkpoint(written), Config(), probe_cpu())
    config = AutoConfig.from_pretrained(written)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    counted = {name: parameter.numel() for name, parameter in reference.named_parameters()}
    counted |= {n: b.numel() for n, b in reference.named_buffers() if n.endswith("e_score_correction_bias")}
    parameters = sum(counted.values())
    assert found.weights_bytes == 4 * parameters
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full, linear = kinds.count("full_attention"), kinds.count("linear_attention")
    assert full + linear == config.num_hidden_layers and (linear > 0) == ("qwen3_5" in config.model_type)
    assert found.kv_bytes_per_token == 4 * 2 * full * config.num_key_value_heads * config.head_dim
    assert found.window_tokens is None and found.window_bytes_per_token == 0
    state_bytes = 0
    if linear:
        key_rows = config.linear_num_key_heads * config.linear_key_head_dim
        value_rows = config.linear_num_value_heads * config.linear_value_head_dim
        taps = (2 * key_rows + value_rows) * (config.linear_conv_kernel_dim - 1)
        state_bytes = 4 * linear * (taps + value_rows * config.linear_key_head_dim)
    assert found.state_bytes == state_bytes
    narrow = dataclasses.replace(
        Config(), model=ModelConfig(dtype="bfloat16"), engine=EngineConfig(kv_cache_dtype="bfloat16")
    )
    halved = facts(open_checkpoint(written), narrow, probe_cpu())
    assert halved.kv_bytes_per_token * 2 == found.kv_bytes_per_token
    wide = ("e_score_correction_bias", "conv1d.weight", "dt_bias", "A_log")  # these stay in float32
    kept = sum(count for name, count in counted.items() if name.endswith(wide))
    assert halved.weights_bytes == 2 * parameters + 2 * kept
    assert halved.state_bytes == found.state_bytes, "states stay in float32"


# ---- which layers are sparse


@pytest.mark.parametrize("sparse_step", [1, 2, 3, 7])
@pytest.mark.parametrize("mlp_only", [None, [], [1], [0, 3, 5]])
def test_qwen3_moe_layout(sparse_step: int, mlp_only: list[int] | None) -> None:
    config = QWEN | {"num_hidden_layers": 6, "decoder_sparse_step": sparse_step, "mlp_only_layers": mlp_only}
    module = load("models", "qwen3_moe")
    model = module.Model(module.Config.from_hf(config), build(device="meta"))
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config | {"mlp_only_layers": mlp_only or []})
        )
    expected = [MoeBlock if hasattr(layer.mlp, "experts") else DenseBlock for layer in reference.model.layers]
    assert [type(mlp) for _, mlp in model.blocks] == expected


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_glm4_moe_layout(dense: int) -> None:
    module = load("models", "glm4_moe")
    model = module.Model(module.Config.from_hf(GLM | {"first_k_dense_replace": dense}), build(device="meta"))
    assert [type(mlp) for _, mlp in model.blocks] == [DenseBlock] * dense + [MoeBlock] * (3 - dense)
