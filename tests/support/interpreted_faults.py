"""Faults in the device code of every kernel, each behind the check that has to find it: what its own test
under Triton's interpreter runs and compares, on the smallest case that shows it. Prints for every fault what
the check says of the kernel as it is, which is nothing, and what it says with the fault, as JSON. A process
of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_faults GROUP
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from triton.runtime.interpreter import InterpretedFunction

from firebox.hardware.base import find_gpu
from firebox.kernels import (
    attention_decode,
    attention_extend,
    attention_rope_decode,
    linear,
    linear_few,
    linear_one,
    logprobs,
    moe_norm_route,
    sample,
)
from firebox.kernels._gated_delta import Problem as DeltaProblem
from firebox.kernels._linear import Problem as LinearProblem
from firebox.kernels.moe_norm_route import Config as RouteConfig
from tests.support import (
    attention_interpreted,
    interpreted_experts,
    interpreted_gated_delta,
    interpreted_groups,
    interpreted_linear,
    interpreted_route,
    interpreted_sample,
    norm_route,
    quick_interpreter,
    rope_decode,
    small,
)
from tests.support.experts import random_weights
from tests.support.route import ROUTINGS

GPU = find_gpu("gb10")
F16 = torch.float16


class Fault(NamedTuple):
    """`what` goes wrong if `wrong` stands in a file of src/firebox/kernels instead of `right`, which stands
    there once, in a function of its device code."""

    file: str
    what: str
    right: str
    wrong: str


Check = Callable[[], Any]  # → what is beyond its limit, if anything; or an AssertionError
Looks = tuple[tuple[Check, tuple[Fault, ...]], ...]


@contextlib.contextmanager
def put_in(fault: Fault, text: str) -> Iterator[None]:
    """The fault's kernel with `text` in its place."""
    module = importlib.import_module(f"firebox.kernels.{fault.file}")
    assert inspect.getsource(module).count(fault.right) == 1, f"does not stand there once: {fault}"
    functions = [f for f in vars(module).values() if isinstance(f, InterpretedFunction)]
    functions = [f for f in functions if f.fn.__module__ == module.__name__]
    [function] = [f for f in functions if fault.right in inspect.getsource(f.fn)]
    source = function.rewriter._prepare_source
    function.rewriter._prepare_source = lambda lines: source(lines).replace(fault.right, text)
    function.rewritten_fn.pop(function.fn, None)
    try:
        yield
    finally:
        function.rewriter._prepare_source = source
        function.rewritten_fn.pop(function.fn, None)


def says(check: Check) -> str:
    """What a check says of the kernels as they are now, nothing if they are right."""
    try:
        found = check()
    except AssertionError as error:
        return f"AssertionError: {error}"
    return str(found) if found else ""


def look(check: Check, faults: tuple[Fault, ...]) -> list[tuple[Fault, str, str]]:
    """Each fault, what is said without it, and with it."""
    with contextlib.ExitStack() as unchanged:
        for fault in faults:  # put together anew like one with a fault, so that red is the fault's
            unchanged.enter_context(put_in(fault, fault.right))
        sound = says(check)
    found = []
    for fault in faults:
        with put_in(fault, fault.wrong):
            found.append((fault, sound, says(check)))
    return found


# ---- the checks


def rows(op: str, number: int) -> Any:
    """Three tokens of one of a small kernel's cases."""
    problem = small.in_dtype(small.KERNELS[op].CASES[number], "f16")
    return small.faults(small.run_case(op, problem, 3, "cpu", GPU))


def saturated(op: str, number: int) -> Any:
    """Two tokens whose codes of an FP8 cache are the largest there are."""
    problem = small.in_dtype(small.KERNELS[op].CASES[number], "f16")
    return small.faults(small.beyond(op, problem, 2, "cpu", GPU))


def route(name: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    return interpreted_route.beyond({name: interpreted_route.route(ROUTINGS[name], 5, generator)})


def norm_and_route(number: int) -> Any:
    problem = norm_route.in_type(moe_norm_route.CASES[number], "f16")
    found = norm_route.compare(problem, GPU, number, "cpu", RouteConfig(8, 4))
    return None if found.right else found


def experts(format: str, run: Callable[..., dict[str, float]], *arguments: Any, **named: Any) -> Any:
    """One of interpreted_experts' runs, of six experts."""
    unit, generator = 128 if format == "fp8_block" else 64, torch.Generator().manual_seed(0)
    p = interpreted_experts.problem(format, 2 * unit, 3 * unit, 6)
    gate_up = random_weights(p, 2 * p.inter, p.hidden, generator)
    down = random_weights(p, p.hidden, p.inter, generator)
    return interpreted_experts.beyond(format, run(p, *arguments, gate_up, down, generator, **named))


def narrow(p: Any, *weights: Any) -> dict[str, float]:
    chosen = interpreted_experts.some_narrow(p)
    return interpreted_experts.sorted_(p, 40, *weights, block=64, chosen=chosen)


def in_order() -> None:
    """Blocks of 16 of experts without choices, with whole blocks, and with one choice more or less."""
    p, counts = interpreted_experts.problem("bf16", 64, 64, 8), torch.tensor([33, 16, 0, 1, 15, 0, 32, 5])
    ids = torch.arange(8, dtype=torch.int32).repeat_interleave(counts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    interpreted_experts.in_order(p, ids.unsqueeze(1))


def dense(format: str, tokens: int, kernel: Callable[[interpreted_linear.Case], float]) -> Any:
    """80 rows and columns that leave a part of a step; bias and residual."""
    columns = 384 if format == "fp8_block" else 320
    p = LinearProblem(80, columns, format, 0, True, True, "f16", "f16")
    case = interpreted_linear.Case(p, tokens, torch.Generator().manual_seed(0))
    return interpreted_linear.beyond(format, {"80 rows": kernel(case)})


def attend(kernel: Any, number: int) -> Any:
    error = attention_interpreted.run_kernel(kernel, kernel.CASES[number].of(F16, F16), GPU)
    return None if error < 1 else error


def rope_and_attend(number: int) -> Any:
    case = attention_rope_decode.CASES[number].of(F16, F16)
    found = rope_decode.compare(case, GPU, number, "cpu")
    return None if found.right else found


DELTA = DeltaProblem(2, 4, 16, 32, 3, 1e-6, "f16")


def delta_decode() -> Any:
    generator = torch.Generator().manual_seed(0)
    errors = interpreted_gated_delta.decode(DELTA, [1, 0, 4], [3, 0, 1], generator)
    return interpreted_gated_delta.beyond({"decode": errors})


def delta_chunk(problem: DeltaProblem, lengths: list[int], **named: bool) -> Any:
    slots, generator = list(range(len(lengths))), torch.Generator().manual_seed(0)
    errors = interpreted_gated_delta.chunk(problem, 16, lengths, slots, generator, **named)
    return interpreted_gated_delta.beyond({"chunk alike" if named else "chunk": errors})


def draw(problem: sample.Problem, rows: int, first: int = 0) -> Any:
    generator = torch.Generator().manual_seed(0)
    return interpreted_sample.other_tokens(interpreted_sample.draw(problem, 64, rows, generator, first))


def flat() -> Any:
    generator = torch.Generator().manual_seed(0)
    return interpreted_sample.other_tokens(interpreted_sample.draw_flat(generator))


def likeliest() -> Any:
    problem, generator = logprobs.Problem(300, 5), torch.Generator().manual_seed(0)
    return interpreted_sample.beyond({"": interpreted_sample.log_probabilities(problem, 3, generator)})


def by_group(kind: str) -> Any:
    found = interpreted_groups.judged(kind, interpreted_groups.rows())
    return None if interpreted_groups.right(kind, found) else found


def fp8(group: int) -> Any:
    return None if interpreted_groups.fp8_right(group, 7) else "other codes or scales"


# ---- the faults

SMALL: Looks = (
    (
        partial(rows, "embed", 0),
        (Fault("embed", "one column too many", "there = column < HIDDEN", "there = column <= HIDDEN"),),
    ),
    (
        partial(rows, "rms_norm", 2),
        (Fault("rms_norm", "a mean over the padding too", "squares / WIDTH", "squares / (GROUPS * GROUP)"),),
    ),
    (
        partial(rows, "rms_norm", 9),
        (
            Fault(
                "_rows", "no scale of negative numbers",
                "tl.max(tl.abs(wide), axis=2", "tl.max(wide, axis=2",
            ),
        ),
    ),
    (
        partial(rows, "silu_mul", 1),
        (
            Fault(
                "silu_mul", "clamped from above alone",
                "tl.minimum(tl.maximum(up, -LIMIT), LIMIT)", "tl.minimum(up, LIMIT)",
            ),
        ),
    ),
    (
        partial(rows, "sigmoid_mul", 0),
        (
            Fault(
                "sigmoid_mul", "the gate of the tile's first head for all",
                "(column // HEAD_DIM + 1)", "(first // HEAD_DIM + 1)",
            ),
        ),
    ),
    (
        partial(rows, "rope_write", 4),
        (
            Fault("rope_write", "values in units of keys", "tl.load(scales + 1)", "tl.load(scales)"),
            Fault(
                "rope_write", "partners weighted as in the first head",
                "weight + head * HEAD_DIM + other", "weight + other",
            ),
        ),
    ),
    (
        partial(rows, "latent_write", 3),
        (Fault("latent_write", "a mean over the padding too", "/ LATENT + EPS", "/ PADDED + EPS"),),
    ),
    (
        partial(saturated, "latent_write", 3),
        (Fault("_kv_write", "no least code", "-448.0, 448.0", "-1e9, 448.0"),),
    ),
    (
        partial(fp8, 128),
        (
            Fault(
                "quantise_fp8", "no scale of negative numbers",
                "tl.max(tl.abs(values), axis=1)", "tl.max(values, axis=1)",
            ),
        ),
    ),
    (
        partial(by_group, "mxf4"),
        (Fault("quantise_groups", "a tie goes to the odd code", "(size >= 0.75)", "(size > 0.75)"),),
    ),
    (
        partial(route, "odd groups"),
        (
            Fault(
                "moe_route", "padding is taken for the next group's experts",
                "tl.where(there, sortable(logits), TAKEN)", "sortable(logits)",
            ),
            Fault(
                "moe_route", "the higher of two equals wins",
                "tl.min(tl.where(key == largest, number, NONE)",
                "tl.max(tl.where(key == largest, number, -1)",
            ),
        ),
    ),
    (
        partial(norm_and_route, 0),
        (
            Fault("moe_norm_route", "a mean over the padding too", "squares / HIDDEN", "squares / COLUMNS"),
            Fault(
                "moe_norm_route", "biases of other experts",
                "tl.load(bias + mine)", "tl.load(bias + mine // 2)",
            ),
        ),
    ),
    (
        partial(draw, sample.Problem(600), 4, 2),
        (Fault("sample", "another word of the position", "(position >> 32)", "(position >> 33)"),),
    ),
    (
        flat,
        (Fault("sample", "one token too many is kept", "tl.sum(count) >= target", "tl.sum(count) > target"),),
    ),
    (
        likeliest,
        (
            Fault(
                "logprobs", "chunks' sums relative to their own tops",
                "tl.sum(its_sum * weight)", "tl.sum(its_sum)",
            ),
            Fault("logprobs", "a rank counts equals", "(x > chosen)", "(x >= chosen)"),
        ),
    ),
)  # fmt: skip

PRODUCTS: Looks = (
    (
        in_order,
        (
            Fault(
                "moe_sort", "a block of one choice is left out",
                "(total + BLOCK - 1) // BLOCK", "(total + BLOCK - 2) // BLOCK",
            ),
            Fault("moe_sort", "an expert's blocks all begin at its first", " + (b - before) * BLOCK", ""),
            Fault(
                "moe_sort", "counts stay", "tl.store(counts + e, tl.zeros((EXPERTS,), tl.int32))", "pass"
            ),
        ),
    ),
    (
        partial(experts, "int4_group", interpreted_experts.sorted_, 2),
        (
            Fault(
                "moe_arrange", "the last column is left out",
                "there = column < COLUMNS", "there = column < COLUMNS - 1",
            ),
        ),
    ),
    (
        partial(experts, "fp8_block", interpreted_experts.sorted_, 2),
        (
            Fault("moe_gate_up", "up rows in units of gate rows", "(block + INTER // 128)", "block"),
            Fault(
                "moe_down", "the last step is left out",
                "for k in tl.range(0, STEPS,", "for k in tl.range(0, STEPS - 1,",
            ),
            Fault(
                "_sorted", "units of the first block alone",
                "tl.load(other_scale + first // 128), tl.load", "tl.load(other_scale), tl.load",
            ),
        ),
    ),
    (
        partial(experts, "bf16", narrow),
        (
            Fault("moe_gate_up", "40 choices in a tile of 32", "count <= NARROW", "count <= NARROW + 8"),
            Fault(
                "moe_down", "the weight of the token's first choice",
                "tl.load(routing_weights + place,", "tl.load(routing_weights + place // 3 * 3,",
            ),
            Fault(
                "moe_combine", "the last choice is lost",
                "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)",
            ),
            Fault("moe_combine", "a counter stays", "mask=e < mine", "mask=e < mine - 1"),
        ),
    ),
    (
        partial(experts, "fp8_channel", interpreted_experts.few, 3, shared=False),
        (
            Fault(
                "moe_gate_up_few", "an expert's scales begin half way",
                "e * (2 * INTER) + rows, FORMAT", "e * INTER + rows, FORMAT",
            ),
            Fault(
                "moe_down_few", "the last choice is lost",
                "for k in tl.static_range(TOP_K)", "for k in tl.static_range(TOP_K - 1)",
            ),
            Fault(
                "_down_tiles", "the weight of another choice",
                "acc *= tl.load(routing_weights + place,", "acc *= tl.load(routing_weights + place // 2,",
            ),
        ),
    ),
    (
        partial(experts, "bf16", interpreted_experts.few, 40, shared=True),
        (
            Fault(
                "moe_gate_up_few", "a pass begins behind its first token",
                "(before + t)[:, None]", "(before + 1 + t)[:, None]",
            ),
            Fault(
                "moe_down_few", "the second pass is the first one again",
                "entry + 1 + before + step + t", "entry + 1 + before + t",
            ),
        ),
    ),
    (
        partial(experts, "fp8_channel", interpreted_experts.one),
        (
            Fault(
                "moe_gate_up_one", "up rows in units of gate rows",
                "tl.load(row_scale + row + 8)", "tl.load(row_scale + row)",
            ),
            Fault(
                "moe_down_one", "the last choice reads the first one's h",
                "added1, h, K0,", "added1, h, 0,",
            ),
        ),
    ),
    (
        partial(experts, "nvfp4_nibbles", interpreted_experts.scaled, "nvf4", 2),
        (
            Fault(
                "moe_gate_up_scaled", "an expert's scales begin half way",
                "scale + e * (2 * INTER * GROUPS)", "scale + e * (INTER * GROUPS)",
            ),
            Fault(
                "moe_down_scaled", "weights in the order of experts",
                "tl.load(routing_weights + place,", "tl.load(routing_weights + at,",
            ),
            Fault(
                "_block_scaled", "scales of the columns' first groups",
                "ws = _loaded(scale, group,", "ws = _loaded(scale, group // 2 * 2,",
            ),
        ),
    ),
    (
        partial(dense, "bf16", 40, lambda case: case.many(linear.Config(64, 32, 128, 1, slices=2))),
        (
            Fault(
                "linear", "what is left of a step is left out",
                "begin + STEPS * DEPTH, COLUMNS)", "begin + STEPS * DEPTH, COLUMNS // DEPTH * DEPTH)",
            ),
            Fault(
                "linear", "biases of the first tile", "tl.load(bias + mine)", "tl.load(bias + mine % ROWS)"
            ),
            Fault(
                "_linear", "the last slice is lost", "tl.static_range(SLICES)", "tl.static_range(SLICES - 1)"
            ),
        ),
    ),
    (
        partial(dense, "bf16", 9, lambda case: case.few(linear_few.Config(32, 128, 128, 2))),
        (
            Fault(
                "linear_few", "the head's columns count twice",
                "tl.range(begin + HEAD, stop", "tl.range(begin, stop",
            ),
            Fault(
                "linear_few", "biases of the first tile",
                "tl.load(bias + mine)", "tl.load(bias + mine % ROWS)",
            ),
        ),
    ),
    (
        partial(dense, "fp8_block", 1, lambda case: case.one(linear_one.Config(16, 8))),
        (
            Fault(
                "linear_one", "the second part in units of the first",
                "w1, xs[1], scale_at, C0,", "w1, xs[1], scale_at, 0,",
            ),
            Fault(
                "_whole_rows", "each part in units of the first",
                "block = FIRST // 128 + tl.arange(0, BLOCKS)", "block = tl.arange(0, BLOCKS)",
            ),
        ),
    ),
)  # fmt: skip

SEQUENCES: Looks = (
    (
        partial(attend, attention_decode, 1),
        (
            Fault(
                "attention_decode", "the last key is not seen",
                "begin + share * BLOCK_N, context)", "begin + share * BLOCK_N, context - 1)",
            ),
            Fault("attention_decode", "splits weighted by their top alone", "top + tl.log2(total)", "top"),
            Fault(
                "attention_decode", "a partial split is lost",
                "used = tl.cdiv(tiles, share)", "used = tiles // share",
            ),
            Fault(
                "_attention", "a sum keeps its old top",
                "total = total * fade + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)",
            ),
        ),
    ),
    (
        partial(attend, attention_extend, 1),
        (
            Fault(
                "attention_extend", "the tile's last query does not see itself",
                "(first_row + BLOCK_M - 1) // GROUP + 1", "(first_row + BLOCK_M - 1) // GROUP",
            ),
        ),
    ),
    (
        partial(rope_and_attend, 3),
        (
            Fault(
                "attention_rope_decode", "the own score is not scaled",
                ".to(tl.float32), 1) * scale", ".to(tl.float32), 1)",
            ),
            Fault(
                "attention_rope_decode", "the first tile reaches behind the window",
                "(at >= lowest) & (at < end)", "at < end",
            ),
        ),
    ),
    (
        delta_decode,
        (
            Fault(
                "gated_delta_decode", "inputs are replaced before all heads have read them",
                '1, sem="acq_rel") == GROUP - 1', '1, sem="acq_rel") == 0',
            ),
            Fault(
                "_gated_delta", "kept inputs one token late",
                "(TAPS + at - first)", "tl.maximum(TAPS + at - first - 1, 0)",
            ),
        ),
    ),
    (
        partial(delta_chunk, DELTA, [1, 0, 70]),
        (
            Fault(
                "gated_delta_chunk", "taps in the other order",
                "channel * (TAPS + 1) + tap", "channel * (TAPS + 1) + TAPS - tap",
            ),
            Fault(
                "gated_delta_chunk", "a token does not see itself",
                "i[:, None] >= i[None, :]", "i[:, None] > i[None, :]",
            ),
            Fault("gated_delta_chunk", "the first head's gate for all", "row % HEADS * VALUE_DIM", "0 * row"),
        ),
    ),
    (
        partial(delta_chunk, DeltaProblem(1, 2, 32, 16, 3, 1e-6, "f16"), [64], alike=True),
        (
            Fault(
                "gated_delta_chunk", "an inverse without its last term, which counts where keys are alike",
                'n2 - tl.dot(n, n2, input_precision="tf32")', "n2",
            ),
        ),
    ),
)  # fmt: skip

GROUPS: dict[str, Looks] = {"products": PRODUCTS, "others": SMALL + SEQUENCES}


def main(group: str) -> None:
    quick_interpreter.begin()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy on what is not finite, which is meant
    print(json.dumps([entry for check, faults in GROUPS[group] for entry in look(check, faults)]))


if __name__ == "__main__":
    main(sys.argv[1])
