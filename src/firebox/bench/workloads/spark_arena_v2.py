"""The grid that the Spark Arena leaderboard measures for its second version: depths 0 to 100,000, concurrency
1, 2, 5 and 10, prompts of 2,048 tokens, answers of 128, three runs, with the prefix cache on.

The arena runs llama-benchy on it. Its order of cells is fixed; here every repetition has an order of its own.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from firebox.bench.base import Phase
from firebox.bench.prompts import Prompts
from firebox.bench.workloads import prompt_depth
from firebox.bench.workloads.base import Options

DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 2, 5, 10),
    "prompt_tokens": (2048,),
    "output_tokens": (128,),
    "depth_tokens": (0, 4096, 8192, 16384, 32768, 65535, 100000),
    "requests": 1,
    "repeat": 3,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """Those of the grid."""
    return [replace(phase, workload="spark_arena_v2") for phase in prompt_depth.phases(prompts, options)]
