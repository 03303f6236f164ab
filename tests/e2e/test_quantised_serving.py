"""`--kv-cache-dtype fp8` and `--requantize fp8` as a user gives them, on the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.e2e.conftest import ServerProcess

FLAGS = ("--kv-cache-dtype", "fp8", "--requantize", "fp8")
ASK = ("--prompt", "def main(", "--max-tokens", "4", "--temperature", "0")


def generate(*arguments: str, log_level: str = "info") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "firebox", "generate", *ASK, *arguments]
    environment = {**os.environ, "FIREBOX_LOG_LEVEL": log_level}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)


def test_serve_explains_them() -> None:
    server = ServerProcess(*FLAGS, "--explain")
    try:
        server.wait_until_ready()
        answer = server.client().completions.create(model="firebox-tiny", prompt="def main(", max_tokens=4)
        assert answer.usage is not None and answer.usage.completion_tokens == 4
        said = "".join(server.log)
        assert "kv_cache_dtype fp8: asked for" in said and "kv_scales 1.0 in all" in said
        assert len(re.findall(r"^  requantize fp8: ", said, re.MULTILINE)) == 2
    finally:
        server.process.terminate()
        server.process.wait(30)


def test_generate_logs_them_as_its_log_level_says() -> None:
    for level, tensors, lines in (("info", 0, 2), ("debug", 29, 2), ("warning", 0, 0)):
        done = generate(*FLAGS, log_level=level)
        assert done.returncode == 0 and done.stdout.strip()
        assert len(re.findall(r"^requantised .*: relative error 0\.02", done.stderr, re.MULTILINE)) == tensors
        assert len(re.findall(r"^requantize fp8: ", done.stderr, re.MULTILINE)) == lines


def test_an_error_above_the_limit_is_a_wrong_call() -> None:
    done = generate("--requantize", "fp8", "--requantize-limit", "0.01")
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"error: --requantize fp8: \S+ has a relative error of 0\.02\d+", done.stderr)
    assert "the limit is 0.01" in done.stderr and "hint: --requantize none" in done.stderr
