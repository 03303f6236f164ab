"""A model before it has memory: which device it is for, its shapes, choices and launches on the meta device,
and what it will need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch

from firebox.cache.specs import cache_needs
from firebox.config import Config, EngineConfig, ModelConfig, check_choice, kv_format_of
from firebox.engine.budget import CheckpointFacts
from firebox.engine.memory import Needs, needs
from firebox.errors import ConfigError, UnsupportedFormat, UnsupportedModel
from firebox.find import load, names
from firebox.formats.base import Slot
from firebox.formats.kv.base import KvFormat, require_fp8_scales
from firebox.formats.select import formats_of
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu, probe_gpu
from firebox.kernels.select import Choice
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.layers.device import Device
from firebox.models.base import Model, need
from firebox.weights.checkpoint import Checkpoint
from firebox.weights.load import chosen_slots
from firebox.weights.requantise import Requantiser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(wanted: str, dtype: str) -> tuple[Gpu, str]:
    """The device that `--device` asks for, and why. auto: an NVIDIA GPU if there is one and a model for its
    kernels, which do not compute in float32. Raises ConfigError."""
    check_choice(EngineConfig, "device", wanted)
    if wanted == "cpu":
        return probe_cpu(), "asked for"
    if wanted == "auto" and dtype == "float32":
        return probe_cpu(), "kernels of GPUs do not compute in float32"
    gpu = probe_gpu()
    if gpu is not None:
        return gpu, "asked for" if wanted == "cuda" else "there is an NVIDIA GPU"
    if wanted == "cuda":
        raise ConfigError("this machine has no NVIDIA GPU that torch can use", hint="--device cpu")
    return probe_cpu(), "there is no NVIDIA GPU that torch can use"


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model on the meta device: shapes, choices and launches without memory."""

    model: Decoder
    kv: KvFormat
    choices: list[Choice]


def make_outline(checkpoint: Checkpoint, config: Config, gpu: Gpu) -> Outline:
    """Raises UnsupportedFormat, UnsupportedModel, ConfigError."""
    dtype = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
    if dtype not in DTYPES:
        raise UnsupportedFormat(
            f"{checkpoint.folder} computes in {dtype}", hint=f"supported: {', '.join(DTYPES)}"
        )
    kv_format = kv_format_of(config.engine.kv_cache_dtype, dtype)
    requantiser = requantiser_of(config.model, gpu)
    build = build_of(config, dtype, kv_format, 1, gpu, 1, requantiser, device=torch.device("meta"))
    model = make_model(checkpoint, build)
    assert isinstance(model, Decoder)
    return Outline(model, kv_module(kv_format), build.choices)


def facts(
    checkpoint: Checkpoint, config: Config, gpu: Gpu, outline: Outline | None = None
) -> CheckpointFacts:
    """What `resolve` needs, counted on the outline; it is made if it is not given."""
    outline = outline or make_outline(checkpoint, config, gpu)
    model = outline.model
    cache = cache_needs(model.cache_specs, outline.kv.DTYPE.itemsize)
    present = checkpoint.names() if checkpoint.shards else None
    slots = [_bytes(slot) for slot in chosen_slots(model, present)]
    further = _further(outline, config.engine, gpu, slots)
    return CheckpointFacts(
        model_type=checkpoint.model_type,
        dtype=checkpoint.dtype,
        context_tokens=need(checkpoint.text_config, "max_position_embeddings"),
        weights_bytes=sum(slots),
        kv_bytes_per_token=cache.full_bytes_per_token,
        window_tokens=cache.window_tokens,
        window_bytes_per_token=cache.window_bytes_per_token,
        state_bytes=cache.state_bytes,
        workspace_bytes=further.workspace,
        graphs_bytes=further.graphs,
        loader_bytes=further.loader,
    )


def _further(outline: Outline, engine: EngineConfig, gpu: Gpu, slots: Sequence[int]) -> Needs:
    """What a GPU's memory holds besides; on a CPU that is little, and not counted."""
    if gpu.kind != "cuda":
        return Needs()
    from firebox.kernels.plan import Setting
    from firebox.layers.launches import layers_of

    setting = Setting(gpu, kv_dtype=outline.kv.DTYPE, page_tokens=engine.on(gpu).tokens_a_page)
    return needs(
        outline.model, layers_of(outline.model, setting), gpu, slots,
        tokens=engine.max_batch_tokens, rows=engine.most_running,
        graphs=engine.cuda_graph != "off" and not outline.model.not_capturable,
    )  # fmt: skip


def _bytes(slot: Slot) -> int:
    """What a slot's weights take where they are computed with."""
    stored = getattr(slot, "stored_bytes", None)
    return slot.target.nbytes if stored is None else int(stored)


def make_model(checkpoint: Checkpoint, build: Build) -> Model:
    """The architecture's model with uninitialised weights. Raises UnsupportedModel."""
    if checkpoint.model_type not in names("models"):
        raise UnsupportedModel(
            f"{checkpoint.folder} is a {checkpoint.model_type!r}",
            hint=f"supported: {', '.join(names('models'))}",
        )
    module = load("models", checkpoint.model_type)
    if build.kv_scaled:
        require_fp8_scales(checkpoint.text_config)
    stored = frozenset(checkpoint.names()) if checkpoint.shards else None
    build = dataclasses.replace(build, format_of=formats_of(checkpoint.text_config), stored=stored)
    model: Model = module.Model(module.Config.from_hf(checkpoint.text_config), build)
    return model


def requantiser_of(config: ModelConfig, gpu: Gpu) -> Requantiser | None:
    """What --requantize asks for. Raises ConfigError."""
    check_choice(ModelConfig, "requantize", config.requantize)
    if config.requantize == "none":
        return None
    return Requantiser(config.requantize_limit, kernels=gpu.kind == "cuda")


def kv_module(name: str) -> KvFormat:
    """formats/kv/<name>.py."""
    return cast(KvFormat, load("formats.kv", name))


def build_of(
    config: Config,
    dtype: str,
    kv_format: str,
    max_positions: int,
    gpu: Gpu,
    threads: int,
    requantiser: Requantiser | None,
    device: torch.device | None = None,
) -> Build:
    """What a model's layers are built with; `device`: where its weights go, if that is not the GPU's own."""
    kv, device = kv_module(kv_format), device or torch.device(gpu.kind)
    return Build(
        gpu=gpu,
        device=device,
        dtype=DTYPES[dtype],
        kv_dtype=kv.DTYPE,
        kv_scaled=kv.SCALED,
        max_positions=max_positions,
        threads=threads,
        attention_backend=config.engine.attention_backend,
        moe_backend=config.engine.moe_backend,
        shared=Device(gpu, device, config.engine.max_batch_tokens) if gpu.kind == "cuda" else None,
        requantise=requantiser.quantise if requantiser and requantiser.kernels else None,
    )
