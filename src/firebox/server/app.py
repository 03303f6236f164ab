"""The app: the routes, their error handlers, and the gate before them."""

from __future__ import annotations

from fastapi import FastAPI

import firebox
from firebox.find import load, names
from firebox.server import problems
from firebox.server.gate import Gate
from firebox.server.service import Service


def create_app(service: Service) -> FastAPI:
    """The ASGI app that serves `service`."""
    app = FastAPI(title="Firebox", version=firebox.__version__, redoc_url=None)
    app.state.service = service
    problems.install(app)
    for name in names("server.routes"):
        app.include_router(load("server.routes", name).router)
    server = service.config.server
    app.add_middleware(
        Gate, metrics=service.metrics, api_key=server.api_key, max_body_bytes=server.max_body_bytes
    )
    return app
