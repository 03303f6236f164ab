"""Writes tests/support/foreign_names.json: what SGLang and vLLM call their tuning files, by their own code.

    pip download --no-deps --only-binary :all: -d wheels sglang vllm     # by hand; nothing is installed
    unzip wheels/sglang-*.whl -d unpacked; unzip wheels/vllm-*.whl -d unpacked
    python tools/record_foreign_names.py unpacked

Their functions are taken out of their files one by one and run with stand-ins for what they ask of the
machine, so that neither package is imported. The grid is small enough to read, and varies everything that a
name can say.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "tests/support/foreign_names.json"
SGLANG = "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py"
VLLM = "vllm/model_executor/layers/fused_moe/fused_moe.py"
VLLM_DTYPES = "vllm/model_executor/layers/fused_moe/config.py"
VLLM_DEVICE = "vllm/utils/platform_utils.py"

# experts, width, device: as CUDA would report it; one with a slash and one with two spaces
SHAPES = (
    (160, 384, "NVIDIA GB10"),
    (161, 384, "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
    (512, 256, "NVIDIA H200"),
    (8, 7168, "NVIDIA H200 NVL"),
    (384, 128, "NVIDIA A100-SXM4/80GB"),
    (1, 1, "Some  GPU"),
)
BLOCKS = (None, [128, 128], [0, 32])
FLAGS = ("use_fp8_w8a8", "use_fp8_w8a16", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")
# weights of the second product as a server holds them, [experts, hidden, width or bytes]; dtype, block,
# per channel
WEIGHTS = (
    ("glm-4.7-fp8", 4, (160, 5120, 384), "fp8_w8a8", None, True),
    ("glm-4.7-fp8 fused", 4, (161, 5120, 384), "fp8_w8a8", None, True),
    ("kimi-k2.5-int4", 8, (384, 7168, 256 // 2), "int4_w4a16", [0, 32], False),
    ("qwen3-30b-a3b", 4, (128, 2048, 192), None, None, False),
    ("qwen3.5-397b-a17b-fp8", 4, (512, 4096, 256), "fp8_w8a8", [128, 128], False),
)


def function(path: Path, name: str, **world: Any) -> Callable[..., Any]:
    """The function of that name, its decorators and annotations left out, in a world of its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, found], []))
    space: dict[str, Any] = dict(world)
    exec(compile(module, str(path), "exec"), space)
    result: Callable[..., Any] = space[name]
    return result


class Servers:
    """Both servers' functions, on a machine whose device can be chosen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = ""
        self.asked: list[str] = []
        torch = types.SimpleNamespace(float=object())
        sys.modules["vllm.platforms"] = types.ModuleType("vllm.platforms")
        platform = types.SimpleNamespace(get_device_name=lambda _=0: self.device)
        sys.modules["vllm.platforms"].current_platform = platform  # type: ignore[attr-defined]
        spelled = function(folder / VLLM_DEVICE, "get_device_name_as_file_name", re=re)
        self.names = {
            "sglang": function(folder / SGLANG, "get_config_file_name", get_device_name=lambda: self.device),
            "vllm": function(folder / VLLM, "get_config_file_name", get_device_name_as_file_name=spelled),
        }
        self.words = {
            "sglang": function(folder / SGLANG, "get_config_dtype_str", torch=torch),
            "vllm": function(folder / VLLM_DTYPES, "_get_config_dtype_str", torch=torch),
        }
        self.float32 = torch.float

    def dtypes(self, server: str) -> list[str | None]:
        """The words that the server's function can return."""
        word = self.words[server]
        known = word.__code__.co_varnames[: word.__code__.co_argcount]
        found = [word(dtype=None), word(dtype=self.float32)]
        return found + [word(dtype=None, **{flag: True}) for flag in FLAGS if flag in known]

    def rows(self, server: str) -> Iterator[list[Any]]:
        """[experts, width, device, dtype, block, per channel, down, name]."""
        further = (
            [(p, d) for p in (False, True) for d in (False, True)] if server == "sglang" else [(False, False)]
        )
        for experts, width, device in SHAPES:
            self.device = device
            for dtype in self.dtypes(server):
                for block in BLOCKS:
                    for per_channel, down in further:
                        more = (per_channel, down) if server == "sglang" else ()
                        name = self.names[server](experts, width, dtype, block, *more)
                        yield [experts, width, device, dtype, block, per_channel, down, name]

    def lookups(self, server: str) -> Iterator[dict[str, Any]]:
        """Which names `try_get_optimal_moe_config` asks for, given a model's weights on a GB10."""
        path = self.folder / (SGLANG if server == "sglang" else VLLM)
        package = {
            "sglang": "sglang.srt.layers.moe.moe_runner.triton_utils",
            "vllm": "vllm.model_executor.layers.fused_moe",
        }[server]
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].get_config = lambda: None  # type: ignore[attr-defined]
        self.device = "NVIDIA GB10"
        choose = function(path, "try_get_optimal_moe_config", get_moe_configs=self._ask(server))
        for model, tp, shape, dtype, block, per_channel in WEIGHTS:
            self.asked.clear()
            more = (
                {"per_channel_quant": per_channel, "return_down_config": True} if server == "sglang" else {}
            )
            choose((shape[0], 0, 0), shape, 8, dtype, 64, block_shape=block, **more)
            yield {"model": model, "tp": tp, "names": list(self.asked)}

    def _ask(self, server: str) -> Callable[..., dict[int, dict[str, int]]]:
        def get_moe_configs(
            experts: int, width: int, dtype: str | None, block_n: int = 0, block_k: int = 0, **more: bool
        ) -> dict[int, dict[str, int]]:
            self.asked.append(self.names[server](experts, width, dtype, [block_n, block_k], **more))
            return {64: {"BLOCK_SIZE_M": 16}}

        return get_moe_configs


def version(folder: Path, package: str) -> str:
    """Of the unpacked wheel."""
    found = next(folder.glob(f"{package}-*.dist-info"))
    return found.name.removesuffix(".dist-info").partition("-")[2]


def main() -> None:
    folder = Path(sys.argv[1])
    servers = Servers(folder)
    recorded = {
        server: {
            "version": version(folder, server),
            "dtypes": servers.dtypes(server),
            "lookups": list(servers.lookups(server)),
            "rows": list(servers.rows(server)),
        }
        for server in ("sglang", "vllm")
    }
    OUTPUT.write_text(_lines(recorded), encoding="utf-8")
    print({server: len(found["rows"]) for server, found in recorded.items()}, "rows in", OUTPUT)


def _lines(recorded: dict[str, Any]) -> str:
    """JSON with one row a line."""
    text = json.dumps(recorded)
    row = r'(?=\[\d+, \d+, "|\{"model")'
    return re.sub(rf"(,|\[) ?{row}", r"\1\n", text) + "\n"


if __name__ == "__main__":
    main()
