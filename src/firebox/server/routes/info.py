"""GET routes: models, health, metrics, ledger."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

import firebox
from firebox.server.replies import GET_ERRORS, Health, LedgerReply, ModelCard, ModelList, errors
from firebox.server.service import Service, service_of

router = APIRouter()
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}
}
SHOWN_APART = ("ledger", "reasons", "memory", "captured")  # of Ready
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "fastapi",
    "uvicorn",
    "pyzmq",
    "msgspec",
)


@router.get("/v1/models", responses=GET_ERRORS)
async def models(request: Request) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_card(service_of(request))])


@router.get("/v1/models/{model_id:path}", responses={**GET_ERRORS, **errors(404)})
async def model(model_id: str, request: Request) -> ModelCard:
    """The model of that name."""
    service = service_of(request)
    service.require_model(model_id)
    return _card(service)


@router.get("/health", responses=errors(503))
async def health(request: Request) -> Health:
    """200 while the engine lives, 503 after."""
    service_of(request).text.engine.raise_if_dead()
    return Health()


@router.get("/metrics", response_class=Response, responses=TEXT)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms, all named firebox_*."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/ledger", responses=GET_ERRORS)
async def ledger(request: Request) -> LedgerReply:
    """What runs: per operation and token range the kernel, its format and why; the settings and where they
    came from.
    """
    service = service_of(request)
    engine = service.text.engine
    ready, captured = engine.ready, sorted(engine.captured.items())
    return LedgerReply(
        model=service.name,
        versions=_versions(),
        settings=_settings(service),
        reasons=ready.reasons,
        ledger=[msgspec.to_builtins(row) for row in ready.ledger],
        memory=[msgspec.to_builtins(line) for line in ready.memory],
        graphs=[msgspec.to_builtins(graph) for _, graph in captured],
    )


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.name, created=service.created, max_model_len=service.text.engine.ready.context_tokens
    )


def _versions() -> dict[str, str]:
    found = {"firebox": firebox.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # triton on a machine without a GPU
            found[package] = "not installed"
    return found


def _settings(service: Service) -> dict[str, Any]:
    """What the user set, what the engine made of it, and the sampling that a request gets when it asks for
    nothing.
    """
    server = dataclasses.asdict(service.config.server)
    server["api_key"] = None if service.config.server.api_key is None else "set"
    ready = msgspec.to_builtins(service.text.engine.ready)
    return {
        "model": {**dataclasses.asdict(service.config.model), "folder": str(service.folder)},
        "engine": dataclasses.asdict(service.config.engine),
        "server": server,
        "resolved": {name: value for name, value in ready.items() if name not in SHOWN_APART},
        "sampling_defaults": {"temperature": 1.0, **service.text.defaults},
    }
