"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from firebox.errors import EngineDied, FireboxError, QueueFull, RequestError, StepFailed, UnknownModelName

CLIENT_GONE = 499


def body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of one error."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def response(status: int, content: bytes, headers: dict[str, str] | None = None) -> Response:
    """A JSON response from its bytes."""
    return Response(content, status_code=status, media_type="application/json", headers=headers)


def of_error(error: FireboxError) -> tuple[int, bytes]:
    """The status and the body that an error of ours is answered with."""
    message = str(error) if error.hint is None else f"{error}; {error.hint}"
    if isinstance(error, QueueFull):
        return 429, body(message, "rate_limit_error", None, error.code)
    if isinstance(error, UnknownModelName):
        return 404, body(message, "invalid_request_error", error.param, error.code)
    if isinstance(error, RequestError):
        return 400, body(message, "invalid_request_error", error.param, error.code)
    if isinstance(error, EngineDied):
        return 503, body(message, "server_error", None, "engine_died")
    code = "step_failed" if isinstance(error, StepFailed) else "internal_error"
    return 500, body(message, "server_error", None, code)


def install(app: FastAPI) -> None:
    """Gives the app a handler for each way a request can go wrong."""
    app.add_exception_handler(FireboxError, _on_firebox_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)


async def _on_firebox_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FireboxError), error
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, QueueFull) else None
    return response(*of_error(error), headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), error
    return response(400, _validation_body(_worst(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    message = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return response(
        error.status_code, body(message, "invalid_request_error", None, code), dict(error.headers or {})
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    """A mistake of ours; Starlette logs the traceback."""
    return response(
        500, body("the server made a mistake; its log says which", "server_error", None, "internal_error")
    )


def _worst(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the first wrong field's errors the deepest one: of a union's tries, the one that came furthest."""
    field = errors[0]["loc"][:2]
    return max((error for error in errors if error["loc"][:2] == field), key=lambda error: len(error["loc"]))


def _validation_body(first: dict[str, Any]) -> bytes:
    """What is said of one thing wrong with a request body."""
    if first["type"] == "json_invalid":
        return body(
            f"the body is not JSON: {first['ctx']['error']}", "invalid_request_error", None, "invalid_json"
        )
    param = _param(first["loc"])
    if first["type"] == "extra_forbidden":
        *within, name = first["loc"]  # any string may be a key
        param = ".".join(filter(None, (_param((*within,)), str(name))))
        return body(
            f"{param} is not supported by this server",
            "invalid_request_error",
            param,
            "unsupported_parameter",
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is required"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return body(f"{param or 'the body'}: {message}", "invalid_request_error", param, code)


def _param(location: tuple[str | int, ...]) -> str | None:
    """("body", "messages", 0, "content", "list[…]", 1) → "messages.0.content.1", without a union's tries."""
    named = [step for step in location[1:] if isinstance(step, int) or _is_field(step)]
    return ".".join(map(str, named)) or None


def _is_field(step: str) -> bool:
    return step.isidentifier() and step not in _UNION_TAGS


_UNION_TAGS = {"str", "int", "float", "bool"}
