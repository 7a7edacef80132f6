"""What every request passes before it reaches an endpoint: host, origin, key, size; and the headers of every answer."""

from __future__ import annotations

import hmac
import logging
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguflora.server.errors import Failure, failure_of
from gguflora.server.settings import KEY_VARIABLE, Settings

_LOG: Final = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/", "/page.css", "/page.js", "/icon.svg", "/health"})
"""What needs no key."""

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gates:
    """ASGI middleware which refuses what must not reach an endpoint."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it with the reason why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            await self._app(scope, _limited(receive, self._settings.max_body), answer.send)
        except Exception as error:
            failure = failure_of(error)
            if failure is not error:
                _LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if answer.begun:
                raise
            await failure.response()(scope, receive, answer.send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        self._check_host(headers)
        if method != "GET":
            _check_origin(headers)
        if path not in OPEN_PATHS:
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._settings.max_body:
            raise _too_large(self._settings.max_body)

    def _check_host(self, headers: Headers) -> None:
        """Against DNS rebinding: a page from elsewhere that has made its own name point to this machine."""
        hosts = self._settings.hosts
        if hosts is not None and _host_name(headers.get("host", "")) not in hosts:
            raise Failure(403, f"this server is addressed as {' or '.join(sorted(hosts))}", "wrong_host")

    def _check_key(self, headers: Headers) -> None:
        expected = self._settings.api_key
        if expected is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, expected.encode()):
            raise Failure(401, f"send the server's {KEY_VARIABLE} as 'Authorization: Bearer KEY'", "invalid_api_key")


def _check_origin(headers: Headers) -> None:
    """Against pages from elsewhere which post to this server behind the user's back."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise Failure(403, "requests from other web pages are not allowed", "wrong_origin")


def _host_name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""


def _too_large(limit: int) -> Failure:
    return Failure(413, f"the body is too large; the limit is {limit} bytes", "body_too_large")


def _limited(receive: Receive, limit: int) -> Receive:
    """Refuse a body that grows beyond the limit; its Content-Length may be missing."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return receive_limited


class _Answer:
    """Adds the headers of every answer, and knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)
