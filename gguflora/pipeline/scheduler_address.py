"""What the address of a Dask scheduler says about who can reach it."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def warn_of_plain_address(scheduler: object) -> tuple[str, ...]:
    """Return a warning if a scheduler is reached without TLS over a network, where others can run code on it."""
    if not isinstance(scheduler, str):
        return ()
    parts = urlsplit(scheduler if "://" in scheduler else f"tcp://{scheduler}")
    if parts.scheme not in {"tcp", "ws", "ucx"} or _is_loopback(parts.hostname or ""):
        return ()
    return (
        f"the scheduler {scheduler} is reached without TLS: whoever can reach it can run code on it and its workers, "
        "and read what is sent; use tls:// (docs/distributed.md)",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
