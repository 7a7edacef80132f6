"""Middleware that checks the host, origin, key and size of every request, and sets headers of every response."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguflora.server.bodies import receive_body, too_large
from gguflora.server.errors import Failure, as_failure, log_fault
from gguflora.server.hosts import check_host, check_origin
from gguflora.server.keys import CACHE_OWNER, check_key, owner_of
from gguflora.server.settings import Settings

OPEN_PATHS: Final = frozenset(
    {"/", "/client.js", "/health", "/icon.svg", "/maps.js", "/page.css", "/page.js", "/ready"}
)
"""Paths that need no key."""

_MAX_HEADERS: Final = 128
_WITHOUT_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods whose requests have no body that anything reads."""

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class RequestGuard:
    """ASGI middleware that refuses requests which must not reach an endpoint.

    Args:
        app: the application behind it.
        settings: limits and permissions.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response, name = _Response(send), ""
        try:
            name = self._check(scope["method"], scope["path"], Headers(scope=scope))
            CACHE_OWNER.set(owner_of(name, self._settings))
            if scope["method"] not in _WITHOUT_BODY:
                receive = await receive_body(receive, self._settings.max_body, self._settings.body_timeout)
            await self._app(scope, receive, response.send)
        except Exception as error:
            failure = as_failure(error)
            log_fault(failure, error, f"{scope['method']} {scope['path']}{name and f' of {name}'}")
            if response.started:
                raise
            answer = failure.to_response(scope["path"])
            if failure.code == "two_lengths":  # a proxy may have gone by the other: the rest is no request
                answer.headers["Connection"] = "close"
            await answer(scope, receive, response.send)

    def _check(self, method: str, path: str, headers: Headers) -> str:
        """Return the name of the holder of the request's key."""
        if len(headers) > _MAX_HEADERS:
            raise Failure(431, f"the request has more than {_MAX_HEADERS} headers", "too_many_headers")
        check_host(headers, self._settings)
        check_origin(method, headers, self._settings.cors)
        name = "" if path in OPEN_PATHS else check_key(headers, self._settings)
        length = headers.get("content-length", "0")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Failure(400, "a body has a Content-Length or a Transfer-Encoding, not both", "two_lengths")
        if not length.isdecimal() or int(length[:20]) > self._settings.max_body:
            raise too_large(self._settings.max_body)
        return name


class _Response:
    """Adds headers to a response and remembers whether it has started."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)
