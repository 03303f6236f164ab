"""Where SGLang and vLLM look for the tuning files of a model: folder and exact file names.

    expert_layers(source, tp) → ExpertLayers       what a model's routed experts are on one GPU
    lookups(layers, gpu, triton) → (Lookup, …)     one for each way in which a server may ask

    sglang/configs/triton_3_9_0/E=161,N=384,….json, …_down.json      where SGLANG_MOE_CONFIG_DIR is sglang/
    vllm/E=160,N=384,….json                                          where VLLM_TUNED_CONFIG_FOLDER is vllm/

SGLang fuses shared experts with the routed ones for GLM-4.x, and for DeepSeek-V3's 256 experts with one
shared one that are not int4; E is then larger by theirs, and a token takes so many more. It can be told not
to (--disable-shared-experts-fusion), so the files for both counts are written. It fuses none of Kimi-K2's
and, with CUDA, none of Qwen3.5's; vLLM none at all.

Source: sglang 0.5.23 (`shared_experts_fusion_disable_reason` of the models, get_moe_configs), vllm 0.33.0
(get_moe_configs), read 2026-11-21.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath

from firebox.errors import UnsupportedFormat
from firebox.hardware.base import Gpu
from firebox.planning._foreign_model import ExpertShape, asked_names, expert_shape, token_sizes
from firebox.planning._foreign_name import SERVERS, SGLANG, SPELLED, VLLM, Name, devices, file_name
from firebox.planning._parts import Source

VARIABLES = {SGLANG: "SGLANG_MOE_CONFIG_DIR", VLLM: "VLLM_TUNED_CONFIG_FOLDER"}
DEEPSEEK_EXPERTS = 256


@dataclass(frozen=True)
class ExpertLayers:
    """A model's layers of routed experts on one GPU, which are all alike. `kind`: its model_type; `hidden`:
    the width of its hidden states; `top_k`: routed experts that a token takes."""

    shape: ExpertShape
    kind: str
    hidden: int
    top_k: int


@dataclass(frozen=True)
class Lookup:
    """One way in which a server asks. `fused`: shared experts counted in E; `facts`: what the names say, of
    the first device; `folder`: below the one that is written to; `first`: file names of the first product,
    or for vLLM of both, one for each name by which CUDA may call the GPU; `second`: SGLang's for the second
    product, in the same order."""

    server: str
    fused: int
    facts: Name
    folder: PurePath
    first: tuple[str, ...]
    second: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[PurePath, ...]:
        """All of them."""
        return tuple(self.folder / name for name in (*self.first, *self.second))


def expert_layers(source: Source, tp: int) -> ExpertLayers:
    """Raises UnsupportedModel, UnsupportedFormat, and ConfigError where there are no experts or `tp` does not
    divide their width."""
    shape = expert_shape(source.name, source.model_type, source.config, tp)
    hidden, top_k = token_sizes(source.model_type, source.config)
    return ExpertLayers(shape, source.model_type, hidden, top_k)


def lookups(layers: ExpertLayers, gpu: Gpu, triton: str) -> tuple[Lookup, ...]:
    """Every lookup of both servers, SGLang's with fused shared experts first. `triton`: the version that
    tiles are compiled with, such as "3.9.0". Raises UnsupportedFormat where no file could be asked for."""
    found = tuple(
        _lookup(server, layers.shape, name, gpu, triton)
        for server in SERVERS
        for name in asked_names(server, layers.shape, _unnamed())
        if name.experts == layers.shape.experts or fuses(layers)
    )
    if not found:
        raise UnsupportedFormat(
            f"the experts of {layers.shape.model} are {layers.shape.format}, for which neither "
            f"{' nor '.join(SPELLED.values())} reads tuning files",
            hint="they do for bf16, fp8 and int4 experts",
        )
    return found


def fuses(layers: ExpertLayers) -> bool:
    """Does SGLang compute this model's shared experts with the routed ones unless told otherwise?"""
    shape = layers.shape
    if layers.kind == "glm4_moe":
        return shape.shared > 0
    int4 = shape.format in ("int4_group", "awq", "gptq")
    return (layers.kind, shape.experts, shape.shared, int4) == ("deepseek_v3", DEEPSEEK_EXPERTS, 1, False)


def folder_of(server: str, triton: str) -> PurePath:
    """Below the folder that is written to."""
    if server == VLLM:
        return PurePath(VLLM)
    return PurePath(SGLANG, "configs", f"triton_{triton.replace('.', '_')}")


def _lookup(server: str, shape: ExpertShape, name: Name, gpu: Gpu, triton: str) -> Lookup:
    called = [replace(name, device=device) for device in devices(server, gpu)]
    second = [replace(one, down=True) for one in called] if server == SGLANG else []
    assert name.experts is not None, name
    return Lookup(
        server,
        name.experts - shape.experts,
        called[0],
        folder_of(server, triton),
        tuple(_spelled(server, one) for one in called),
        tuple(_spelled(server, one) for one in second),
    )


def _spelled(server: str, name: Name) -> str:
    found = file_name(server, name)
    assert found is not None, (server, name)
    return found


def _unnamed() -> Name:
    return Name(None, None, None, None, None, per_channel=False, down=False)
