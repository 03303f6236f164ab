"""Operations of the launch plan, tried out on random numbers of real sizes: each is computed as the engine
will, for one number of tokens after the other, and compared with its kernels' references.

    trial = trial_of(operation, setting)      None: nobody knows how to try it
    trial(tokens) → [Result]                  relative errors and their limits; which choice is to blame.
                                              Raises LaunchFailed (engine/_attempt.py)

Weights are one layer's, all of them: experts that are not there would be another problem, and other compiles.
Compared are the first tokens and the last ones; what is not written is NaN, and so are keys that must not be
read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from firebox.attention import triton_paged
from firebox.engine import _small_trials
from firebox.engine._attempt import Result, Setup
from firebox.engine._delta_trial import DeltaTrial
from firebox.engine._small_trials import FP8_LIMIT, LIMIT
from firebox.kernels import (
    _attention_choice,
    _block_scaled,
    _kv_write,
    _linear,
    attention_rope_decode,
    linear,
    linear_one,
    logprobs,
    moe_down_few,
    moe_gate_up,
    moe_gate_up_few,
    quantise_fp8,
    quantise_groups,
    rms_norm,
    sample,
)
from firebox.kernels._attention_cases import Case, attention, make
from firebox.kernels._experts import FP8
from firebox.kernels.attention_decode import MAX_QUERIES, block_rows
from firebox.kernels.launch import INTERPRETED
from firebox.kernels.plan import Library, Operation, Single
from firebox.layers import (
    delta_gpu,
    dense_gpu,
    expert_paths,
    experts,
    norm_gpu,
    norm_linear_gpu,
    rope_decode_gpu,
    route_gpu,
)
from firebox.layers._expert_store import ExpertStore
from firebox.layers._in_one import ONE
from firebox.layers._invented import invented, relative_error, vary

__all__ = ["Result", "Setup", "Trial", "trial_of"]

Trial = Callable[[int], list[Result]]
CHECKED_TOKENS = 8  # of the first, and of the last
CONTEXT_TOKENS, CHUNK_TOKENS = 37, 512
# Long enough that keys are divided among blocks by any tile; the interpreter's are small, and it is slow.
WINDOW_TOKENS, LONG_TOKENS = (600, 700) if INTERPRETED else (1100, 2500)
SINGLE_REQUESTS = 8
# RMS error over the reference's RMS. An output rounded to bf16 is off by 0.0017; a 4-bit weight times its
# scale, an inner value and a sum of choices are rounded once more. Rounded activations are rounded in the
# reference too: left is what lies at the border of two codes. Triton's interpreter does not round FP8 as
# a GPU does, and is off by up to 0.07.
PLAIN, ROUNDED, EXPERTS = 5e-3, 1.5e-2, 1e-2
INTERPRETED_FP8 = 0.15


def trial_of(operation: Operation, setup: Setup) -> Trial | None:
    """How to try an operation out; None where this file does not know. A library's product needs no trial."""
    if isinstance(operation, Library):
        return lambda tokens: []
    if isinstance(operation, Single):
        return _small_trials.trial_of(operation, setup)
    if operation.source is dense_gpu:
        return LinearTrial(operation.problem, setup)
    if operation.source is expert_paths:
        return ExpertsTrial(operation.problem, setup)
    if operation.source is sample:
        return functools.partial(_small_trials.draw, operation.problem, setup)
    if operation.source is logprobs:
        return functools.partial(_small_trials.looks_up, operation.problem, setup)
    if operation.source is norm_gpu:
        return functools.partial(_small_trials.normalises, operation.problem, setup)
    if operation.source is norm_linear_gpu:
        return functools.partial(_normed_linear, operation.problem, setup)
    if operation.source is route_gpu:
        return functools.partial(_small_trials.routes_in_one, operation.problem, setup)
    if operation.source is delta_gpu:
        return DeltaTrial(operation.problem, setup)
    if operation.source is rope_decode_gpu:
        return RopeDecodeTrial(operation.problem, setup)
    return AttentionTrial(operation.problem, setup) if operation.source is triton_paged else None


def _checked(tokens: int) -> list[int]:
    """The first and the last ones."""
    return sorted({*range(min(CHECKED_TOKENS, tokens)), *range(max(0, tokens - CHECKED_TOKENS), tokens)})


def _limit(rounds: bool, otherwise: float) -> float:
    if not rounds:
        return otherwise
    return INTERPRETED_FP8 if INTERPRETED else ROUNDED


def _linear_weights(p: _linear.Problem, setup: Setup, generator: torch.Generator) -> _linear.Weights:
    dtype = dense_gpu.DTYPES[p.dtype]
    parts = invented(p.format, p.group, (p.rows,), p.columns, generator, dtype)
    vary([None if scale is None else scale.unsqueeze(0) for scale in parts[1:]], generator)
    return _linear.Weights(*parts, 0.1 * setup.normal(generator, p.rows) if p.bias else None)


def _normed_linear(problem: norm_linear_gpu.Problem, setup: Setup, tokens: int) -> list[Result]:
    """A norm and a linear layer in one launch; nothing where two stand in."""
    config, p = norm_linear_gpu.config_of(problem, setup.gpu, tokens), problem.linear
    if config is None:
        return []
    norm, generator = problem.norm.norm, setup.generator()
    weights = _linear_weights(p, setup, generator)
    given = rms_norm.inputs(norm, 1, generator, device=setup.device, dtype=dense_gpu.DTYPES[p.dtype])
    wanted = linear_one.normed_reference(p, norm.eps, given["x"], given["weight"], weights)
    launch, choice = f"{_tile(ONE, config)} with its norm", norm_linear_gpu.choice_of(problem, config)
    with setup.launching(launch, tokens, choice):
        found = norm_linear_gpu.run(problem, config, setup.gpu, given["x"], given["weight"], weights)
    return [Result(launch, tokens, relative_error(found.float(), wanted), PLAIN, choice)]


class LinearTrial:
    """One linear layer."""

    def __init__(self, problem: _linear.Problem, setup: Setup) -> None:
        self._p, self._setup, p = problem, setup, problem
        generator, dtype = setup.generator(), dense_gpu.DTYPES[problem.dtype]
        self._weights = _linear_weights(p, setup, generator)
        self._x = setup.normal(generator, setup.max_tokens, p.columns).to(dtype)
        self._residual = setup.normal(generator, setup.max_tokens, p.rows).to(dtype) if p.residual else None

    def __call__(self, tokens: int) -> list[Result]:
        """One result; none where a library computes alone, without a launch of ours before it."""
        p, setup = self._p, self._setup
        path = dense_gpu.path_of(p, tokens, setup.gpu)
        rounds = dense_gpu.rounds(p, path.name)
        if path.name == dense_gpu.CUBLAS and not rounds:
            return []
        space = dense_gpu.Workspace([p], tokens, setup.gpu, setup.device)
        space.partial.fill_(torch.nan)
        out = setup.nan(tokens, p.rows, dtype=dense_gpu.DTYPES[p.out_dtype])
        residual = None if self._residual is None else self._residual[:tokens]
        layer = dense_gpu.LinearKernels(p, self._weights, setup.gpu, space)
        launch, choice = _tile(path.name, path.config), dense_gpu.choice_of(p, path)
        with setup.launching(launch, tokens, choice):
            layer(self._x[:tokens], out, residual)
        at = _checked(tokens)
        wanted = _linear.reference(
            p, self._rounded(self._x[at], rounds), self._weights, None if residual is None else residual[at]
        )
        finite = bool(torch.isfinite(out).all())
        error = relative_error(out[at].float(), wanted) if finite else float("inf")
        return [Result(launch, tokens, error, _limit(rounds, PLAIN), choice)]

    def _rounded(self, x: torch.Tensor, rounds: bool) -> torch.Tensor:
        return _as_fp8(x, linear.x_group(self._p), self._p.dtype) if rounds else x


def _as_fp8(x: torch.Tensor, group: int, dtype: str) -> torch.Tensor:
    """What FP8 makes of the rows, in float32."""
    codes, scales = quantise_fp8.reference(quantise_fp8.Problem(x.shape[1], group, dtype), x)
    groups = codes.float().unflatten(-1, (-1, group or x.shape[1]))
    rows: torch.Tensor = (groups * scales.view(len(x), -1, 1)).flatten(1)
    return rows


def _tile(path: str, *configs: Any) -> str:
    chosen = [str(config) for config in configs if config is not None]
    return f"{path} with {' and '.join(chosen)}" if chosen else path


class ExpertsTrial:
    """The routed experts of one layer."""

    def __init__(self, problem: Any, setup: Setup) -> None:
        self._p, self._setup, p = problem, setup, problem
        generator = setup.generator()
        store = ExpertStore(p, setup.device)
        store.invent(generator)
        for weights in (store.gate_up, store.down):
            vary((weights.scale, weights.row_scale), generator)
            if weights.bias is not None:
                weights.bias.normal_(0.0, 0.1, generator=generator)
        self._gate_up, self._down = store.gate_up, store.down
        self._x = setup.normal(generator, setup.max_tokens, p.hidden).to(experts.DTYPES[p.dtype])
        scores = torch.rand(setup.max_tokens, p.experts, generator=generator, device=setup.device)
        self._ids = scores.topk(p.top_k, dim=1).indices.int()
        shares = torch.rand(setup.max_tokens, p.top_k, generator=generator, device=setup.device) + 0.1
        self._shares = shares / shares.sum(1, keepdim=True)

    def __call__(self, tokens: int) -> list[Result]:
        """One result, of all launches together."""
        p, setup, x = self._p, self._setup, self._x[:tokens]
        path = expert_paths.path_of(p, tokens, setup.gpu)
        space = experts.Workspace(p, tokens, setup.device)
        for tensor in (space.h_few, space.partial, space.h, space.y):
            tensor.view(torch.uint8).fill_(0xFF)  # not a number, whatever the type
        out = 0.25 * x.flip(1) if p.residual else torch.full_like(x, torch.nan)
        before = out.float() if p.residual else torch.zeros((), device=setup.device)
        layer = experts.Experts(p, self._gate_up, self._down, setup.gpu, space)
        codes = None
        if p.normed and expert_paths.rounds_at(p, tokens, setup.gpu):
            columns = quantise_fp8.Problem(p.hidden, moe_gate_up.x_group(p), p.dtype)
            codes = quantise_fp8.reference(columns, x)
        launch, choice = _tile(path.name, path.gate_up, path.down), expert_paths.choice_of(p, path)
        with setup.launching(launch, tokens, choice):
            layer(x, self._ids[:tokens], self._shares[:tokens], out, codes)
        at, rounds = _checked(tokens), path.name == expert_paths.SCALED or self._in_fp8(path)
        finite = bool(torch.isfinite(out).all())
        wanted = self._reference(path, at) + (before[at] if p.residual else before)
        error = relative_error(out[at].float(), wanted) if finite else float("inf")
        return [Result(launch, tokens, error, _limit(rounds, EXPERTS), choice)]

    def _in_fp8(self, path: expert_paths.Path) -> bool:
        return path.name == expert_paths.SORTED and self._p.format in FP8

    def _reference(self, path: expert_paths.Path, at: Sequence[int]) -> torch.Tensor:
        """With activations rounded where the path rounds them."""
        p, ids = self._p, self._ids[at]
        x = self._rounded(path, self._x[at], moe_gate_up.x_group(p))
        h = moe_gate_up_few.reference(p, x, self._gate_up, ids).to(experts.DTYPES[p.dtype])
        h = self._rounded(path, h, moe_gate_up.inner_group(p))
        return moe_down_few.reference(p, h, self._down, ids, self._shares[at])

    def _rounded(self, path: expert_paths.Path, values: torch.Tensor, group: int) -> torch.Tensor:
        if path.name == expert_paths.SCALED:
            problem = quantise_groups.Problem(values.shape[1], _block_scaled.kind_of(self._p), self._p.dtype)
            return quantise_groups.dequantised(problem, quantise_groups.reference(problem, values))
        return _as_fp8(values, group, self._p.dtype) if self._in_fp8(path) else values


class AttentionTrial:
    """Attention over scattered pages: steps of single queries, of few a request and of prompts."""

    def __init__(self, problem: Any, setup: Setup) -> None:
        self._p, self._setup = problem, setup
        rows = {queries: block_rows(problem, setup.gpu, queries) for queries in range(1, MAX_QUERIES + 1)}
        self._queries = [next(n for n in rows if rows[n] == block) for block in dict.fromkeys(rows.values())]

    def __call__(self, tokens: int) -> list[Result]:
        """Results of every step of so many tokens."""
        return [result for step in self._steps(tokens) for result in self._run(step)]

    def _steps(self, tokens: int) -> list[tuple[tuple[int, int], ...]]:
        """(queries, context) of each request."""
        steps: list[tuple[tuple[int, int], ...]] = []
        for queries in self._queries:
            if queries <= tokens:
                rest = tokens - queries
                steps += [((queries, queries + context), *_others(rest)) for context in self._contexts]
        if tokens > MAX_QUERIES:
            steps.append(_others(tokens, single=False))
        return steps

    @property
    def _contexts(self) -> tuple[int, ...]:
        """Before a request's queries; the longer one's keys are divided among blocks."""
        return CONTEXT_TOKENS, LONG_TOKENS

    def _run(self, step: tuple[tuple[int, int], ...]) -> list[Result]:
        p, setup = self._p, self._setup
        window = WINDOW_TOKENS if p.window else 0
        case = Case(p, step, window)
        given = make(case, device=str(setup.device))
        plan = triton_paged.plan(given["query_start"], given["context_tokens"], given["page_table"])
        tokens = int(given["query_start"][-1])
        out = setup.nan(tokens, p.heads, p.value_dim, dtype=p.dtype)
        attended = triton_paged.Attended(
            given["q"], given["k_cache"], given["v_cache"], given["scales"], plan, given["scale"], out, p,
            setup.gpu, window, given["sinks"],
        )  # fmt: skip
        launches: dict[str, Any] = {}
        if plan.decode_queries:
            config = _attention_choice.decode_config(p, setup.gpu, plan.decode_queries, tokens)
            launches[_attention_choice.DECODE] = triton_paged.decode, config
        if any(queries > MAX_QUERIES for queries, _ in step):
            config = _attention_choice.extend_config(p, setup.gpu, tokens)
            launches[_attention_choice.EXTEND] = triton_paged.extend, config
        for kernel, (launch, config) in launches.items():
            with setup.launching(
                _tile(kernel, config), tokens, _attention_choice.choice_of(kernel, p, config)
            ):
                launch(attended, config)
        wanted = attention(p, given)
        return [self._result(kernel, launches[kernel][1], case, given, out, wanted) for kernel in launches]

    def _result(
        self, kernel: str, config: Any, case: Case, given: dict[str, Any], out: torch.Tensor,
        wanted: torch.Tensor,
    ) -> Result:  # fmt: skip
        """Of the rows that this kernel wrote."""
        start, rows = given["query_start"], list[int]()
        for request, (queries, _) in enumerate(case.requests):
            if (queries <= MAX_QUERIES) == (kernel == _attention_choice.DECODE):
                rows += range(int(start[request]), int(start[request + 1]))
        error = relative_error(out[rows].float(), wanted[rows])
        choice = _attention_choice.choice_of(kernel, self._p, config)
        return Result(_tile(kernel, config), len(out), error, case.tolerance, choice)


class RopeDecodeTrial:
    """Attention of single queries from the projections on, in one launch."""

    def __init__(self, problem: attention_rope_decode.Problem, setup: Setup) -> None:
        self._p, self._setup = problem, setup

    def __call__(self, tokens: int) -> list[Result]:
        """Of short contexts, and with a long one, whose keys are divided among blocks; nothing where two
        launches stand in."""
        config = rope_decode_gpu.config_of(self._p, self._setup.gpu, tokens)
        if config is None:
            return []
        contexts = tuple(1 + (number * 7) % CONTEXT_TOKENS for number in range(tokens))
        steps = (contexts, (LONG_TOKENS, *contexts[1:]))
        return [result for step in steps for result in self._run(step, config)]

    def _run(self, contexts: tuple[int, ...], config: Any) -> list[Result]:
        """What was written into the cache, and what was attended there."""
        p, setup, kernel = self._p, self._setup, attention_rope_decode
        case = kernel.Case(p, contexts, WINDOW_TOKENS if p.paged.window else 0)
        step = kernel.inputs(case, device=str(setup.device))
        cache: Any = SimpleNamespace(k=step["k_cache"], v=step["v_cache"], scales=step["scales"])
        plan = triton_paged.plan(step["query_start"], step["context_tokens"], step["page_table"])
        choice, tile = rope_decode_gpu.choice_of(p, config), _tile(rope_decode_gpu.KIND, config)
        with setup.launching(tile, len(contexts), choice):
            out = rope_decode_gpu.run(
                p, config, setup.gpu, step["qkv"], cache, plan, step["scale"],
                window_tokens=case.window_tokens or None, sinks=step["sinks"], **kernel.given(p, step),
            )  # fmt: skip
        q, *rows = kernel.rotated(p, step)
        errors = {"out": relative_error(out.float(), kernel.attended(p, step, q))}
        for name, wanted, scale in zip(("k_cache", "v_cache"), rows, step["scales"], strict=True):
            written = _kv_write.rows_at(step[name], step["token_slots"])
            stored = _kv_write.stored(wanted, step[name], scale)
            errors[name] = relative_error(written.float(), stored.float())
        codes = FP8_LIMIT if p.rope.kv_dtype == _kv_write.FP8 else LIMIT
        limits = {"out": case.tolerance, "k_cache": codes, "v_cache": codes}
        return [
            Result(f"{tile}, {name}", len(contexts), error, limits[name], choice)
            for name, error in errors.items()
        ]


def _others(tokens: int, single: bool = True) -> tuple[tuple[int, int], ...]:
    """Requests with so many queries together: `single` ones as far as there are places, the rest in chunks
    as a prefill has them."""
    found: list[tuple[int, int]] = []
    while tokens:
        alone = (single and len(found) < SINGLE_REQUESTS) or tokens <= MAX_QUERIES
        queries = 1 if alone else min(tokens, CHUNK_TOKENS)
        found.append((queries, queries + (len(found) * 7) % 50))
        tokens -= queries
    return tuple(found)
