"""Judges a fused-MoE tuning file that was made for SGLang or vLLM: does every entry fit a GPU that need not
be here, and would a server ever look the file up?

    judge(path, gpu) → Verdict

Each entry is compiled as the product the servers run (`_foreign_kernel.py`), on operands as the file's name
says; entries that differ in GROUP_SIZE_M alone are one compile. Where the scales are in blocks, BLOCK_SIZE_K
is at most the block, as in vLLM. What the name does not say is a run-time argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firebox.errors import ConfigError
from firebox.hardware.base import Gpu
from firebox.kernels.compile import Compiled, compile_all
from firebox.planning import _foreign_file, _foreign_name
from firebox.planning._foreign_file import TRITON_VERSION, USE_TMA, TuningFile
from firebox.planning._foreign_model import ExpertShape, asks, model_warnings
from firebox.planning._foreign_name import SGLANG, Name

if TYPE_CHECKING:
    from firebox.planning._foreign_kernel import Operands, Tile

GROUP = 128  # weights of an int4 group: no name says it


@dataclass(frozen=True)
class Verdict:
    """What became of a file. `keys`: number of tokens → its compile; `tiles`: → what was compiled;
    `judged_as`: the dtype word whose operands were; `looked_up_by`: the servers that would look for this
    name; `warnings`: one sentence each."""

    path: Path
    gpu: Gpu
    judged_as: str
    looked_up_by: tuple[str, ...]
    keys: Mapping[str, Compiled]
    tiles: Mapping[str, Tile]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Every entry compiles and fits."""
        return all(compiled.fits for compiled in self.keys.values())

    def document(self) -> dict[str, Any]:
        """As `firebox fit --moe-config --json` prints it."""
        return {
            "fits": self.fits,
            "file": str(self.path),
            "gpu": self.gpu.name,
            "judged_as": self.judged_as,
            "looked_up_by": list(self.looked_up_by),
            "keys": {key: _row(compiled) for key, compiled in self.keys.items()},
            "warnings": list(self.warnings),
        }


def judge(path: Path, gpu: Gpu, shape: ExpertShape | None = None) -> Verdict:
    """Compiles every entry of the file for `gpu`, and holds its name against the GPU's and, where given, the
    model's. Raises ConfigError for a file that cannot be judged."""
    from firebox.planning._foreign_kernel import request  # Triton

    file, name = _foreign_file.read(path), _foreign_name.parse(path.name)
    operands = operands_of(name)
    tiles = {key: tile_of(entry, name, operands) for key, entry in file.entries.items()}
    requests = [request(operands, tile, name.down, gpu) for tile in tiles.values()]
    keys = dict(zip(tiles, compile_all(requests), strict=True))
    askers = _foreign_name.askers(path.name, name, gpu)
    if shape is not None:
        askers = tuple(server for server in askers if asks(server, path.name, shape, name))
    return Verdict(
        path=path,
        gpu=gpu,
        judged_as=_foreign_name.judged_as(name.dtype),
        looked_up_by=askers,
        keys=keys,
        tiles=tiles,
        warnings=(
            *_foreign_name.warnings(path.name, name, gpu),
            *(() if shape is None else model_warnings(path.name, name, shape)),
            *file.warnings,
            *_tile_warnings(file, tiles),
            *_twin_warnings(file, name),
            *_version_warnings(file, askers, next(iter(keys.values())).triton),
        ),
    )


def operands_of(name: Name) -> Operands:
    """What a name's dtype word means. Scales: of weights alone a channel or (int4) a group, else as the name
    says. "bf16" stands for fp16 too, which needs the same bytes."""
    from firebox.planning._foreign_kernel import Operands

    block = _block(name)
    scales = "block" if block else "channel" if name.per_channel else "tensor"
    known = {
        "bf16": Operands("bf16", "bf16", "bf16"),
        "float32": Operands("fp32", "fp32", "tf32"),
        "fp8_w8a8": Operands("fp8e4nv", "fp8e4nv", "fp8", scales, block or (1, 1)),
        "fp8_w8a16": Operands("bf16", "fp8e4nv", "bf16", "weight"),
        "int8_w8a8": Operands("i8", "i8", "int8", scales, block or (1, 1)),
        "int8_w8a16": Operands("bf16", "i8", "bf16", "weight"),
        "int4_w4a16": Operands("bf16", "u8", "bf16", "group", (1, GROUP), int4=True),
    }
    return known[_foreign_name.judged_as(name.dtype)]


def _block(name: Name) -> tuple[int, int] | None:
    return name.block if name.block is not None and all(name.block) else None


def tile_of(entry: Mapping[str, Any], name: Name, operands: Operands) -> Tile:
    """What an entry of a file with this name is compiled as."""
    from firebox.planning._foreign_kernel import Tile

    block = operands.block if operands.scales == "block" else ()
    return Tile(
        block_m=entry["BLOCK_SIZE_M"],
        block_n=entry["BLOCK_SIZE_N"],
        block_k=min((entry["BLOCK_SIZE_K"], *block)),
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
        tma=bool(entry.get(USE_TMA)) and name.down and not operands.int4,
    )


def _tile_warnings(file: TuningFile, tiles: Mapping[str, Tile]) -> Iterator[str]:
    for key, entry in file.entries.items():
        if tiles[key].block_k < entry["BLOCK_SIZE_K"]:
            yield (
                f"key {key}: BLOCK_SIZE_K = {entry['BLOCK_SIZE_K']} is more than a block of scales; judged "
                f"with {tiles[key].block_k}, as vLLM runs it; SGLang cuts nothing and takes one scale for all"
            )
        if entry.get(USE_TMA) and not tiles[key].tma:
            yield f"key {key}: {USE_TMA} is for SGLang's _down files without int4; judged without"


def _twin_warnings(file: TuningFile, name: Name) -> Iterator[str]:
    """SGLang reads one file for gate and up, and one with "_down" for the second product."""
    stem = file.path.stem
    twin = file.path.with_name((stem.removesuffix("_down") if name.down else f"{stem}_down") + ".json")
    if not twin.exists():
        return
    try:
        other = _foreign_file.read(twin).entries
    except ConfigError as error:
        yield f"the other product's file cannot be read: {error}"
        return
    if other == file.entries:
        which = "the first product's" if name.down else "the second product's"
        yield f"the entries are those of {which} file, {twin.name}: one of the two was not tuned for its own"
    for key, entry in file.entries.items():
        rows = other.get(key, entry)["BLOCK_SIZE_M"]
        if name.down and rows != entry["BLOCK_SIZE_M"]:
            yield (
                f"key {key}: BLOCK_SIZE_M = {entry['BLOCK_SIZE_M']}, but SGLang sorts rows once, for the "
                f"first product's {rows}, and runs both with that"
            )


def _version_warnings(file: TuningFile, askers: tuple[str, ...], ours: str) -> Iterator[str]:
    said = file.triton_version
    if said is not None and said != ours:
        yield f"tuned with Triton {said}; this is {ours}"
    if said is not None and SGLANG in askers:
        yield f"SGLang fails to read the file: it takes the key {TRITON_VERSION!r} for a number of tokens"
    folder = file.path.resolve().parent.name
    if folder.startswith("triton_") and folder != f"triton_{ours.replace('.', '_')}":
        yield f"the folder is {folder}, where SGLang keeps files for that version of Triton; this is {ours}"


def _row(compiled: Compiled) -> dict[str, Any]:
    return {
        "shared_bytes": compiled.shared_bytes,
        "limit_bytes": compiled.limit_bytes,
        "fits": compiled.fits,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "instruction": compiled.instruction,
        "native": compiled.native,
        "error": compiled.error,
    }
