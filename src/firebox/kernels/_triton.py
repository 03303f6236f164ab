"""The lines that depend on Triton's version, for 3.6 to 3.9: build a source, compile it for a target, find
the assemblers. Importing this file imports Triton; nothing here asks for a GPU.

What differs: 3.6 to 3.8 assemble targets below 100 with `ptxas`, 3.9 those below 90, the others with
`ptxas-blackwell` (the backend says which); the disassembler of 3.6 knows no sm_121a. Equal in all: the
arguments of ASTSource and compile, and the knobs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import triton_key

VERSION: str = triton.__version__


class Built(NamedTuple):
    """What a compile gives: the entry function's name, its shared memory, PTX, the binary, the log of
    ptxas."""

    entry: str
    shared_bytes: int
    ptx: str
    cubin: bytes
    log: str


def source(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...]
) -> ASTSource:
    """A kernel with its argument types, as Triton's JIT would make it: `types` in order, "constexpr" for
    constants."""
    at = {name: (index,) for index, name in enumerate(types)}
    return ASTSource(
        kernel,
        signature=types,
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in aligned},
    )


def compile_source(made: ASTSource, target: int, options: dict[str, Any], cache: Path | None) -> Built:
    """Compiles for sm_`target`, with Triton's cache in the folder `cache`, None for its usual one. Raises
    whatever the compiler raises. Changes Triton's knobs and the process's standard output: for a process of
    its own."""
    if cache is not None:
        knobs.cache.dir = str(cache)
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        built = triton.compile(made, target=_target(target), options=options)
    return Built(
        built.metadata.name, built.metadata.shared, built.asm["ptx"], built.asm["cubin"], log.getvalue()
    )


def cache_folder() -> str:
    """Where Triton keeps binaries."""
    return str(knobs.cache.dir)


def compile_in_process(made: ASTSource, target: int | None, options: dict[str, Any]) -> Any:
    """Compiles for the GPU of this process, with Triton's own cache on disk → its CompiledKernel."""
    assert target is not None
    return triton.compile(made, target=_target(target), options=options)


def load(compiled: Any) -> None:
    """Puts a CompiledKernel on the GPU and builds its launcher, which Triton does at the first launch."""
    _ = compiled.run


def disassemble(cubin: bytes, folder: Path) -> str | None:
    """SASS of a binary, or None where the bundled disassembler does not know the target."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # Without the data flow analysis, which only labels branches: 0.21 s against 0.28 s.
    command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def fingerprint(target: int, options: dict[str, Any]) -> str:
    """Everything but the source that decides the result: Triton's version, the assembler's, the options,
    their defaults, and what the environment changes of them."""
    backend = make_backend(_target(target))
    defaults = backend.parse_options({"enable_fp_fusion": True}).hash()  # unset, it warns
    environment = sorted(get_cache_invalidating_env_vars().items())
    return f"{VERSION}-{backend.hash()}-{defaults}-{environment}-{sorted(options.items())}"


@functools.cache
def assembler(target: int) -> str:
    """The version of the ptxas that assembles for sm_`target`, such as "13.4.59"."""
    said: str = make_backend(_target(target)).hash()
    return said.partition(", V")[2].split()[0]


def warm() -> None:
    """Hashes Triton's own libraries, so that no forked process does it again (0.3 s each)."""
    triton_key()


def _target(number: int) -> GPUTarget:
    return GPUTarget("cuda", number, 32)
