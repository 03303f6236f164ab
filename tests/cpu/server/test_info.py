from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from firebox.engine.client import Captured, LedgerRow, Memory, Stats
from tests.cpu.server.conftest import Served, says


def samples(server: Served) -> dict[str, float]:
    """/metrics as {'name{label="value"}': number}."""
    found = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_models(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == (
        "firebox-tiny",
        "model",
        "firebox",
        256,
    )
    assert server.client.get("/v1/models/firebox-tiny").json() == card


def test_health(serve, tokenizer):
    response = serve(says(tokenizer, "x")).client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_metrics_report_the_engines_last_step(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    server.engine.stats = Stats(
        running_requests=3,
        waiting_requests=2,
        kv_pages_total=100,
        kv_pages_free=60,
        kv_pages_cached=30,
        prompt_tokens=1000,
        cached_prompt_tokens=400,
        generated_tokens=77,
        retractions=5,
        step_modes={"graph/decode": 9, "eager/prefill": 2},
    )
    found = samples(server)
    assert found["firebox_requests_running"] == 3
    assert found["firebox_requests_waiting"] == 2
    assert [found[f'firebox_kv_pages{{state="{state}"}}'] for state in ("total", "free", "cached")] == [
        100,
        60,
        30,
    ]
    assert found["firebox_prompt_tokens_total"] == 1000
    assert found["firebox_cached_prompt_tokens_total"] == 400
    assert found["firebox_generated_tokens_total"] == 77
    assert found["firebox_retractions_total"] == 5
    assert found['firebox_steps_total{mode="graph",reason="decode"}'] == 9
    assert found['firebox_steps_total{mode="eager",reason="prefill"}'] == 2
    assert found["firebox_engine_up"] == 1


def test_metrics_report_memory_planned_and_measured(serve, tokenizer):
    memory = [Memory("weights", 100, 103, "stored"), Memory("reserve", 50, None, "the rest")]
    found = samples(serve(says(tokenizer, "x"), memory=memory))
    assert found['firebox_memory_bytes{kind="budget",use="weights"}'] == 100
    assert found['firebox_memory_bytes{kind="measured",use="weights"}'] == 103
    assert found['firebox_memory_bytes{kind="budget",use="reserve"}'] == 50
    assert 'firebox_memory_bytes{kind="measured",use="reserve"}' not in found


def test_graphs_are_shown_with_what_they_took(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    server.engine.captured = {
        4: Captured(4, 1000, 0.5),
        1: Captured(1, 3000, 0.25),
        9: Captured(9, 0, 0.1, "OutOfMemoryError: CUDA out of memory"),
    }
    found = samples(server)
    assert (found["firebox_cuda_graphs"], found["firebox_cuda_graphs_failed"]) == (2, 1)
    assert (found["firebox_cuda_graph_bytes"], found["firebox_cuda_graph_seconds"]) == (4000, 0.85)
    graphs = server.client.get("/ledger").json()["graphs"]
    assert graphs[0] == {"requests": 1, "bytes": 3000, "seconds": 0.25, "error": None}
    assert [graph["requests"] for graph in graphs] == [1, 4, 9] and "memory" in graphs[2]["error"]


def test_metrics_count_requests_by_route_and_status(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    server.chat()
    server.chat(stream=True)
    server.chat(tools=[])
    server.client.get("/made/up/by/a/scanner")
    found = samples(server)
    assert found['firebox_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert found['firebox_requests_total{route="/v1/chat/completions",status="400"}'] == 1
    assert found['firebox_requests_total{route="other",status="404"}'] == 1
    assert found['firebox_request_seconds_count{route="/v1/chat/completions"}'] == 3
    assert not any("scanner" in name for name in found)


def test_metrics_time_first_and_later_tokens(serve, tokenizer):
    text = "some words that take a few tokens"
    server = serve(says(tokenizer, text), step_s=0.02)
    tokens = len(tokenizer.encode(text)) + 1
    server.complete(max_tokens=50)
    server.complete(max_tokens=50, stream=True)
    found = samples(server)
    assert found["firebox_time_to_first_token_seconds_count"] == 2
    assert found["firebox_inter_token_latency_seconds_count"] == 2 * (tokens - 1)
    assert 2 * 0.015 < found["firebox_time_to_first_token_seconds_sum"] < 1
    assert found["firebox_inter_token_latency_seconds_sum"] > 2 * (tokens - 1) * 0.015


def test_ledger_says_what_runs_and_hides_the_key(serve, tokenizer):
    row = LedgerRow("moe", (1, 64), "cpu_moe", "bf16", "the only one", {"torch": "slower"})
    memory = [Memory("weights", 100, 103, "stored")]
    server = serve(says(tokenizer, "x"), api_key="secret", ledger=[row], memory=memory)
    response = server.client.get("/ledger", headers={"authorization": "Bearer secret"})
    assert response.json()["ledger"] == [
        {
            "op": "moe",
            "tokens": [1, 64],
            "kernel": "cpu_moe",
            "format": "bf16",
            "why": "the only one",
            "losers": {"torch": "slower"},
            "fallback": False,
            "config": {},
            "shared_bytes": None,
            "limit_bytes": None,
            "instruction": None,
            "native": None,
            "mode": "eager",
            "how": None,
            "layers": None,
        }
    ]
    (line,) = response.json()["memory"]
    assert line == {"what": "weights", "budget_bytes": 100, "measured_bytes": 103, "why": "stored"}
    assert response.json()["reasons"] == ["fake"]
    assert response.json()["settings"]["resolved"]["context_tokens"] == 256
    assert response.json()["settings"]["server"]["api_key"] == "set"
    assert response.json()["versions"]["torch"]
    assert "secret" not in response.text
