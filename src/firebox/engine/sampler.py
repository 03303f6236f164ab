"""From logits to tokens: penalties, bias, temperature, filters, and a draw that depends on (seed, position)
alone.

Order, as in OpenAI's and vLLM's servers: repetition, then frequency and presence penalties, then bias, then
the ban of stop tokens before min_tokens; temperature; top_k, top_p, min_p; softmax; draw. Reported logprobs
are the model's own, before all of it.

The draw is a race between the tokens (kernels/cpu_race.py), whose random numbers are a function of seed,
position and token. Nothing in it depends on the other requests of the batch but the last bits of the logits,
and those only matter where two tokens tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firebox.engine.messages import SamplingParams, TokenLogprobs
from firebox.engine.request import Request
from firebox.kernels import cpu_race

LEAST_TEMPERATURE = 1e-5  # as good as greedy; far below it logits / temperature overflows float32


def sample(logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: frozenset[int]) -> list[int]:
    """One token per request from `logits` [requests, vocab] float32, which is left unchanged."""
    if all(request.params.temperature == 0.0 and not is_adjusted(request) for request in requests):
        return logits.argmax(-1).tolist()
    adjusted = adjust(logits, requests, eos_token_ids)
    token_ids: list[int] = adjusted.argmax(-1).tolist()
    drawn = [i for i, request in enumerate(requests) if request.params.temperature > 0.0]
    if drawn:
        chosen = [requests[i] for i in drawn]
        for i, token_id in zip(drawn, _draw(adjusted[drawn], chosen), strict=True):
            token_ids[i] = token_id
    return token_ids


def is_adjusted(request: Request) -> bool:
    """Do penalties, a bias or a ban change its logits?"""
    p = request.params
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return penalised or bool(p.logit_bias) or request.output_tokens < p.min_tokens


def adjust(logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """A copy of `logits` [requests, vocab] float32 with penalties, biases and bans."""
    adjusted = logits.clone()
    for row, request in zip(adjusted, requests, strict=True):
        _penalise(row, request)
        _ban_early_stop(row, request, eos_token_ids)
    return adjusted


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Logprobs of `token_ids` [rows] under `logits` [rows, vocab] float32, each with its `tops` [rows]
    likeliest alternatives."""
    logprobs = logits.log_softmax(-1)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(-1)
    chosen = logprobs.gather(-1, ids)
    ranks = (logprobs > chosen).sum(-1).tolist()
    top_values, top_ids = logprobs.topk(max(tops), dim=-1) if any(tops) else (chosen[:, :0], ids[:, :0])
    columns = (token_ids, chosen.squeeze(-1).tolist(), ranks, top_ids.tolist(), top_values.tolist(), tops)
    return [
        TokenLogprobs(token_id, value, rank, its_ids[:top], its_values[:top])
        for token_id, value, rank, its_ids, its_values, top in zip(*columns, strict=True)
    ]


def _penalise(row: torch.Tensor, request: Request) -> None:
    """Changes one request's logits [vocab] in place: repetition (prompt and output), frequency, presence
    (output), bias."""
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    output = request.token_ids[request.prompt_tokens :]
    if output and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
        ids, counts = torch.tensor(output, device=row.device).unique(return_counts=True)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)


def _ban_early_stop(row: torch.Tensor, request: Request, eos_token_ids: frozenset[int]) -> None:
    params = request.params
    if request.output_tokens >= params.min_tokens:
        return
    banned = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
    if banned:
        row[sorted(banned)] = -torch.inf


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """Temperature, filters and the draw for requests that sample; `logits` [requests, vocab] is used up."""
    params = [request.params for request in requests]
    temperature = logits.new_tensor([max(p.temperature, LEAST_TEMPERATURE) for p in params]).unsqueeze(-1)
    scaled = logits / temperature
    for row, p in zip(scaled, params, strict=True):
        _filter(row, p)
    # position = how many tokens are known: the same for a request however it is batched, retracted or resumed
    race = cpu_race.bind(cpu_race.Problem(logits.shape[-1]), {}, threads=1)
    return race(
        scaled, [_seed(request) for request in requests], [len(request.token_ids) for request in requests]
    )


def _seed(request: Request) -> int:
    seed = request.params.seed
    assert seed is not None, (
        f"request {request.request_id} samples without a seed: limits.validate gives it one"
    )
    return seed


def _filter(row: torch.Tensor, params: SamplingParams) -> None:
    """Sets to −inf, in place, what top_k, top_p and min_p exclude from one request's scaled logits [vocab].

    Ties at the border of top_k are all kept; top_p keeps the smallest set of likeliest tokens that reaches
    it.
    """
    if 0 < params.top_k < row.shape[-1]:
        row.masked_fill_(row < row.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1.0:
        values, order = row.sort(descending=True, stable=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        row[order[before >= params.top_p]] = -torch.inf
    if params.min_p > 0.0:
        probabilities = row.softmax(-1)
        row.masked_fill_(probabilities < params.min_p * probabilities.max(), -torch.inf)
