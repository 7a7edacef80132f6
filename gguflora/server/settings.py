"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

KEY_VARIABLE: Final = "GGUFLORA_API_KEY"


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and permissions of one server.

    Attributes:
        api_key: what clients must send as a bearer token; None lets everybody in.
        allow_load: directory from which clients may load adapters; None forbids it.
        max_tokens: most tokens that one answer may have.
        max_body: most bytes that one request may have.
        max_answers: most answers (``n`` times the number of prompts) that one request may ask for.
        timeout: seconds after which a request is given up, in the queue or while it is answered.
        hosts: names by which the server may be addressed; None for any.
    """

    api_key: str | None = None
    allow_load: Path | None = None
    max_tokens: int = 2048
    max_body: int = 2 << 20
    max_answers: int = 16
    timeout: float = 600.0
    hosts: frozenset[str] | None = None
