"""The server's address, taken before anything slow begins. Imports next to nothing."""

from __future__ import annotations

import socket

from firebox.config import ServerConfig
from firebox.errors import ConfigError


def bind(config: ServerConfig) -> socket.socket:
    """Takes the address without listening, so that a taken port is found before the model is loaded.

    Raises ConfigError.
    """
    if not 0 <= config.port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port is {config.port}", hint="a port is between 1 and 65535; 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error}", hint="--port 0 takes a free one"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
