"""Every error Firebox raises on purpose.

FireboxError                     message, and one optional `hint` that says what would work
├─ ConfigError                   a flag, a field or a combination of them cannot work
├─ CheckpointError               the model folder is missing, incomplete or not what its index says
│  ├─ UnsupportedModel           an architecture, or one of its config values, that the code lacks
│  ├─ UnsupportedFormat          a weight format or dtype that the code does not implement
│  ├─ MissingTensor              the architecture needs a tensor that no shard holds
│  ├─ UnknownTensor              a shard holds a tensor that the architecture does not have
│  ├─ WrongShape                 a tensor's shape is not the one the config implies
│  └─ CorruptShard               a shard is absent, truncated or not safetensors
├─ OutOfMemory                   the budget does not hold weights, KV cache and workspace
├─ LaunchRefused                 a launch of the plan does not compile or fit the GPU, or failed its test
├─ RequestError                  one request is wrong; the server goes on (carries `param` and `code`)
│  ├─ UnsupportedField           a request field, or a value of it, that this server does not implement
│  ├─ ContextTooLong             prompt, or prompt plus max_tokens, exceeds the context
│  ├─ UnknownModelName           the request names a model that is not served here
│  └─ QueueFull                  too many requests in flight; try again after `retry_after_s`
├─ StepFailed                    the step that computed a request failed; the engine goes on
└─ EngineDied                    the engine process ended; nothing can be served any more

A user's mistake raises one of these. Our own mistake is an `assert` with the numbers.
"""

from __future__ import annotations


class FireboxError(Exception):
    """Base of all errors raised on purpose. `hint`: one sentence that says what would work, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(FireboxError):
    """A flag, a field or a combination of them cannot work."""


class CheckpointError(FireboxError):
    """The model folder is missing, incomplete or not what its index says."""


class UnsupportedModel(CheckpointError):
    """An architecture, or one of its config values, that the code lacks."""


class UnsupportedFormat(CheckpointError):
    """A weight format or dtype that the code does not implement."""


class MissingTensor(CheckpointError):
    """The architecture needs a tensor that no shard holds."""


class UnknownTensor(CheckpointError):
    """A shard holds a tensor that the architecture does not have."""


class WrongShape(CheckpointError):
    """A tensor's shape is not the one the config implies."""


class CorruptShard(CheckpointError):
    """A shard is absent, truncated or not safetensors."""


class OutOfMemory(FireboxError):
    """The budget does not hold weights, KV cache and workspace. The message carries the numbers."""


class LaunchRefused(FireboxError):
    """A launch of the plan does not compile or fit the GPU, or failed its test. The message names the launch
    and carries the numbers."""


class RequestError(FireboxError):
    """One request is wrong; the server goes on. `param`: the field at fault; `code`: a short machine word."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class UnsupportedField(RequestError):
    """A request field, or a value of it, that this server does not implement."""

    code = "unsupported_parameter"


class ContextTooLong(RequestError):
    """Prompt, or prompt plus max_tokens, exceeds the context."""

    code = "context_length_exceeded"


class UnknownModelName(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class QueueFull(RequestError):
    """Too many requests in flight; try again after `retry_after_s` seconds."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StepFailed(FireboxError):
    """The step that computed a request failed. The engine goes on, without this request."""


class EngineDied(FireboxError):
    """The engine process ended; nothing can be served any more."""
