"""The house rules of docs/architecture.md, read from the source: who may import whom, and what may be done in
one place only.

Every file under src/firebox is parsed. An import counts wherever it stands: at the head, inside a function,
under TYPE_CHECKING, relative, as `importlib.import_module("firebox.…")` or as `find.load("room", name)`. A
rule is a function from a file to offences; RED shows each rule a source that breaks it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.support.source_tree import File, find_cycle, import_graph, within

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "firebox"
MAX_LINES = 600

# Level 0, open to every room.
OPEN = ("errors", "env", "find", "step", "hardware")

# Room → what it may import, besides itself and (from level 1 on) OPEN. A room may only look up this list.
TABLE: dict[str, tuple[str, ...]] = {
    # level 0
    "errors": (),
    "env": ("errors",),
    "find": ("errors",),
    "step": (),
    "hardware": ("errors", "env", "find"),
    "config": ("errors", "hardware"),
    # level 1
    "formats": ("config",),
    "parallel": ("config",),
    "text": ("config",),
    # level 2
    "kernels": ("formats.base", "formats.layouts"),
    "cache": ("formats",),
    # level 3
    "attention": ("kernels", "cache", "formats"),
    # level 4
    "layers": ("attention.base", "kernels", "formats", "parallel"),
    # level 5
    "models": ("layers", "cache.specs"),
    # level 6
    "weights": ("models.base", "formats", "parallel"),
    # level 7: levels 1 to 6 less text
    "engine": (
        "config",
        "formats",
        "parallel",
        "kernels",
        "cache",
        "attention",
        "layers",
        "models",
        "weights",
    ),
    # level 8; `answer` is what server and llm share: text in, text out
    "answer": ("engine.client", "text", "config"),
    "llm": ("answer", "engine.client", "text", "config"),
    "server": ("answer", "engine.client", "text", "config"),
    "planning": (
        "models",
        "layers",
        "kernels",
        "formats",
        "cache.specs",
        "parallel",
        "weights.cuts",
        "engine.memory",
        "config",
    ),
    # level 9
    "bench": (
        "kernels",
        "formats",
        "cache.pool",
        "layers.experts",
        "weights.checkpoint",
        "llm",
        "engine",
        "text",
        "planning",
        "config",
    ),
    # level 10
    "tuning": (
        "kernels",
        "formats",
        "attention",
        "layers",
        "planning",
        "engine",
        "bench.timer",
        "bench.statistics",
        "config",
    ),
    "matrix": ("bench", "planning", "config"),
    # level 11
    "cli": ("*",),
    "__main__": ("cli",),
}
OPTIONAL_ROOMS = {"answer"}
DATA_ROOMS = ("assets", "tuned")
ROOT_MODULE = ("llm",)  # firebox/__init__.py offers firebox.LLM; importing that name is importing llm

WEB_FRAMEWORK = ("fastapi", "starlette", "uvicorn")
DRIVER_QUERIES = (
    "pynvml",
    "psutil",
    *(
        f"torch.cuda.{name}"
        for name in ("get_device_properties", "mem_get_info", "device_count", "is_available")
    ),
    *(f"torch.cuda.{name}" for name in ("get_device_name", "get_device_capability")),
)
DRIVER_WORDS = ("nvidia-smi", "/proc/meminfo")
ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
UNSAFE = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load")


def room_of(name: str) -> str:
    """The room of a dotted Firebox name; "" for firebox/__init__.py and the names it offers."""
    room = [*name.split("."), ""][1]
    return room if room in TABLE or room in DATA_ROOMS or room.islower() else ""


# ---- the rules: File → (line, offence)

Offences = Iterator[tuple[int, str]]
Rule = Callable[[File], Offences]


def import_table(file: File) -> Offences:
    """A room imports itself, what TABLE lists for it, and OPEN."""
    allowed = ROOT_MODULE if file.room == "" else TABLE.get(file.room, ())
    if "*" in allowed:
        return
    shared = () if file.room in (*OPEN, "config") else OPEN
    for line, name in file.firebox_imports:
        inner = name.partition(".")[2] if room_of(name) else "llm"
        own = file.room != "" and within(inner, file.room)
        if not own and not any(within(inner, prefix) for prefix in (*allowed, *shared)):
            may = ", ".join((*allowed, *shared)) or "nothing"
            yield line, f"imports {name}; {file.room or 'firebox/__init__.py'} may import {may}"


def known_room(file: File) -> Offences:
    """Every file stands in a room of TABLE; data rooms hold no code."""
    if file.room and file.room not in TABLE:
        yield 1, f"stands in {file.room}, which is not a room of the table"


def discovery_only_in_find(file: File) -> Offences:
    """Modules are found by name in find.py alone; elsewhere `find.load` gets a literal room, so that this
    file can see it."""
    for line, function, arguments in file.calls:
        literal = bool(arguments and arguments[0])
        if function in ("importlib.import_module", "__import__") and not literal and file.path != "find.py":
            yield line, f"calls {function} with a computed name; use find.load"
        if function == "firebox.find.load" and not literal:
            yield line, "calls find.load with a computed room; write the room out"


def distributed_only_in_parallel(file: File) -> Offences:
    """torch.distributed only in parallel/."""
    if file.room != "parallel":
        yield from _mentioned(file, ("torch.distributed",), "belongs in parallel/")


def driver_only_in_probe(file: File) -> Offences:
    """The driver and the operating system are asked about hardware only in hardware/probe.py."""
    if file.path == "hardware/probe.py":
        return
    yield from _mentioned(file, DRIVER_QUERIES, "belongs in hardware/probe.py")
    for line, text in file.strings:
        for word in DRIVER_WORDS:
            if word in text:
                yield line, f"{word} belongs in hardware/probe.py"


def environment_only_in_env(file: File) -> Offences:
    """os.environ only in env.py."""
    if file.path != "env.py":
        yield from _mentioned(file, ENVIRONMENT, "belongs in env.py")


def web_framework_only_in_server(file: File) -> Offences:
    """fastapi, starlette and uvicorn only in server/."""
    if file.room != "server":
        yield from _mentioned(file, WEB_FRAMEWORK, "belongs in server/")


def no_code_from_data(file: File) -> Offences:
    """Nothing that can run code from a file it reads: no pickle in any guise, no torch.load, no remote
    code."""
    yield from _mentioned(file, UNSAFE, "can run code from a file")
    for node in ast.walk(file.tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not _is_false(node.value):
            yield node.value.lineno, "trust_remote_code runs code from a checkpoint"


def module_docstring(file: File) -> Offences:
    """Every file says what it is."""
    if not ast.get_docstring(file.tree):
        yield 1, "has no module docstring"


def at_most_600_lines(file: File) -> Offences:
    """Near 500 look for the second job; nothing passes 600."""
    lines = len(file.text.splitlines())
    if lines > MAX_LINES:
        yield lines, f"has {lines} lines; the limit is {MAX_LINES}"


def third_party_is_declared(file: File) -> Offences:
    """What is imported is a dependency in pyproject.toml, not something that another package happens to
    bring."""
    for line, name in file.imports:
        top = name.split(".")[0]
        if top != "firebox" and top not in sys.stdlib_module_names and not DECLARED & _distributions(top):
            yield line, f"imports {top}, which is not among the dependencies in pyproject.toml"


RULES: tuple[Rule, ...] = (
    import_table,
    known_room,
    discovery_only_in_find,
    distributed_only_in_parallel,
    driver_only_in_probe,
    environment_only_in_env,
    web_framework_only_in_server,
    no_code_from_data,
    module_docstring,
    at_most_600_lines,
    third_party_is_declared,
)


def _mentioned(file: File, names: tuple[str, ...], reason: str) -> Offences:
    seen = set()
    for line, mention in file.mentions:
        for name in names:
            if within(mention, name) and (line, name) not in seen:
                seen.add((line, name))
                yield line, f"{name} {reason}"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _distributions(top: str) -> set[str]:
    return {_normal(name) for name in DISTRIBUTIONS.get(top, [top])}


def _declared() -> set[str]:
    """Dependencies, and those of the extra `report`, which is for users too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["report"]]
    lines += project["optional-dependencies"]["cluster"]
    return {_normal(re.split(r"[^\w.-]", line)[0]) for line in lines}


DISTRIBUTIONS = packages_distributions()
DECLARED = _declared()
FILES = [
    File(path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
]


# ---- the tree as it is


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    offences = [
        f"src/firebox/{file.path}:{line}: {offence}" for file in FILES for line, offence in rule(file)
    ]
    assert not offences, "\n" + "\n".join(offences)


def test_no_import_cycles() -> None:
    cycle = find_cycle(import_graph(FILES))
    assert cycle is None, " → ".join(cycle or [])


def test_every_room_exists() -> None:
    rooms = {path.stem for path in SOURCE.iterdir()}
    missing = [room for room in (*TABLE, *DATA_ROOMS) if room not in rooms | OPTIONAL_ROOMS]
    assert not missing, f"rooms of the table that are not in src/firebox: {', '.join(missing)}"


def test_table_looks_up_only() -> None:
    """A room may import only rooms that stand before it in TABLE: the levels."""
    before: set[str] = set()
    for room, allowed in TABLE.items():
        later = [name for name in allowed if name != "*" and name.split(".")[0] not in before]
        assert not later, f"{room} may import {', '.join(later)}, which stand at its level or above"
        before.add(room)


def test_documented_table_is_this_one() -> None:
    """docs/architecture.md lists the same rooms, in the same order, with the same imports."""
    documented: dict[str, tuple[str, ...]] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| \d+ \| `(\w+)(?:/|\.py)` \| .* \| (.+) \|", line):
            room, allowed = match.groups()
            documented[room] = {"nothing": (), "any room": ("*",)}.get(allowed, tuple(allowed.split(", ")))
    expected = {room: allowed for room, allowed in TABLE.items() if room != "__main__"}
    assert documented == expected
    assert list(documented) == list(expected)


# ---- each rule sees red, and stays green where nothing is wrong

RED: dict[Rule, list[tuple[str, str]]] = {
    import_table: [
        ("engine/loop.py", "import firebox.text.stream"),
        ("engine/loop.py", "from firebox.text import stream"),
        ("engine/loop.py", "from ..text.stream import TokenStream"),
        ("engine/loop.py", "def f():\n    from firebox.server import app"),
        (
            "cache/pages.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import firebox.engine.request",
        ),
        ("kernels/plan.py", "import importlib\nimportlib.import_module('firebox.tuning.search')"),
        ("kernels/plan.py", "from importlib import import_module as im\nim('firebox.models.base')"),
        ("kernels/select.py", "from firebox import find\nfind.load('formats', name)"),
        ("models/glm4_moe.py", "from firebox.find import load\nload('attention', 'torch_reference')"),
        ("layers/attention.py", "from firebox.attention import torch_reference"),
        ("models/glm4_moe.py", "from firebox.cache.pool import LayerCache"),
        ("weights/load.py", "from firebox.models.glm4_moe import Model"),
        ("server/app.py", "from firebox.engine.messages import Delta"),
        ("bench/offline.py", "from firebox.models.glm4_moe import Model"),
        ("planning/fit.py", "from firebox.engine import scheduler"),
        ("planning/fit.py", "from firebox.weights.load import load_weights"),
        ("config.py", "from firebox.env import cache_dir"),
        ("errors.py", "import firebox.find"),
        ("text/chat.py", "from firebox import LLM"),
        ("text/chat.py", "import firebox\nfirebox.LLM()"),
        ("text/chat.py", "import firebox.errors\nfirebox.engine.client.AsyncEngine()"),
        ("__init__.py", "from firebox.engine.client import AsyncEngine"),
    ],
    known_room: [
        ("utils/misc.py", ""),
        ("assets/__init__.py", ""),
    ],
    discovery_only_in_find: [
        ("weights/load.py", "import importlib\nimportlib.import_module(f'firebox.formats.{x}')"),
        ("weights/load.py", "__import__(name)"),
        ("engine/runner.py", "from firebox import find\nfind.load(room, 'glm4_moe')"),
    ],
    distributed_only_in_parallel: [
        ("engine/runner.py", "import torch\ntorch.distributed.init_process_group()"),
        ("layers/moe.py", "import torch.distributed as dist"),
        ("layers/moe.py", "def f():\n    from torch import distributed"),
    ],
    driver_only_in_probe: [
        ("engine/memory.py", "import torch\ntorch.cuda.mem_get_info()"),
        ("kernels/base.py", "from torch.cuda import get_device_capability"),
        ("kernels/base.py", "from torch import cuda\ncuda.device_count()"),
        ("hardware/base.py", "import pynvml"),
        ("engine/memory.py", "def f():\n    import psutil"),
        ("cli/doctor.py", "import subprocess\nsubprocess.run(['nvidia-smi', '-L'])"),
        ("engine/memory.py", "open('/proc/meminfo')"),
    ],
    environment_only_in_env: [
        ("cli/main.py", "import os\nos.environ['X'] = '1'"),
        ("cli/main.py", "import os as system\nsystem.getenv('X')"),
        ("kernels/base.py", "from os import environ"),
    ],
    web_framework_only_in_server: [
        ("llm.py", "import uvicorn"),
        ("cli/serve.py", "def f():\n    from fastapi.responses import Response"),
        ("bench/serve.py", "from starlette import status"),
    ],
    no_code_from_data: [
        ("weights/checkpoint.py", "import pickle"),
        ("weights/checkpoint.py", "import torch\ntorch.load('x.bin')"),
        ("text/tokenizer.py", "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)"),
        ("text/tokenizer.py", "AutoTokenizer.from_pretrained(folder, trust_remote_code=flag)"),
    ],
    module_docstring: [
        ("engine/loop.py", "import os"),
    ],
    at_most_600_lines: [
        ("engine/loop.py", "x = 1\n" * 601),
    ],
    third_party_is_declared: [
        ("engine/loop.py", "import leftpad"),
        ("engine/loop.py", "import pytest"),
    ],
}

GREEN: dict[Rule, list[tuple[str, str]]] = {
    import_table: [
        ("engine/loop.py", "import firebox.errors\nfrom firebox.engine.request import Request"),
        (
            "engine/loop.py",
            "from . import request\nfrom .. import config\nfrom ..cache.pool import LayerCache",
        ),
        ("engine/runner.py", "from firebox import find\nfind.load('models', name)"),
        ("kernels/plan.py", "from firebox.formats.base import Format\nfrom firebox.hardware.base import Gpu"),
        (
            "layers/attention.py",
            "from firebox.attention.base import Backend\nfrom firebox.attention import base",
        ),
        ("models/glm4_moe.py", "from firebox.cache import specs\nfrom firebox.layers.moe import Experts"),
        ("server/app.py", "from firebox.engine.client import AsyncEngine\nfrom firebox.engine import client"),
        ("server/app.py", "import firebox.engine.client\nfirebox.engine.client.AsyncEngine.connect()"),
        ("server/app.py", "from firebox import __version__\nimport firebox\nfirebox.__version__"),
        ("cli/main.py", "from firebox import LLM\nimport firebox.engine.loop"),
        ("__init__.py", "def __getattr__(name):\n    from firebox.llm import LLM"),
        ("hardware/probe.py", "from firebox import env, find\nfind.load('hardware', name)"),
    ],
    discovery_only_in_find: [
        ("find.py", "import importlib\nimportlib.import_module(f'firebox.{room}')"),
    ],
    distributed_only_in_parallel: [
        ("parallel/groups.py", "import torch.distributed"),
    ],
    driver_only_in_probe: [
        ("hardware/probe.py", "import torch\ntorch.cuda.mem_get_info()\nopen('/proc/meminfo')"),
        (
            "engine/memory.py",
            "'''Never reads /proc/meminfo itself.'''\nimport torch\ntorch.cuda.synchronize()",
        ),
    ],
    environment_only_in_env: [
        ("env.py", "import os\nos.environ"),
        ("cli/main.py", "import os\nos.path.join('a', 'b')"),
    ],
    web_framework_only_in_server: [
        ("server/app.py", "import fastapi"),
    ],
    no_code_from_data: [
        ("text/tokenizer.py", "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)"),
    ],
    at_most_600_lines: [
        ("engine/loop.py", "x = 1\n" * 600),
    ],
    third_party_is_declared: [
        ("engine/loop.py", "import zmq, torch, huggingface_hub, json"),
    ],
}


def _rows(cases: dict[Rule, list[tuple[str, str]]]) -> list[ParameterSet]:
    return [
        pytest.param(rule, *case, id=f"{rule.__name__}-{case[0]}-{i}")
        for rule, rows in cases.items()
        for i, case in enumerate(rows)
    ]


@pytest.mark.parametrize(("rule", "path", "text"), _rows(RED))
def test_rule_sees_red(rule: Rule, path: str, text: str) -> None:
    assert list(rule(File(path, text))), f"{rule.__name__} let this pass in {path}:\n{text}"


@pytest.mark.parametrize(("rule", "path", "text"), _rows(GREEN))
def test_rule_stays_green(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(File(path, text)))


def test_every_rule_has_a_red_case() -> None:
    assert set(RED) == set(RULES)


def test_offence_names_the_line() -> None:
    file = File("engine/loop.py", '"""Doc."""\n\nimport json\nimport firebox.text.stream\n')
    assert [line for line, _ in import_table(file)] == [4]


def test_cycle_sees_red() -> None:
    files = [
        File("cache/a.py", "from firebox.cache.b import B"),
        File("cache/b.py", "def f():\n    from firebox.cache import c"),
        File("cache/c.py", "from firebox.cache.a import A"),
        File("cache/d.py", "from firebox.cache.a import A"),
    ]
    assert find_cycle(import_graph(files)) == [f"firebox.cache.{name}" for name in "abca"]
    assert find_cycle(import_graph(files[1:])) is None
