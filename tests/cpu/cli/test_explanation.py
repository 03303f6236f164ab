"""--explain: a row of the ledger a line, a launch whose graphs end in the middle one line, and the memory."""

from __future__ import annotations

from msgspec.structs import replace

from firebox.cli._explanation import explanation
from firebox.engine.messages import LedgerRow, Memory, Ready

LAUNCH = LedgerRow(
    op="moe_block/experts/moe_gate_up",
    tokens=(1, 16),
    kernel="gate_up_few",
    format="mxfp4",
    why="measured, weight-only",
    config={"rows": 64, "tma": False},
    shared_bytes=55_296,
    limit_bytes=101_376,
    instruction="mma.bf16",
    native=True,
    mode="graph",
    how="tuned",
    layers=36,
)
TILE = "gate_up_few (mxfp4), 36 layers, rows=64 tma=False, mma.bf16, 55296 of 101376 bytes shared"


def said(*rows: LedgerRow, memory: tuple[Memory, ...] = ()) -> list[str]:
    ready = Ready(
        model_type="m", device="gb10", dtype="bfloat16", vocab_size=1, context_tokens=1,
        max_running_requests=1, kv_pages=1, page_tokens=1, weights_bytes=1, kv_bytes_per_token=1,
        eos_token_ids=[], ledger=list(rows), reasons=["dtype bfloat16: asked for"], load_seconds=0.0,
        memory=list(memory),
    )  # fmt: skip
    return [line.strip() for line in explanation(ready).splitlines()][1:]


def test_a_launch_that_goes_on_behind_the_graphs_is_one_line() -> None:
    later = replace(LAUNCH, tokens=(17, 90), mode="eager")
    op = LAUNCH.op
    (line, _) = said(LAUNCH, later)
    assert line == f"{op} [1, 90] tokens: {TILE}, graph up to 16, tuned: measured, weight-only"
    other = replace(later, config={"rows": 32, "tma": False})
    assert [line.split(" tokens")[0] for line in said(LAUNCH, other, LAUNCH)[:3]] == [
        f"{op} [1, 16]", f"{op} [17, 90]", f"{op} [1, 16]",
    ]  # fmt: skip


def test_operations_and_launches_say_what_they_have() -> None:
    chosen = LedgerRow("head", (1, 64), "cpu_head", "float32", "accepts the problem", {"torch": "slower"})
    library = LedgerRow("head", (1, 8), "cublas", "bf16", "default", how="default", layers=1)
    emulated = replace(LAUNCH, native=False)
    assert said(chosen, library, emulated) == [
        "head [1, 64] tokens: cpu_head (float32), accepts the problem",
        "not torch: slower",
        "head [1, 8] tokens: cublas (bf16), a library's kernel, eager, default",
        f"{LAUNCH.op} [1, 16] tokens: {TILE}, graph, tuned: measured, weight-only".replace(
            "mma.bf16", "mma.bf16 instead of its own"
        ),
        "dtype bfloat16: asked for",
    ]


def test_launches_of_one_choice_say_once_what_was_not_chosen() -> None:
    """Those of another range of tokens, or for other reasons, say their own."""
    first = replace(LAUNCH, losers={"one": "takes one token", "sorted": "experts.json names few"})
    second = replace(first, op="moe_block/experts/moe_down", kernel="down_few")
    third = replace(second, losers={"one": "takes one token"}, tokens=(17, 90))
    reasons = [line for line in said(first, second, third) if line.startswith("not ")]
    assert reasons == [
        *("not one: takes one token", "not sorted: experts.json names few"),
        "not one: takes one token",
    ]


def test_memory_is_shown_planned_and_measured() -> None:
    lines = said(
        memory=(Memory("weights", 3 << 30, 3 << 30, "stored"), Memory("reserve", 1 << 20, None, "x"))
    )
    assert lines[1:] == [
        "memory, weights: 3,072 MiB, measured 3,072 MiB (stored)",
        "memory, reserve: 1 MiB (x)",
    ]
