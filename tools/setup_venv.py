"""Makes `.venv` in the checkout, with the pinned packages for this machine; `make setup` runs it.

Idempotent: a stamp in `.venv` holds a hash of pyproject.toml, the constraints files and the machine's kind,
and nothing is installed while it fits. Runs under any Python 3.11 or newer, with the standard library alone.
Exit 2: the set-up cannot work.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "firebox-setup.json"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]


def main() -> int:
    """Installs what is missing and prints how long it took."""
    start = time.perf_counter()
    fingerprint = _fingerprint()
    if (done := _stamp()) and done["fingerprint"] == fingerprint:
        print(f"set-up: up to date (took {done['seconds']:.1f} s when it was made; {done['constraints']})")
        return 0
    if not (VENV / "bin" / "python").exists() and (reason := _make_venv()):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    constraints = _constraints()
    print(f"set-up: installing into .venv with {constraints}; a first time takes minutes", flush=True)
    # A module's bytecode is kept when it is first imported; that of all now would take 26 s of 64.
    later = () if sys.dont_write_bytecode else ("--no-compile",)
    _pip("install", "--quiet", "--quiet", *later, "--constraint", constraints, "--editable", ".[dev,report]")
    print("set-up: compiling the CPU kernels, so that no first start waits for it", flush=True)
    subprocess.run([PIP[0], "-m", "firebox.kernels.warm"], check=True, stderr=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.perf_counter() - start
    STAMP.write_text(json.dumps({"fingerprint": fingerprint, "seconds": seconds, "constraints": constraints}))
    print(f"set-up: done in {seconds:.1f} s")
    return 0


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{ROOT} {_has_nvidia_gpu()}".encode())
    for name in ("pyproject.toml", "constraints-cpu.txt", "constraints-cuda.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _stamp() -> dict | None:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None


def _make_venv() -> str | None:
    """Makes an empty .venv; returns a sentence when this Python cannot."""
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode == 0:
        return None
    shutil.rmtree(VENV, ignore_errors=True)
    return (
        f"{sys.executable} cannot make a virtual environment: {(made.stdout + made.stderr).strip()}\n"
        "hint: on Debian and Ubuntu the package python3-venv brings what is missing"
    )


def _constraints() -> str:
    """The constraints file for this machine. A GPU takes the CUDA build of torch, everything else the CPU
    build.

    Linux without a CPU build on offer takes the CUDA build too: it runs on a CPU, and its triton fits ours.
    """
    if _has_nvidia_gpu():
        return "constraints-cuda.txt"
    if platform.system() == "Linux" and not _cpu_torch_on_offer():
        print("set-up: no CPU build of torch is on offer; taking the CUDA build, which also runs on a CPU")
        return "constraints-cuda.txt"
    return "constraints-cpu.txt"


def _has_nvidia_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU " in listing.stdout


def _cpu_torch_on_offer() -> bool:
    """Whether pip can find the pinned torch as a CPU build: a local version, such as 2.13.0+cpu."""
    pins = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    asked = [*PIP, "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", f"{torch}+cpu"]
    return subprocess.run(asked, capture_output=True, cwd=ROOT).returncode == 0


def _pip(*arguments: str) -> None:
    status = subprocess.run([*PIP, *arguments], cwd=ROOT).returncode
    if status != 0:
        print(f"error: pip {' '.join(arguments)} ended with status {status}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
