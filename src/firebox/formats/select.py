"""Which format each module of a checkpoint is stored in, as its quantization_config says.

`formats_of(config)` gives a function from a module's path ("model.layers.3.mlp.experts.7.down_proj") to its
Format. Lists of exceptions are matched the way the library that wrote them matches them:

    compressed-tensors   whole names, or after "re:" a regular expression from the start; "Linear" means all
    transformers         (fp8, mxfp4) a regular expression from the start up to a module border, or an ending
    AutoAWQ, GPTQ        whole parts anywhere: "self_attn", "mlp.gate" (not "mlp.gate_proj")
    modelopt             shell patterns over the name or a module that contains it

transformers leaves the output matrix alone where no list is given, AutoAWQ and GPTQ always do. A model whose
language model is one of several parts has `language_model.` before its names; a list may leave that out.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firebox.errors import UnsupportedFormat
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.base import Format, FormatOf

Match = Callable[[str, Sequence[str]], bool]  # does any of these patterns mean the module?
PLAIN = bf16.Format()
HEAD = "lm_head"
LANGUAGE_MODEL = "language_model."


def formats_of(config: Mapping[str, Any]) -> FormatOf:
    """The formats of a checkpoint with this config.json, into which hf_quant_config.json, if there is one,
    has been merged as `quantization_config`. Raises UnsupportedFormat, naming what is not implemented."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return lambda path: PLAIN
    method = str(quantization.get("quant_method", "modelopt" if "quantization" in quantization else None))
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _transformers_fp8,
        "mxfp4": _mxfp4,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "awq": _awq,
        "gptq": _gptq,
    }
    if method not in readers:
        raise UnsupportedFormat(
            f"the checkpoint's quant_method is {method!r}", hint=f"supported: bf16, {', '.join(readers)}"
        )
    return readers[method](quantization)


def matches_compressed_tensors(path: str, patterns: Sequence[str]) -> bool:
    """As `compressed_tensors.utils.match.is_match`; "Linear" means every module here, since only linear ones
    are asked about."""
    return _ranks(patterns)(path) is not None


def _ranks(patterns: Sequence[str]) -> Callable[[str], tuple[int, str] | None]:
    """How closely the closest of the patterns means a module, the smallest first: by its name, by a regular
    expression (the first in the alphabet), by its class. None: not at all. A model asks of each of its
    experts' matrices, tens of thousands."""
    names, by_class = frozenset(patterns), "Linear" in patterns
    expressions = [(p, re.compile(p.removeprefix("re:"))) for p in sorted(names) if p.startswith("re:")]

    def rank(path: str) -> tuple[int, str] | None:
        if path in names:
            return 0, path
        for pattern, expression in expressions:
            if expression.match(path):
                return 1, pattern
        return (2, "Linear") if by_class else None

    return rank


def matches_transformers(path: str, patterns: Sequence[str]) -> bool:
    """As transformers' `should_convert_module`: "mlp.gate" is not "mlp.gate_proj", and "layers.1" is not
    "layers.11"."""
    border = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{pattern}){border}", path) or path.endswith(pattern) for pattern in patterns)


def matches_parts(path: str, patterns: Sequence[str]) -> bool:
    """Do a pattern's parts follow each other somewhere in the path? AutoAWQ looks for its patterns anywhere,
    so its lists hold "self_attn" and "model.layers.1."; the whole parts are what they mean."""
    return any(f".{pattern.strip('.')}." in f".{path}." for pattern in patterns)


def matches_modelopt(path: str, patterns: Sequence[str]) -> bool:
    """Shell patterns over the whole name, or over a module that contains it ("model.layers.92" excludes all
    of layer 92)."""
    return _in_a_shell(tuple(patterns)).match(path) is not None


@functools.cache
def _in_a_shell(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the shell patterns, up to a dot or to the end: one expression, since a model asks of each of its
    experts' matrices."""
    each = (fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z") for pattern in patterns)
    return re.compile(rf"(?:{'|'.join(each)})(?=\.|\Z)" if patterns else r"(?!)")


def _all_but(format: Format, exceptions: Sequence[str], match: Match) -> FormatOf:
    exceptions = tuple(exceptions)
    return lambda path: PLAIN if _excepted(path, lambda name: match(name, exceptions)) else format


def _excepted(path: str, excepts: Callable[[str], bool]) -> bool:
    return excepts(path) or (path.startswith(LANGUAGE_MODEL) and excepts(path.removeprefix(LANGUAGE_MODEL)))


def _not_converted(quantization: Mapping[str, Any]) -> list[str]:
    """For what transformers wrote; `ignored_layers` is AutoFP8's word."""
    for key in ("modules_to_not_convert", "ignored_layers"):
        if quantization.get(key) is not None:
            return list(quantization[key])
    return [HEAD]


def _compressed_tensors(quantization: Mapping[str, Any]) -> FormatOf:
    _require(quantization, "quantization_status", ("compressed", "frozen", None))
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedFormat(f"the checkpoint is sparse ({sparsity})", hint="supported: dense weights")
    groups = [
        (_ranks(group.get("targets") or ()), _compressed_group(group, quantization.get("format")))
        for group in _need(quantization, "config_groups").values()
    ]
    ignored = _ranks(quantization.get("ignore") or ())

    def format_of(path: str) -> Format:
        if _excepted(path, lambda name: ignored(name) is not None):
            return PLAIN
        found = ((rank(path), format) for rank, format in groups)
        ranked = [(rank, format) for rank, format in found if rank is not None]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else PLAIN

    return format_of


def _compressed_group(group: Mapping[str, Any], default: str | None) -> Format:
    weights = group.get("weights")
    if weights is None:
        return PLAIN
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    layout = group.get("format") or default
    if layout == "nvfp4-pack-quantized":
        return nvfp4.Format("compressed_tensors")
    if layout == "mxfp4-pack-quantized":
        return mxfp4.Format("compressed_tensors")
    if (kind, bits) == ("float", 8):
        if strategy == "tensor":
            return fp8_tensor.Format()
        if strategy == "channel":
            return fp8_channel.Format()
        if strategy == "block":
            rows, columns = _need(weights, "block_structure")
            return fp8_block.Format((int(rows), int(columns)), scale="weight_scale")
    if (kind, bits, layout) == ("int", 4, "pack-quantized") and strategy in ("group", "channel"):
        if weights.get("actorder") in ("group", "dynamic"):
            raise UnsupportedFormat(
                f"int4 weights with actorder {weights['actorder']!r}", hint="supported: none, weight"
            )
        size = int(weights.get("group_size") or 0) if strategy == "group" else 0
        return int4_group.Format(size, bool(weights.get("symmetric", True)))
    raise UnsupportedFormat(
        f"compressed-tensors with {bits}-bit {kind} weights, strategy {strategy!r}, layout {layout!r}",
        hint="supported: 8-bit float per tensor, channel or block; 4-bit int pack-quantized; nvfp4, mxfp4",
    )


def _transformers_fp8(quantization: Mapping[str, Any]) -> FormatOf:
    """transformers' own, which always has a `weight_block_size`, or AutoFP8's, which never has."""
    block = quantization.get("weight_block_size")
    format: Format = fp8_tensor.Format()
    if block is not None:
        format = fp8_block.Format((int(block[0]), int(block[1])))
    elif "weight_block_size" in quantization:
        format = fp8_tensor.Format("weight_scale_inv", "activation_scale")
    return _all_but(format, _not_converted(quantization), matches_transformers)


def _mxfp4(quantization: Mapping[str, Any]) -> FormatOf:
    return _all_but(mxfp4.Format(), _not_converted(quantization), matches_transformers)


def _modelopt(quantization: Mapping[str, Any]) -> FormatOf:
    """config.json's own section, or hf_quant_config.json with its `quantization`."""
    inner = quantization.get("quantization", quantization)
    exceptions = list(inner.get("exclude_modules") or inner.get("ignore") or ())
    algorithms: dict[str, Format] = {"NVFP4": nvfp4.Format("modelopt"), "FP8": fp8_tensor.Format()}
    algorithm = str(inner.get("quant_algo"))
    if algorithm == "MIXED_PRECISION":
        layers = {path: str(entry["quant_algo"]) for path, entry in _need(inner, "quantized_layers").items()}
        for name in layers.values():
            _require({"quant_algo": name}, "quant_algo", tuple(algorithms))
        return lambda path: algorithms[layers[path]] if path in layers else PLAIN
    _require(inner, "quant_algo", tuple(algorithms))
    if algorithm == "NVFP4":
        _require(inner, "group_size", (nvfp4.GROUP, None))
    return _all_but(algorithms[algorithm], exceptions, matches_modelopt)


def _awq(quantization: Mapping[str, Any]) -> FormatOf:
    _require(quantization, "bits", (4,))
    _require(quantization, "version", ("gemm", None))
    _require(quantization, "zero_point", (True, None))
    exceptions = [HEAD, *(quantization.get("modules_to_not_convert") or ())]
    return _all_but(awq.Format(int(_need(quantization, "group_size"))), exceptions, matches_parts)


def _gptq(quantization: Mapping[str, Any]) -> FormatOf:
    """`dynamic` is GPTQModel's: "-:" and a regular expression, from the start, of modules left as they
    are."""
    _require(quantization, "bits", (4, 8))
    _require(quantization, "checkpoint_format", ("gptq", "gptq_v2", None))
    _require(quantization, "pack_dtype", ("int32", None))
    format = gptq.Format(
        group=max(0, int(_need(quantization, "group_size"))),
        bits=int(quantization["bits"]),
        zero_offset=0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
        desc_act=bool(quantization.get("desc_act", False)),
    )
    head = [] if quantization.get("lm_head") else [HEAD]
    listed = _all_but(format, [*head, *(quantization.get("modules_to_not_convert") or ())], matches_parts)
    dynamic = [str(pattern) for pattern in quantization.get("dynamic") or ()]
    for pattern in dynamic:
        if not pattern.startswith("-:"):
            raise UnsupportedFormat(
                f"the checkpoint's dynamic has {pattern!r}", hint='supported: exceptions only ("-:…")'
            )
    left_out = [pattern.removeprefix("-:") for pattern in dynamic]
    return lambda path: PLAIN if any(re.match(pattern, path) for pattern in left_out) else listed(path)


def _need(found: Mapping[str, Any], key: str) -> Any:
    if found.get(key) is None:
        method = f" of {found['quant_method']}" if "quant_method" in found else ""
        raise UnsupportedFormat(f"the checkpoint's quantization_config{method} has no {key!r}")
    return found[key]


def _require(found: Mapping[str, Any], key: str, supported: tuple[Any, ...]) -> None:
    if found.get(key) not in supported:
        raise UnsupportedFormat(
            f"the checkpoint's {key} is {found.get(key)!r}",
            hint=f"supported: {', '.join(str(value) for value in supported if value is not None)}",
        )
