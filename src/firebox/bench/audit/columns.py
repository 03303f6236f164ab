"""Column names of benchmark tools, and how people spell them, into fields of a `Claim`.

A name is taken apart into words: its unit ("ms", "tok/s"), which value of a distribution it is ("mean",
"p99"), and what it measures, which `NAMES` looks up.

Sources of the tools' names: vllm-project/vllm vllm/benchmarks/serve.py; sgl-project/sglang
docs/developer_guide/bench_serving.md; eugr/llama-benchy results.py; ggml-org/llama.cpp tools/llama-bench;
triton-inference-server/perf_analyzer genai-perf and ai-dynamo/aiperf exports; vllm-project/guidellm
docs/guides/metrics; `n=8 peak` and its like: vroomfondel/dgxarley TESTLOGS, where it is the sum of rates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from firebox.bench.claim import Claim, Spread
from firebox.errors import ConfigError

IGNORE = "ignore"
SPREADS = tuple(f.name for f in msgspec.structs.fields(Claim) if f.type is Spread)
SCALARS = tuple(f.name for f in msgspec.structs.fields(Claim) if f.type is not Spread)
STATISTICS = tuple(f.name for f in msgspec.structs.fields(Spread))
FIELDS = (*SCALARS, *SPREADS, *(f"{name}.{key}" for name in SPREADS for key in STATISTICS))

_SPELLED: dict[str, str] = {
    "concurrency": "concurrency; conc; con; users; clients; streams; parallel; batch; batch size; bs; c; "
    "num users; concurrent users; metrics request concurrency successful; "
    "concurrent requests; parallel requests; n parallel; num concurrency; "
    "number of concurrency; request concurrency; in flight",
    "concurrency_limit": "max concurrency; max request concurrency; maximum request concurrency; limit",
    "requests": "requests; request count; num prompts; num requests; prompts; completed; "
    "successful requests; total requests; completed requests; n requests",
    "duration_s": "duration; benchmark duration; elapsed; elapsed time; wall time; total duration; "
    "duration time",
    "requests_per_s": "request throughput; requests per second; req s; rps; qps; requests s; request per "
    "second; metrics requests per second successful",
    "output_tok_s": "output throughput; output token throughput; output tokens per second; output tps; "
    "output tok s wall; output; aggregate; aggregate throughput; aggregate "
    "tps; system throughput; throughput; generation throughput; tps; token throughput; tokens per second; "
    "throughput output; out; metrics output tokens per second successful; agg; wall; output speed",
    "output_tok_s_sum": "output tok s sum; sum of rates; summed; sum",
    "decode_tok_s": "decode; decode throughput; decode speed; tg; tg throughput; generation; gen; "
    "generation speed; token generation; eval; decode total; gen throughput; decode tps",
    "request_tok_s": "per request; per user; per stream; user; req; request; single stream; per seq; "
    "per sequence; tg req throughput; output token throughput per user; "
    "output token throughput per sec per user; per client; per user throughput; "
    "per request throughput; decode per user",
    "peak_tok_s": "peak; peak output throughput; peak output token throughput; peak throughput; "
    "max output tokens per s; max output tokens per second; max output throughput; best second",
    "input_tok_s": "input throughput; input token throughput; prompt throughput; input tokens per second; "
    "prompt tokens per second; input; metrics prompt tokens per second successful",
    "total_tok_s": "total token throughput; total tokens per second; total throughput; "
    "metrics tokens per second successful; total token throughput tok s",
    "prefill_tok_s": "prefill; prefill throughput; prefill speed; pp; pp throughput; prompt processing; "
    "prompt eval; prefill tps; pp speed",
    "ttft_ms": "ttft; time to first token; first token; first token latency; e2e ttft; "
    "metrics time to first token successful; prefill latency",
    "tpot_ms": "tpot; time per output token; time per output token excl 1st token; ms tok; ms per token; "
    "metrics time per output token successful; token time",
    "itl_ms": "itl; inter token latency; intertoken latency; tbt; time between tokens; "
    "metrics inter token latency successful",
    "e2e_ms": "e2e; e2el; e2e latency; end to end latency; request latency; end to end; "
    "metrics request latency successful; request time",
    "input_tokens": "input tokens; prompt tokens; input length; input len; isl; prompt size; prompt length; "
    "random input len; n prompt; input sequence length; prompt; input seq len",
    "output_tokens": "output tokens; completion tokens; output length; output len; osl; response size; "
    "max tokens; random output len; n gen; output sequence length; gen tokens; generated tokens",
    "depth_tokens": "context size; depth; n depth; depth tokens; context; ctx; context length",
    "total_input_tokens": "total input tokens; total input; total prompt tokens",
    "total_output_tokens": "total output tokens; total output; total generated tokens; "
    "total completion tokens; generated",
    "drafts": "drafts; draft tokens; num speculative tokens; speculative tokens; num draft tokens; "
    "spec tokens; mtp; mtp depth",
    "accept_length": "accept length; acceptance length; mean accepted length; accepted length; mal; "
    "accept len; mean acceptance length; spec decode acceptance length; accepted tokens per step",
}
NAMES: dict[str, str] = {
    name.strip(): field for field, names in _SPELLED.items() for name in names.split(";") if name.strip()
}
UNIT_ONLY = {"tok_s": "output_tok_s", "req_s": "requests_per_s"}
"""A heading that is nothing but a unit."""
AMBIGUOUS: dict[str, tuple[str, ...]] = {
    "latency": ("e2e_ms", "ttft_ms", "tpot_ms", "itl_ms"),
    "time": ("e2e_ms", "duration_s", "ttft_ms"),
    "total": ("total_tok_s", "output_tok_s", "e2e_ms"),
    "total time": ("duration_s", "e2e_ms"),
    "n": ("concurrency", "requests"),
    "tokens": ("output_tokens", "input_tokens", "total_output_tokens"),
    "speed": ("output_tok_s", "decode_tok_s", "request_tok_s"),
}
SECOND_CHOICE = ("num prompts", "num requests", "max concurrency")
TOKENS_UNIT = {"input": "input_tokens", "output": "output_tokens", "prompt": "input_tokens"}
RATE_UNIT = {"prompt": "input_tok_s", "output": "output_tok_s", "input": "input_tok_s"}
"""What a heading means with a unit of tokens, or of tokens a second, if that decides it."""
WORDS = {"avg": "mean", "average": "mean", "mean": "mean", "median": "p50"} | {
    spelled: f"p{n}" for n in (50, 90, 95, 99) for spelled in (f"p{n}", f"{n}th", f"percentile{n}", f"{n}%")
}
_NOISE = re.compile(r"\bpercentiles\b|\(per sec(?:ond)?\)|\((?:tokens?|count|requests?)\)")
NO_LABEL = re.compile(r"\b(?:std|stdev|stddev|min|max|p25|p75|failed|errors?|date|timestamp|retokenized)\b")
_UNITS: tuple[tuple[str, str], ...] = (
    (r"\b(?:output |out |gen )?(?:tokens?|toks?|tks?|t) ?(?:/|per) ?(?:sec(?:ond)?s?|s)\b", "tok_s"),
    (r"\btoks?_s\b|\btok s\b|\bts\b(?=$)", "tok_s"),
    (r"\b(?:requests?|reqs?) ?(?:/|per) ?(?:sec(?:ond)?s?|s)\b", "req_s"),
    (r"\bms ?/ ?tok(?:en)?\b|\bmilliseconds?\b|\bmsec\b|\bms\b", "ms"),
    (r"[µμ]s\b|\bus\b", "us"),
    (r"\bseconds?\b|\bsecs?\b|\bs\b", "s"),
)
_SCALE_TO_MS = {"ms": 1.0, "s": 1000.0, "us": 0.001, "sec": 1000.0, "secs": 1000.0, "seconds": 1000.0}
_SCALE_TO_MS |= {"µs": 0.001, "μs": 0.001, "min": 60_000.0}
_WIDE = re.compile(
    r"^(?P<name>.*?)[\[(@ ]*\b(?:n|c|bs|conc|concurrency|batch)\s*[=:]?\s*(?P<n>\d+)\b[\])]*(?P<rest>.*)$",
    re.IGNORECASE,
)
WIDE_NAMES = {"": "output_tok_s", "peak": "output_tok_s_sum", "garbage": "output_tok_s_sum"}


class Column(msgspec.Struct, frozen=True):
    """What a heading means. `field`: of `FIELDS`; `unit`: "ms", "s", "us", "tok_s" or "". `concurrency`: of a
    column that is about one concurrency alone ("n=8 tok/s")."""

    field: str
    unit: str = ""
    concurrency: int | None = None


def column(header: str) -> Column | None:
    """What a heading says by itself; None: nothing of a benchmark. Raises ConfigError where it may mean
    several things, naming them."""
    words = _words(header)
    wide = _WIDE.match(header)
    if wide is not None:
        inner = _words(f"{wide['name']} {wide['rest']}")
        field = WIDE_NAMES.get(inner.name) or _field(inner)
        if field is not None and (inner.name or inner.unit == "tok_s"):
            return _column(field, inner, int(wide["n"]))
    choices = () if words.unit == "tok_s" and words.name in RATE_UNIT else AMBIGUOUS.get(words.name, ())
    if choices and words.whole not in NAMES:
        raise ConfigError(
            f"column {header!r} may be {', '.join(choices)}",
            hint=f'--column "{header}={choices[0]}", or "{header}={IGNORE}"',
        )
    field = _field(words)
    return None if field is None else _column(field, words)


def is_label(header: str) -> bool:
    """Whether a heading that nothing is made of tells configurations apart, rather than being one more
    measurement."""
    words = _words(header)
    return not words.unit and NO_LABEL.search(words.whole) is None


def columns(headers: tuple[str, ...], given: Mapping[str, str]) -> dict[str, Column | None]:
    """Of every heading, overridden by `given` (heading → field, or "ignore"). Raises ConfigError for a field
    that there is not, for an ambiguous heading, and for two headings of the same meaning."""
    found: dict[str, Column | None] = {}
    for header in headers:
        if header in given:
            found[header] = _override(header, given[header])
        else:
            found[header] = column(header)
    _settle_doubles(found)
    return found


def scale(found: Column, cell_unit: str) -> float:
    """From a cell's number to the field's unit; the cell's own unit comes first. Times without one are in the
    field's unit."""
    unit = cell_unit or found.unit
    if found.field.partition(".")[0] in SPREADS:
        return _SCALE_TO_MS.get(unit, 1.0)
    if found.field == "duration_s":
        return _SCALE_TO_MS.get(unit, 1000.0) / 1000
    return 1.0


def _override(header: str, field: str) -> Column | None:
    if field == IGNORE:
        return None
    if field not in FIELDS:
        raise ConfigError(f"--column {header}={field}: no such field", hint=f"one of {', '.join(FIELDS)}")
    words = _words(header)
    return Column(field, words.unit) if "." in field else _column(field, words)


def _settle_doubles(found: dict[str, Column | None]) -> None:
    """Of two headings of one meaning, a mean is taken before a median, and `completed` before what was asked
    for; otherwise it is refused."""
    meant: dict[tuple[str, int | None], str] = {}
    for header, what in found.items():
        if what is None:
            continue
        first = meant.setdefault((what.field, what.concurrency), header)
        if first == header:
            continue
        weak = [h for h in (first, header) if _words(h).statistic == "p50" or _words(h).name in SECOND_CHOICE]
        if len(weak) != 1:
            raise ConfigError(
                f"columns {first!r} and {header!r} both read as {what.field}",
                hint=f'--column "{header}={IGNORE}", or the field that it is: {", ".join(SCALARS)}',
            )
        found[weak[0]] = None
        meant[what.field, what.concurrency] = header if weak[0] == first else first


def _field(words: _Words) -> str | None:
    if words.whole in NAMES:
        return NAMES[words.whole]
    name, unit = words.name, words.unit
    if not name:
        return UNIT_ONLY.get(unit)
    if unit == "tok_s" and name in RATE_UNIT:
        return RATE_UNIT[name]
    if name in TOKENS_UNIT:
        return None if unit else TOKENS_UNIT[name]
    field = NAMES.get(name)
    if unit in ("ms", "s", "us") and field not in (None, *SPREADS, "duration_s"):
        return None  # "request (s)", "prefill (ms)": a time, and not the rate of that name
    return field


def _column(field: str, words: _Words, concurrency: int | None = None) -> Column | None:
    """None for a percentile of what a claim has only the mean of."""
    if field in SPREADS:
        return Column(f"{field}.{words.statistic or 'mean'}", words.unit, concurrency)
    return Column(field, words.unit, concurrency) if words.statistic in (None, "mean", "p50") else None


class _Words(msgspec.Struct, frozen=True):
    """A heading taken apart. `whole`: all of it but the statistic; `name`: without its unit, too."""

    whole: str
    name: str
    unit: str
    statistic: str | None


def _words(header: str) -> _Words:
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", header).lower().replace("_", " ").replace(".", " ")
    text = _NOISE.sub(" ", text)
    whole, _ = _without_statistic(text)
    unit = ""
    for pattern, found in _UNITS:
        text, hits = re.subn(pattern, " ", text)
        if hits:
            unit = found
            break
    name, statistic = _without_statistic(text)
    return _Words(whole, name, unit, statistic)


def _without_statistic(text: str) -> tuple[str, str | None]:
    words = re.sub(r"[^a-z0-9%]+", " ", text).split()
    statistic = next((WORDS[word] for word in words if word in WORDS), None)
    return " ".join(word for word in words if word not in WORDS), statistic
