"""The engine's acceptance benchmark. Each model has a process of its own, so that its memory comes back.

    python benchmarks/engine.py --models gpt-oss-120b,glm-4.7-fp8:layers=24 [--batches …] [--contexts …]
        [--prefill …] [--tokens N] [--budget-s S] [--json] [-- FLAGS OF firebox bench offline]
    python benchmarks/engine.py --dips gpt-oss-120b [--batches …] [--tokens N] [--budget-s S] [--json] [-- …]
    python benchmarks/engine.py --smem-limit gpt-oss-120b [--batches …] [--contexts …] [--tokens N]
        [--budget-s S] [--json] [-- …]
    python benchmarks/engine.py --http gpt-oss-120b [--streams 64] [--json] [-- FLAGS OF firebox serve]
    python benchmarks/engine.py --port-open gpt-oss-120b [--json] [-- FLAGS OF firebox serve]

--models runs `firebox bench offline`, whose numbers src/firebox/bench/_offline.py explains, with steps of up
to 8,192 tokens; --http and --port-open serve with the defaults. Weights are made up (--load-format dummy) and
dtype is bfloat16 unless the flags say otherwise. Rows come on stderr as JSON lines while they are measured.
--budget-s is shared out among the models that are left; what does not get its turn is listed as not measured.
A model that fails leaves the others, and its rows so far are kept.

--dips: which batches from 1 to 256 take over 3 % longer a step than the next larger one, at context 128; such
pairs are measured twice. --smem-limit: decode with and without FIREBOX_SMEM_LIMIT=101376, two processes each;
the limit may cost 5 % in the geometric mean. Both are _step_tables.py. --http: the engine offline at that
batch, then as many streams over HTTP. --port-open: seconds until /health answers 200, with empty caches
(FIREBOX_CACHE_DIR, Triton's) and with what that start left in them.

With --json the last line of stdout is one JSON document. Exit status 1 if a model or a row failed or a row is
void; if there is a dip, if the limit costs more, or if a figure of these two is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import _served
import _step_tables

from firebox import env
from firebox.cli._bench_offline import numbers
from firebox.text.folder import resolve_folder

STEPS = ("--max-batch-tokens", "8192", "--prefill-chunk-tokens", "8192", "--page-tokens", "64")
DECODE = (*STEPS, "--prefill", "", "--no-profile")
DIP_CONTEXT, DIP_TOKENS = 128, 32  # timed steps a batch
DUMMY = ("--load-format", "dummy", "--dtype", "bfloat16")
FOREVER_S = 1e6
GRACE_S = 45.0  # for the row under way when a model's share of the budget is spent
ROWS = {"Decode": "decode", "Prefill": "prefill", "NotMeasured": "not_measured"}


def flags_of(model: str) -> list[str]:
    """ "NAME:layers=N" as arguments of a verb."""
    name, *options = model.split(":")
    return [name, *(part for option in options for part in f"--{option}".split("=", 1))]


def offline(model: str, flags: list[str], within_s: float, **environment: str) -> dict[str, Any]:
    """The report of a model's process; where that died or had to be killed, its rows so far, and `failed`."""
    command = [sys.executable, "-m", "firebox", "bench", "offline", *flags_of(model), *DUMMY, *flags]
    command += ["--within", f"{within_s:.0f}", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=env.for_process(environment),
    )  # fmt: skip
    log: list[str] = []
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it started

    reading = threading.Thread(target=lambda: _echo(process, log))
    killer = threading.Timer(within_s + GRACE_S, kill)
    reading.start()
    killer.start()
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    reading.join()
    killer.cancel()
    status = process.wait()
    if lines and lines[-1].startswith("{"):
        print("\n".join(lines[:-1]), flush=True)
        return dict(json.loads(lines[-1]))
    words = " | ".join([line for line in log if not line.startswith("{")][-3:])
    why = f"killed {GRACE_S:.0f} s after its {within_s:.0f} s" if killed.is_set() else f"status {status}"
    found: dict[str, Any] = {"model": model, "failed": f"{why}; rows not listed were not measured: {words}"}
    print(f"{model}: {found['failed']}", flush=True)
    for line in log:
        for kind, row in (json.loads(line) if line.startswith("{") else {}).items():
            found.setdefault(ROWS[kind], []).append(row)
    return found


def _echo(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        log.append(line.strip())


def all_models(models: list[str], flags: list[str], budget_s: float) -> dict[str, Any]:
    """Every model in turn, each with its share of what is left of the budget."""
    ends, reports, missing = time.perf_counter() + budget_s, [], []
    for place, model in enumerate(models):
        left_s = ends - time.perf_counter()
        if left_s <= 0:
            missing.append({"what": model, "why": f"its turn did not come within {budget_s:g} s"})
            print(f"not measured: {model}: {missing[-1]['why']}")
            continue
        reports.append(offline(model, [*STEPS, *flags], left_s / (len(models) - place)))
    return {"models": reports, "not_measured": missing}


def dips(model: str, flags: list[str], batches: Sequence[int], budget_s: float) -> dict[str, Any]:
    """Batches that take longer than the next larger one; `flags` may say how many steps are timed."""
    ends = time.perf_counter() + budget_s
    few = ["--contexts", str(DIP_CONTEXT), "--tokens", str(DIP_TOKENS)]

    def run(some: Sequence[int]) -> dict[str, Any]:
        sizes = ["--batches", ",".join(map(str, some))]
        return offline(model, [*DECODE, *few, *flags, *sizes], max(0.0, ends - time.perf_counter()))

    return {"model": model, "context": DIP_CONTEXT, **_step_tables.measured_dips(batches, run)}


def smem_limit(model: str, flags: list[str], budget_s: float) -> dict[str, Any]:
    """What blocks of less shared memory cost. Each process has an equal share of the budget."""

    def run(limited: bool) -> dict[str, Any]:
        limit = str(_step_tables.SMEM_BYTES) if limited else ""
        within_s = budget_s / len(_step_tables.TURNS)
        return offline(model, [*DECODE, *flags], within_s, **{env.SMEM_LIMIT: limit})

    return {"model": model, **_step_tables.measured_limit(run)}


def over_http(model: str, flags: list[str], at_once: int, prompt: int, output: int) -> dict[str, Any]:
    """One batch offline, over the contexts that the streams go through, and the same over HTTP: as long,
    because a GPU at its power limit runs its first second faster (gpt-oss-120b on an H200: 17.1 ms a step of
    64 tokens, later 18.0); the share of its first 64 steps' rate is there too. Both with the server's own
    settings, the longest context it takes among them: graphs are made for that."""
    name, *_ = flags_of(model)
    config = json.loads((resolve_folder(name) / "config.json").read_text())
    config = config.get("text_config", config)
    row = ["--batches", str(at_once), "--contexts", str(prompt), "--tokens", str(output), "--prefill", ""]
    longest = ["--context-length", str(config["max_position_embeddings"])]
    alone = offline(model, [*row, *longest, *flags], FOREVER_S)
    why = alone["decode"][0]["void"] if alone.get("decode") else "not measured"
    if why is not None:
        return {"model": model, "offline": alone, "failed": f"no offline rate: {why}"}
    serve = [*flags_of(model), *DUMMY, "--max-running-requests", str(at_once), *flags]
    served = _served.streams(serve, at_once, prompt, output, int(config["vocab_size"]))
    row = alone["decode"][0]
    rates = {"offline": row["tokens_per_s"], "offline_first_steps": at_once / row["first_ms_per_token"] * 1e3}
    found = {key: value for key, value in served.items() if key.endswith("_per_s")}
    shares = {
        f"share_of_{name}": {key: value and round(value / rate, 3) for key, value in found.items()}
        for name, rate in rates.items()
    }
    return {"model": model, "offline": alone, "served": served, **shares}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--models", help="names, each perhaps with :layers=N, with commas between")
    what.add_argument("--dips", metavar="MODEL")
    what.add_argument("--smem-limit", metavar="MODEL")
    what.add_argument("--http", metavar="MODEL")
    what.add_argument("--port-open", metavar="MODEL")
    for name in ("--batches", "--contexts", "--prefill", "--tokens"):
        parser.add_argument(name, help="as firebox bench offline takes it")
    parser.add_argument("--budget-s", type=float, default=FOREVER_S, help="seconds for all processes")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a stream")
    parser.add_argument("--output-tokens", type=int, default=512, help="of a stream")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("flags", nargs="*", help="after --: passed on")
    arguments = parser.parse_args()
    flags = list(arguments.flags)
    if arguments.models:
        flags += rows_of(arguments, "batches", "contexts", "prefill", "tokens")
        found = all_models(arguments.models.split(","), flags, arguments.budget_s)
    elif arguments.dips:
        batches = numbers(arguments.batches, "--batches") if arguments.batches else _step_tables.BATCHES
        found = dips(arguments.dips, flags + rows_of(arguments, "tokens"), batches, arguments.budget_s)
        print("\n".join(_step_tables.dip_lines(found)))
    elif arguments.smem_limit:
        flags += rows_of(arguments, "batches", "contexts", "tokens")
        found = smem_limit(arguments.smem_limit, flags, arguments.budget_s)
        print("\n".join(_step_tables.limit_lines(found)))
    elif arguments.http:
        found = over_http(
            arguments.http, flags, arguments.streams, arguments.prompt_tokens, arguments.output_tokens
        )
        print(json.dumps({key: value for key, value in found.items() if key not in ("model", "offline")}))
    else:
        serve = [*flags_of(arguments.port_open), *DUMMY, *flags]
        found = {"model": arguments.port_open, **_served.port_open(serve)}
        print(f"{found['model']}: /health after {found['cold_s']} s cold, {found['warm_s']} s warm")
    if arguments.json:
        print(json.dumps(found))
    return 1 if _failed(found) else 0


def rows_of(arguments: argparse.Namespace, *names: str) -> list[str]:
    """These arguments, as far as they were given, as flags of firebox bench offline."""
    given = {name: getattr(arguments, name) for name in names}
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]


def _failed(found: dict[str, Any]) -> bool:
    if found.get("dips") or found.get("missing"):
        return True
    if "ratio" in found and not _step_tables.acceptable(found):
        return True
    reports = found.get("models", [found, found.get("offline", {})])
    if found.get("served", {}).get("failed"):
        return True
    rows = [row for report in reports for row in report.get("not_measured", [])]
    void = any(row.get("void") for report in reports for row in report.get("decode", []))
    return void or any("failed" in report for report in reports) or any(row.get("failed") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
