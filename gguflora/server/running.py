"""A server from start to graceful end."""

from __future__ import annotations

import math
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import uvicorn

from gguflora.engine import Engine
from gguflora.errors import ServerError
from gguflora.server.app import create_app
from gguflora.server.settings import Settings

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_BACKLOG: Final = 512


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one.

    Raises:
        ServerError: if the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}; try another --port") from error


def serve(engine: Engine, base: Path, listener: socket.socket, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests end, for ``settings.timeout`` seconds at most.

    Args:
        engine: stays open.
        base: the file of its weights.
        listener: from `listen`.
        settings: limits and permissions.
    """
    if settings.api_key is None and listener.getsockname()[0] in _LOOPBACK:
        settings = replace(settings, hosts=_LOOPBACK)
    config = uvicorn.Config(
        create_app(engine, base, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
        uvicorn.Server(config).run(sockets=[listener])


def url_of(listener: socket.socket) -> str:
    """Where clients find the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
