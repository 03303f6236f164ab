"""Which format each module of a checkpoint is stored in, as its quantization_config says.

`formats_of(config)` gives a function from a module's path ("model.layers.3.mlp.experts.7.down_proj") to its
Format. Lists of exceptions are matched the way the library that wrote them matches them:

    compressed-tensors   whole names, or a regular expression from the start after "re:"; a class name such as
                         "Linear" means all
    transformers         (fp8, mxfp4, awq, gptq) a regular expression from the start up to a module border, or
                         the end of the name
    modelopt             shell patterns over whole names
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firebox.errors import UnsupportedFormat
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.base import Format, FormatOf

Match = Callable[[str, Sequence[str]], bool]  # does any of these patterns mean the module?
PLAIN = bf16.Format()


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
        "mxfp4": lambda found: _all_but(mxfp4.Format(), _not_converted(found), matches_transformers),
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
    """As `compressed_tensors.utils.match.match_name`; "Linear" means every module here, since only linear
    ones are asked about."""
    return any(
        re.match(pattern.removeprefix("re:"), path) is not None
        if pattern.startswith("re:")
        else pattern in (path, "Linear")
        for pattern in patterns
    )


def matches_transformers(path: str, patterns: Sequence[str]) -> bool:
    """As transformers' `should_convert_module`: "mlp.gate" is not "mlp.gate_proj", and "layers.1" is not
    "layers.11"."""
    border = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{pattern}){border}", path) or path.endswith(pattern) for pattern in patterns)


def matches_modelopt(path: str, patterns: Sequence[str]) -> bool:
    """Shell patterns over the whole name, or over a module that contains it ("model.layers.92" excludes all
    of layer 92)."""
    parts = path.split(".")
    heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _all_but(format: Format, exceptions: Sequence[str], match: Match) -> FormatOf:
    return lambda path: PLAIN if match(path, exceptions) else format


def _not_converted(quantization: Mapping[str, Any]) -> list[str]:
    return list(quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or ())


def _compressed_tensors(quantization: Mapping[str, Any]) -> FormatOf:
    _require(quantization, "quantization_status", ("compressed", "frozen", None))
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedFormat(f"the checkpoint is sparse ({sparsity})", hint="supported: dense weights")
    groups = [
        (list(group.get("targets") or ()), _compressed_group(group, quantization.get("format")))
        for group in _need(quantization, "config_groups").values()
    ]
    ignore = list(quantization.get("ignore") or ())

    def format_of(path: str) -> Format:
        if matches_compressed_tensors(path, ignore):
            return PLAIN
        # a group that names the module goes before one that means all linear ones
        for wanted_class in (False, True):
            for targets, format in groups:
                named = [target for target in targets if (target == "Linear") == wanted_class]
                if matches_compressed_tensors(path, named):
                    return format
        return PLAIN

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
    block = quantization.get("weight_block_size")
    format = fp8_tensor.Format() if block is None else fp8_block.Format((int(block[0]), int(block[1])))
    return _all_but(format, _not_converted(quantization), matches_transformers)


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
    return _all_but(algorithms[algorithm], exceptions, matches_modelopt)


def _awq(quantization: Mapping[str, Any]) -> FormatOf:
    _require(quantization, "bits", (4,))
    _require(quantization, "version", ("gemm", None))
    _require(quantization, "zero_point", (True, None))
    format = awq.Format(int(_need(quantization, "group_size")))
    return _all_but(format, _not_converted(quantization), matches_transformers)


def _gptq(quantization: Mapping[str, Any]) -> FormatOf:
    _require(quantization, "bits", (4, 8))
    _require(quantization, "checkpoint_format", ("gptq", "gptq_v2", None))
    format = gptq.Format(
        group=max(0, int(_need(quantization, "group_size"))),
        bits=int(quantization["bits"]),
        zero_offset=0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
        desc_act=bool(quantization.get("desc_act", False)),
    )
    return _all_but(format, _not_converted(quantization), matches_transformers)


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
