"""Firebox serves quantised mixture-of-experts language models on GPUs with 99 KiB of shared memory, and on a
plain CPU.

    from firebox import LLM, SamplingParams

    with LLM("firebox-tiny") as llm:
        print(llm.generate("def fibonacci(", SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)

Importing the package imports nothing else until one of these names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firebox.llm import LLM, RequestOutput, SamplingParams

__version__: str
__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "RequestOutput", "SamplingParams"):
        from firebox import llm

        return getattr(llm, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("firebox")
    raise AttributeError(f"module 'firebox' has no attribute {name!r}")
