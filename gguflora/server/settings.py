"""Settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

KEY_VARIABLE: Final = "GGUFLORA_API_KEY"


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and permissions of one server.

    Attributes:
        api_key: bearer token that clients must send; None requires no token.
        api_keys: further keys with the names of their holders.
        private_cache: keep what the holder of a key has sent from speeding up others, who could see it.
        allow_load: directory from which clients may load adapters; None forbids loading.
        max_adapters: largest number of adapters that clients can have loaded at once.
        max_tokens: largest number of tokens of one answer.
        max_body: largest size of a request in bytes.
        max_answers: largest number of answers to one request (``n`` times the number of prompts).
        body_timeout: seconds in which the body of a request must arrive.
        timeout: seconds after which a request is aborted; waiting counts.
        hosts: host names that requests may be addressed to. None allows any with a key; without one it allows
            addresses, "localhost" and ``host``, because no foreign web page can have these names.
        host: host that the server was told to listen on.
        aliases: further names of adapter sets, such as ``legal@0.5+tone``; None stands for the default set.
        default_adapters: the adapter set of requests that name none; None is the base.
        accept_any_model: answer requests for unknown models with the default set.
        cors: origins whose web pages may use the server, such as ``https://example.org``, or ``*``.
    """

    api_key: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict)
    private_cache: bool = False
    allow_load: Path | None = None
    max_adapters: int = 256
    max_tokens: int = 2048
    max_body: int = 2 << 20
    max_answers: int = 16
    body_timeout: float = 30.0
    timeout: float = 600.0
    hosts: frozenset[str] | None = None
    host: str = "127.0.0.1"
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    default_adapters: str | None = None
    accept_any_model: bool = False
    cors: tuple[str, ...] = ()

    @property
    def has_keys(self) -> bool:
        """Whether clients must send a key."""
        return self.api_key is not None or bool(self.api_keys)
