"""Trials of the launches that have no weights to speak of: norms, activations, rotation, routing, sampling.
Each has one compile, so there is no other choice to take in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from firebox.engine._attempt import Result, Setup
from firebox.kernels import (
    _kv_write,
    embed,
    latent_write,
    logprobs,
    moe_norm_route,
    moe_route,
    rms_norm,
    rope_write,
    sample,
    sigmoid_mul,
    silu_mul,
)
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.plan import Operation
from firebox.layers import norm_gpu, route_gpu
from firebox.layers._invented import relative_error

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
ROW_KERNELS = (embed, rms_norm, silu_mul, sigmoid_mul)
WRITERS = (rope_write, latent_write)
PAGE_TOKENS, PAGES = 16, 3
SCALES = (0.21, 0.5)  # of an FP8 cache
MOST_ROWS = 8  # that sampling is compared for: the reference sorts whole vocabularies
# RMS error over the reference's RMS: outputs are rounded to bf16 once or twice, FP8 ones by 2.6 %; two
# experts that are equally good but for rounding may change places in the routing of some token.
LIMIT, FP8_LIMIT, ROUTE_LIMIT = 5e-3, 5e-2, 2e-2
CODES_LIMIT = 8e-2 if INTERPRETED else FP8_LIMIT  # the interpreter does not round FP8 as a GPU does
CLOSE = 1e-5  # two tokens whose times are as close may both win


def trial_of(operation: Operation, setup: Setup) -> Callable[[int], list[Result]] | None:
    """How to try the kernel `operation.source` out, or None."""
    kernel, problem = operation.source, operation.problem
    if kernel in ROW_KERNELS:
        return lambda tokens: _rows(kernel, problem, setup, tokens)
    if kernel in WRITERS:
        return lambda tokens: _writes(kernel, problem, setup, tokens)
    return (lambda tokens: _routes(problem, setup, tokens)) if kernel is moe_route else None


def normalises(problem: norm_gpu.Problem, setup: Setup, tokens: int) -> list[Result]:
    """A norm with all that so many tokens have it write."""
    return _rows(rms_norm, norm_gpu.kernel_problem(problem, tokens, setup.gpu), setup, tokens)


def _launcher(kernel: ModuleType, problem: Any, setup: Setup) -> Launcher:
    return Launcher(kernel.request(problem, setup.gpu, interpreted=INTERPRETED))


def _rows(kernel: ModuleType, problem: Any, setup: Setup, tokens: int) -> list[Result]:
    """A kernel of rows: every output against its own."""
    kind = {"device": setup.device, "dtype": DTYPES[problem.dtype]}
    given = kernel.inputs(problem, tokens, setup.generator(), **kind)
    wanted = kernel.reference(problem, **given)
    outputs = {n: setup.nan(*rows.shape, dtype=rows.dtype) for n, rows in wanted.items() if n != "x"}
    with setup.launching(kernel.OP, tokens):
        kernel.run(_launcher(kernel, problem, setup), **given, **outputs)
    found = outputs | ({"x": given["x"]} if "x" in wanted else {})
    errors = {name: relative_error(found[name].float(), rows.float()) for name, rows in wanted.items()}
    return [
        Result(f"{kernel.OP}'s {name}", tokens, error, CODES_LIMIT if name == "q" else LIMIT)
        for name, error in errors.items()
    ]


def _writes(kernel: ModuleType, problem: Any, setup: Setup, tokens: int) -> list[Result]:
    """Queries, and rows of scattered slots; other rows stay as they were."""
    p, latent, generator = problem, kernel is latent_write, setup.generator()
    dtype = DTYPES[p.dtype]
    given = kernel.inputs(p, tokens, generator, device=setup.device, dtype=dtype)
    pages = PAGES + 2 * tokens // PAGE_TOKENS
    slots = torch.randperm(pages * PAGE_TOKENS, generator=generator, device=setup.device)[:tokens]
    row = (1, p.latent_dim + p.rope_dim) if latent else (p.kv_heads, p.head_dim)
    kept = torch.float8_e4m3fn if p.kv_dtype == _kv_write.FP8 else dtype
    names = ("cache",) if latent else ("k_cache", "v_cache")
    caches = {
        name: torch.full((pages, PAGE_TOKENS, *row), 7.0, device=setup.device).to(kept) for name in names
    }
    wanted_q, *rows = kernel.reference(p, **given)
    wanted = {name: cache.clone() for name, cache in caches.items()}
    scales = torch.tensor(SCALES, device=setup.device)
    for name, values, scale in zip(names, rows, SCALES, strict=not latent):
        _kv_write.put(wanted[name], slots, values, scale if kept.itemsize == 1 else 1.0)
    q = setup.nan(tokens, p.heads, row[1], dtype=dtype)
    further = {"scales": scales} if kept.itemsize == 1 else {}
    with setup.launching(kernel.OP, tokens):
        kernel.run(_launcher(kernel, p, setup), **given, q=q, token_slots=slots, **caches, **further)
    limit = FP8_LIMIT if kept.itemsize == 1 else LIMIT
    mine = q[..., -wanted_q.shape[-1] :]  # the columns before these are another launch's
    results = [Result(f"{kernel.OP}'s q", tokens, relative_error(mine.float(), wanted_q.float()), LIMIT)]
    for name in names:
        error = relative_error(caches[name].float(), wanted[name].float())
        results.append(Result(f"{kernel.OP}'s {name}", tokens, error, limit))
    return results


def _routes(problem: moe_route.Problem, setup: Setup, tokens: int) -> list[Result]:
    """Weights of experts, as a matrix, so that what changes places shows."""
    p, generator = problem, setup.generator()
    logits = setup.normal(generator, tokens, p.experts)
    bias = 0.1 * setup.normal(generator, p.experts) if p.scoring == "sigmoid" else None
    gate = setup.normal(generator, tokens) if p.shared_gate else None
    ids, weights = moe_route.reference(p, logits, bias, gate)
    found_ids = torch.full(ids.shape, -1, dtype=torch.int32, device=setup.device)
    found = setup.nan(*ids.shape, dtype=torch.float32)
    with setup.launching(moe_route.OP, tokens):
        moe_route.run(_launcher(moe_route, p, setup), logits, bias, gate, found_ids, found)
    return [Result(moe_route.OP, tokens, _route_error(p, (found_ids, found), (ids, weights)), ROUTE_LIMIT)]


def routes_in_one(problem: route_gpu.Problem, setup: Setup, tokens: int) -> list[Result]:
    """From the residual stream to the choices, in one launch; nothing where three stand in."""
    config, p = route_gpu.config_of(problem, setup.gpu, tokens), problem.kernel
    if config is None:
        return []
    kind = {"device": setup.device, "dtype": DTYPES[p.norm.dtype]}
    given, space = moe_norm_route.inputs(p, setup.generator(), **kind), route_gpu.Workspace(setup.device)
    rows, *wanted = moe_norm_route.reference(p, **given)
    choice, tile = route_gpu.choice_of(problem, config), f"{moe_norm_route.OP} with {config}"
    with setup.launching(tile, tokens, choice):
        found_rows, _, *found = route_gpu.run(problem, config, setup.gpu, space, *given.values())
    counted = not bool(space.counter.any())  # and ready for the next launch
    error = _route_error(p.route, found, wanted) if counted else float("inf")
    return [
        Result(f"{tile}, out", tokens, relative_error(found_rows.float(), rows.float()), LIMIT, choice),
        Result(f"{tile}, choices", tokens, error, ROUTE_LIMIT, choice),
    ]


def _route_error(
    p: moe_route.Problem, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> float:
    """Of expert ids and their weights, as a matrix; infinite with a number that is no expert's."""
    width = p.experts + p.shared
    if bool((found[0] < 0).any()) or bool((found[0] >= width).any()):
        return float("inf")
    dense = [
        torch.zeros(len(ids), width, device=ids.device).scatter_add_(1, ids.long(), weights)
        for ids, weights in (found, wanted)
    ]
    return relative_error(*dense)


def draw(vocab: int, setup: Setup, rows: int) -> list[Result]:
    """Tokens with a temperature, without one, and with filters; the error is the share of wrong ones."""
    generator, rows = setup.generator(), min(rows, MOST_ROWS)
    logits = 3 * setup.normal(generator, rows, vocab)
    even = torch.arange(rows, device=setup.device) % 2 == 0

    def mixed(first: float, second: float) -> torch.Tensor:
        return torch.where(even, first, second).float()

    seeds, positions = (torch.arange(rows, device=setup.device) + first for first in (11, 1000))
    parameters = sample.Parameters(
        mixed(0.8, 0.0), seeds, positions, mixed(40, 0).int(), mixed(0.9, 1.0), mixed(0.01, 0.0)
    )
    results = []
    for problem in sample.kinds(vocab):
        config = sample.default(problem, setup.gpu)
        launcher = Launcher(sample.request(problem, config, setup.gpu, interpreted=INTERPRETED))
        scratch = sample.scratch(problem, config, rows, setup.device)
        found = torch.full((rows,), -1, dtype=torch.int64, device=setup.device)
        name = f"{sample.OP}{' with filters' if problem.filters else ''}"
        with setup.launching(name, rows):
            sample.run(launcher, logits, None, parameters, scratch, found)
        on_host = sample.Parameters(**{name: part.cpu() for name, part in vars(parameters).items()})
        wanted, leads = sample.reference(problem, logits.cpu(), None, on_host)
        wrong = (found.cpu() != wanted) & (leads >= CLOSE)
        results.append(Result(name, rows, float(wrong.float().mean()), 0.0))
    return results


def looks_up(vocab: int, setup: Setup, rows: int) -> list[Result]:
    """Logprobs of tokens, likely and unlikely ones; ranks and alternatives that are wrong are errors of 1."""
    generator, rows = setup.generator(), min(rows, MOST_ROWS)
    logits = 3 * setup.normal(generator, rows, vocab)
    token_ids = torch.arange(rows, device=setup.device) * 97 % vocab
    token_ids[::2] = logits[::2].argmax(-1)
    results = []
    for problem in logprobs.kinds(vocab):
        config = logprobs.default(problem, setup.gpu)
        launcher = Launcher(logprobs.request(problem, config, setup.gpu, interpreted=INTERPRETED))
        scratch = logprobs.scratch(problem, config, rows, setup.device)
        outputs = logprobs.outputs(problem, rows, setup.device)
        name = f"{logprobs.OP} with {problem.top}"
        with setup.launching(name, rows):
            logprobs.run(launcher, logits, token_ids, scratch, *outputs)
        values, ranks, top_ids, top_values = logprobs.reference(problem, logits, token_ids)
        wrong = bool((outputs[1] != ranks).any()) or bool((outputs[2] != top_ids).any())
        error = max(relative_error(outputs[0], values.float()), float(wrong))
        if problem.top:
            error = max(error, relative_error(outputs[3], top_values.float()))
        results.append(Result(name, rows, error, LIMIT))
    return results
