"""Is a tuning file's name the one that servers look for when they serve a given model?

E is the number of experts: SGLang adds the shared experts where it computes them with the routed ones. N is
the experts' width on one GPU: vLLM counts weights, and so does SGLang, except that of two int4 in a byte it
counts the byte. Sources as in `_foreign_name.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from firebox.errors import ConfigError, UnsupportedModel
from firebox.find import load, names
from firebox.planning._foreign_name import SERVERS, SPELLED, VLLM, Name, file_name

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_WIDTH = ("moe_intermediate_size", "intermediate_size")
_WORDS = {
    "bf16": None,
    "fp8_tensor": "fp8_w8a8",
    "fp8_channel": "fp8_w8a8",
    "fp8_block": "fp8_w8a8",
    "int4_group": "int4_w4a16",
    "awq": "int4_w4a16",
    "gptq": "int4_w4a16",
}


@dataclass(frozen=True)
class ExpertShape:
    """A model's experts as one GPU holds them. `shared`: experts that every token takes, each as wide as a
    routed one; `width`: of the GPU's share; `format`: how they are stored, a file of formats/; `block`: (n,
    k) weights that share a scale, of fp8_block."""

    model: str
    experts: int
    shared: int
    width: int
    format: str
    block: tuple[int, int] | None = None


def expert_shape(model: str, kind: str, config: Mapping[str, Any], tp: int) -> ExpertShape:
    """From the model's type and the language model's section of its config.json. Raises UnsupportedModel,
    UnsupportedFormat, or ConfigError where there are no experts or `tp` does not divide their width."""
    from firebox.formats.select import formats_of  # torch: only where a model is named

    if kind not in names("models"):
        raise UnsupportedModel(f"{model} is a {kind!r}", hint=f"supported: {', '.join(names('models'))}")
    found = vars(load("models", kind).Config.from_hf(config))
    experts = next((found[key] for key in _EXPERTS if key in found), 0)
    if not experts:
        raise ConfigError(f"{model} has no experts", hint="tuning files are for mixture-of-experts models")
    width = next(found[key] for key in _WIDTH if key in found)
    if tp < 1 or width % tp:
        raise ConfigError(f"--tp {tp} does not divide the experts' width {width} of {model}")
    last = int(config["num_hidden_layers"]) - 1  # the first layers may be dense
    format = formats_of(config)(f"model.layers.{last}.mlp.experts.0.up_proj")
    block = getattr(format, "block", None)
    return ExpertShape(
        model, experts, int(found.get("n_shared_experts") or 0), width // tp, format.name, block
    )


def token_sizes(kind: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """The width of a token's hidden states, and how many routed experts it takes; of a model that
    `expert_shape` accepts."""
    found = load("models", kind).Config.from_hf(config)
    return found.hidden_size, found.num_experts_per_tok


def asked_names(server: str, shape: ExpertShape, name: Name) -> tuple[Name, ...]:
    """The facts by which `server` looks a file up for this model, the usual ones first; device and "_down"
    are `name`'s. Nothing if no dtype word stands for the format."""
    if shape.format not in _WORDS:
        return ()
    usual = replace(
        name,
        experts=shape.experts,
        width=shape.width,
        dtype=_WORDS[shape.format],
        block=shape.block if shape.format == "fp8_block" else None,
        per_channel=shape.format == "fp8_channel",
        other=(),
    )
    if server == VLLM:
        return (usual,)
    if usual.dtype == "int4_w4a16":
        usual = replace(usual, width=shape.width // 2)
    fused = (replace(usual, experts=shape.experts + shape.shared),) if shape.shared else ()
    return (*fused, usual)


def asks(server: str, text: str, shape: ExpertShape, name: Name) -> bool:
    """Does `server` look for the file called `text` when it serves the model?"""
    return text in {file_name(server, asked) for asked in asked_names(server, shape, name)}


def model_warnings(text: str, name: Name, shape: ExpertShape) -> Iterator[str]:
    """Why the name is not one for this model; one sentence a reason."""
    if shape.format not in _WORDS:
        yield f"the experts of {shape.model} are {shape.format}, for which no server has a dtype word"
        return
    asked = [found for server in SERVERS for found in asked_names(server, shape, name)]
    reasons = [
        *_size_warnings(name, shape, asked),
        *_dtype_warnings(name, shape),
        *_scale_warnings(text, name, shape),
    ]
    yield from reasons
    if not reasons and not any(asks(server, text, shape, name) for server in SERVERS):
        named = (file_name(server, found) for server in SERVERS for found in asked_names(server, shape, name))
        spelled = " or ".join(dict.fromkeys(filter(None, named)))
        yield f"no server looks for this name for {shape.model}, but for {spelled}"


def _size_warnings(name: Name, shape: ExpertShape, asked: Sequence[Name]) -> Iterator[str]:
    if name.experts is not None and name.experts not in {found.experts for found in asked}:
        fused = f", SGLang for E={asked[0].experts} where it fuses the shared one" if shape.shared else ""
        yield f"E={name.experts} is not for {shape.model}: servers look for E={shape.experts}{fused}"
    if name.width is not None and name.width not in {found.width for found in asked}:
        widths = dict.fromkeys(f"N={found.width}" for found in asked)
        yield f"N={name.width} is not for {shape.model} cut this way: servers look for {' or '.join(widths)}"


def _dtype_warnings(name: Name, shape: ExpertShape) -> Iterator[str]:
    word = _WORDS[shape.format]
    if name.dtype != word:
        said, looked = (f"dtype={w}" if w else "a name without dtype" for w in (name.dtype, word))
        yield f"{said} is not for {shape.model}, whose experts are {shape.format}: servers look for {looked}"


def _scale_warnings(text: str, name: Name, shape: ExpertShape) -> Iterator[str]:
    channel = shape.format == "fp8_channel"
    if channel and not name.per_channel:
        only = f"; {SPELLED[VLLM]} looks for a name without it" if asks(VLLM, text, shape, name) else ""
        yield (
            f"per_channel_quant=True is missing: {shape.model} has a scale a channel, and SGLang says so in "
            f"the name{only}"
        )
    if name.per_channel and not channel:
        yield f"per_channel_quant=True is not for {shape.model}, whose experts are {shape.format}"
    block = shape.block if shape.format == "fp8_block" else None
    if block is not None and name.block != block:
        yield f"block_shape={list(block)} is missing: the scales of {shape.model} are in such blocks"
    if block is None and name.block is not None:
        yield f"block_shape={list(name.block)} is not for {shape.model}, whose experts are {shape.format}"
