"""HEAD and OPTIONS for every path, ``Allow`` where a method is refused, and JSON that curl calls a form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_FORM: Final = b"application/x-www-form-urlencoded"
_NOT_ALLOWED: Final = 405


class HttpMethods:
    """ASGI middleware around the routes of an application.

    A HEAD request is answered as GET without the body, and OPTIONS with the methods of the path. ``curl -d`` calls its
    body a form unless it is told otherwise; it is read as the JSON that it is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer OPTIONS."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = _allowed(scope) if scope["method"] == "OPTIONS" else []
        if allowed:
            headers = [(b"allow", ", ".join(allowed).encode())]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body"})
            return
        is_head = scope["method"] == "HEAD"

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == _NOT_ALLOWED:
                MutableHeaders(scope=message)["Allow"] = ", ".join(_allowed(scope))
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        scope["headers"] = _with_json(scope["headers"])  # in place: others look for the route in this scope
        scope["method"] = "GET" if is_head else scope["method"]
        await self._app(scope, receive, send_on)


def _allowed(scope: Scope) -> list[str]:
    """Return the methods that some route has for the path of a request; none if there is no such path."""
    routes = scope["app"].router.routes
    found = [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] == Match.FULL for route in routes)
    ]
    return [*found, *(["HEAD"] if "GET" in found else []), "OPTIONS"] if found else []


def _with_json(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [
        (name, b"application/json" if name == b"content-type" and value.startswith(_FORM) else value)
        for name, value in headers
    ]
