"""Which names a server answers to, and which web pages and machines may use it.

DNS rebinding: a foreign web page lets its own name point to this machine, and is then of one origin with the server.
The ``Host`` header carries the page's name, so without a key a server answers only to names that no stranger owns.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request

from gguflora.server.errors import Failure
from gguflora.server.settings import KEY_VARIABLE, Settings

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?", re.ASCII)
_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(.+)", re.ASCII)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself: localhost, 127.0.0.0/8 or ::1."""
    address = _address(host)
    return host.lower().rstrip(".") == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def check_host(headers: Headers, settings: Settings) -> None:
    """Check that a request is addressed to this server by a name of its own.

    Raises:
        Failure: 400 if the ``Host`` header is malformed, 403 if it names another host.
    """
    text = headers.get("host", "")
    name = _host_name(text)
    if name is None:
        raise Failure(400, "the Host header is not a host name or address with an optional port", "bad_host")
    if settings.hosts is not None:
        if name not in settings.hosts:
            raise Failure(403, f"the host of this server must be {' or '.join(sorted(settings.hosts))}", "wrong_host")
    elif not settings.has_keys and not (name in {"localhost", settings.host.lower()} or _address(name)):
        raise Failure(
            403,
            "without a key this server answers only to addresses such as 127.0.0.1, to 'localhost' and to the name "
            f"given with --host; set {KEY_VARIABLE} to use other names",
            "wrong_host",
        )


def check_origin(method: str, headers: Headers, allowed: Collection[str] = ()) -> None:
    """Protect against foreign web pages that post to this server without the user's knowledge.

    Args:
        method: the request's method.
        headers: its headers.
        allowed: origins of other pages that may use this server; ``*`` allows all.

    Raises:
        Failure: 400 if the ``Origin`` header is malformed, 403 if it is another page's.
    """
    origin = headers.get("origin")
    if origin is None:
        return
    found = _ORIGIN.fullmatch(origin)
    if origin != "null" and (found is None or _host_name(found[1]) is None):
        raise Failure(400, "the Origin header is not an origin, such as http://127.0.0.1:8080", "bad_origin")
    if origin in allowed or "*" in allowed:
        return
    if method != "GET" and (found is None or found[1].lower() != headers.get("host", "").lower()):
        raise Failure(403, "requests from other web pages are not allowed", "wrong_origin")


def check_may_load(request: Request, settings: Settings) -> None:
    """Check that a request may load and unload adapters: from another machine this needs a key.

    Raises:
        Failure: 403 if there is no key and the client is on another machine.
    """
    client = request.client
    if not settings.has_keys and client is not None and not is_loopback(client.host):
        raise Failure(
            403,
            f"loading and unloading adapters from another machine needs a key; start the server with {KEY_VARIABLE}",
            "key_required",
        )


def _host_name(text: str) -> str | None:
    """Return the host of ``host[:port]`` in lower case, without brackets and final dot; None if it is malformed."""
    found = _HOST.fullmatch(text)
    if found is None or int((found[2] or ":0")[1:]) > 65535:
        return None
    if found[1].startswith("["):
        return found[1][1:-1].lower() if _address(found[1][1:-1]) else None
    return found[1].lower().rstrip(".") or None
