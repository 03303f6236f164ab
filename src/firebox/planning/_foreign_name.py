"""Names of fused-MoE tuning files, as SGLang and vLLM build them before they look one up:

    SGLang   E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8,per_channel_quant=True_down.json
             E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[128, 128].json
    vLLM     E=160,N=384,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[128,128].json

Each part but the first three is left out where it says nothing: no dtype for bf16 and fp16, no block shape
for scales per tensor, channel or group, "per_channel_quant" only in SGLang's names, "_down" only in the names
of its files for the second product. A space in a device's name becomes an underscore, for vLLM a run of
spaces and slashes does; vLLM calls every device with the word H200 in its name "NVIDIA_H200". Anything else
in a name and the file is never found.

Sources: sgl-project/sglang fused_moe_triton_config.py, vllm-project/vllm fused_moe.py and config.py, both
get_config_file_name, of sglang 0.5.23 and vllm 0.33.0, read 2026-11-21.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from firebox.hardware.base import Gpu

SGLANG, VLLM = "sglang", "vllm"
SERVERS = (SGLANG, VLLM)
SPELLED = {SGLANG: "SGLang", VLLM: "vLLM"}
SHAPE = "E=<experts>,N=<width>,device_name=<device>[,dtype=<word>]….json"

# The words after "dtype=" → who asks for them; None is a name without one.
DTYPES: dict[str | None, tuple[str, ...]] = {
    None: SERVERS,
    "float32": SERVERS,
    "fp8_w8a8": SERVERS,
    "fp8_w8a16": (VLLM,),
    "int8_w8a8": (SGLANG,),
    "int8_w8a16": SERVERS,
    "int4_w4a16": SERVERS,
}
_PARTS = ("E", "N", "device_name", "dtype", "block_shape", "per_channel_quant")
_BLOCK = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*\]")


@dataclass(frozen=True)
class Name:
    """What a file's name says; None: nothing. `other`: parts of it that no server writes."""

    experts: int | None
    width: int | None
    device: str | None
    dtype: str | None
    block: tuple[int, int] | None
    per_channel: bool
    down: bool
    other: tuple[str, ...] = ()


def parse(text: str) -> Name:
    """A file's name, without folders. What cannot be read is in `other`."""
    stem = text.removesuffix(".json")
    down = stem.endswith("_down")
    found, other = dict[str, str](), []
    for part in re.split(r",(?![^\[]*\])", stem.removesuffix("_down")):
        key, is_pair, value = part.partition("=")
        if is_pair and key in _PARTS and key not in found and _reads(key, value):
            found[key] = value
        else:
            other.append(part)
    block = _BLOCK.fullmatch(found.get("block_shape", ""))
    return Name(
        experts=int(found["E"]) if "E" in found else None,
        width=int(found["N"]) if "N" in found else None,
        device=found.get("device_name"),
        dtype=found.get("dtype"),
        block=(int(block[1]), int(block[2])) if block else None,
        per_channel="per_channel_quant" in found,
        down=down,
        other=tuple(other),
    )


def _reads(key: str, value: str) -> bool:
    if key in ("E", "N"):
        return re.fullmatch(r"[1-9]\d*", value) is not None
    if key == "block_shape":
        return _BLOCK.fullmatch(value) is not None
    return value == "True" if key == "per_channel_quant" else value != ""


def file_name(server: str, name: Name) -> str | None:
    """The name under which `server` looks for a file with these facts; None where it never looks for one."""
    if name.experts is None or name.width is None or name.device is None:
        return None
    if server not in DTYPES.get(name.dtype, ()) or (server == VLLM and name.down):
        return None
    parts = [f"E={name.experts}", f"N={name.width}", f"device_name={name.device}"]
    if name.dtype is not None:
        parts.append(f"dtype={name.dtype}")
    if name.block is not None and all(name.block):
        shape = str(list(name.block))
        parts.append(f"block_shape={shape if server == SGLANG else shape.replace(' ', '')}")
    if name.per_channel and server == SGLANG:
        parts.append("per_channel_quant=True")
    return ",".join(parts) + ("_down" if name.down else "") + ".json"


def devices(server: str, gpu: Gpu) -> tuple[str, ...]:
    """How `server` writes the names by which CUDA may call this GPU."""
    if server == VLLM:
        spelled = [re.sub(r"[\s/]+", "_", name) for name in gpu.device_names]
        spelled = ["NVIDIA_H200" if "H200" in name.split("_") else name for name in spelled]
    else:
        spelled = [name.replace(" ", "_") for name in gpu.device_names]
    return tuple(dict.fromkeys(spelled))


def askers(text: str, name: Name, gpu: Gpu) -> tuple[str, ...]:
    """The servers that look for a file of exactly this name on this GPU, for some model."""
    sound = not list(_scale_faults(name))
    return tuple(
        server
        for server in SERVERS
        if name.device in devices(server, gpu) and sound and file_name(server, name) == text
    )


def warnings(text: str, name: Name, gpu: Gpu) -> Iterator[str]:
    """Why the name would never be looked up on this GPU, whatever the model; one sentence a reason. Nothing
    if some server would look for it."""
    reasons = [*_part_faults(name), *_dtype_faults(name), *_device_faults(name, gpu), *_scale_faults(name)]
    yield from reasons
    if not reasons and not askers(text, name, gpu):
        asked = dict.fromkeys(found for server in SERVERS if (found := file_name(server, name)))
        yield f"the parts are not spelled or ordered as servers write them: {' or '.join(asked)}"


def _part_faults(name: Name) -> Iterator[str]:
    first = {"E": name.experts, "N": name.width, "device_name": name.device}
    missing = [key for key, value in first.items() if value is None]
    if missing:
        yield f"the name has no {', '.join(missing)}: servers look for {SHAPE}"
    for part in name.other:
        yield f"the name has {part!r}, which no server writes"


def _dtype_faults(name: Name) -> Iterator[str]:
    if name.dtype not in DTYPES:
        words = ", ".join(word for word in DTYPES if word is not None)
        yield (
            f"dtype={name.dtype} is a word of neither SGLang nor vLLM ({words}); judged as "
            f"{judged_as(name.dtype)}"
        )
    elif name.down and SGLANG not in DTYPES[name.dtype]:
        yield f"only SGLang reads files that end in _down, and it has no dtype={name.dtype}"


def _device_faults(name: Name, gpu: Gpu) -> Iterator[str]:
    known = dict.fromkeys(device for server in SERVERS for device in devices(server, gpu))
    if name.device is not None and name.device not in known:
        yield f"device_name={name.device} is not what {gpu.name} is called: {' or '.join(known)}"


def _scale_faults(name: Name) -> Iterator[str]:
    """What the dtype needs of block_shape and per_channel_quant."""
    if name.dtype == "int8_w8a8" and name.block is None and not name.per_channel:
        yield (
            "dtype=int8_w8a8 without per_channel_quant=True or block_shape: SGLang has no int8 with one "
            "scale a tensor"
        )
    if name.per_channel and name.dtype not in ("fp8_w8a8", "int8_w8a8"):
        yield (
            f"per_channel_quant=True does not go with dtype={name.dtype}: only fp8_w8a8 and int8_w8a8 have it"
        )
    if name.block is not None and name.dtype not in ("fp8_w8a8", "int8_w8a8"):
        yield f"block_shape does not go with dtype={name.dtype}: only fp8_w8a8 and int8_w8a8 have it"
    if name.block is not None and name.per_channel:
        yield "block_shape and per_channel_quant=True exclude each other"
    if name.block is not None and 0 in name.block:
        yield f"block_shape={list(name.block)} has a zero, and servers leave such a shape out"


def judged_as(dtype: str | None) -> str:
    """The word whose operands a file is compiled with: its own, or for one that no server knows the nearest
    that we have."""
    if dtype is None:
        return "bf16"
    if dtype in DTYPES:
        return dtype
    return "int4_w4a16" if re.search(r"4_w4a16$", dtype) else "bf16"
