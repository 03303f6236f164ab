"""Requests made up from the served OpenAPI document, right and wrong: no 5xx, and replies as documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.conftest import serving

EXAMPLES = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def api() -> Iterator[schemathesis.BaseSchema]:
    """A server with a short context, so that answers to requests without max_tokens end soon."""
    with serving("--context-length", "64", "--max-queued-requests", "64") as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_document_and_server_agree(api: schemathesis.BaseSchema) -> None:
    tested = set()
    for operation in (result.ok() for result in api.get_all_operations()):
        # Without a body there is nothing that could be wrong.
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if operation.body else [])]
        for strategy in (operation.as_strategy(generation_mode=mode) for mode in modes):
            examine(strategy)
        tested.add(operation.label)
    assert tested >= {"POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "GET /metrics"}


def examine(strategy: SearchStrategy[schemathesis.Case]) -> None:
    @given(case=strategy)
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def agrees(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=30)

    agrees()
