"""Answers in JSON that every client can parse: a number that is not finite is null, not an error of the server."""

from __future__ import annotations

from typing import Any

from fastapi import responses

from gguflora.files.strict_json import to_json


class JSONResponse(responses.JSONResponse):
    """A JSON body after `gguflora.files.strict_json.strict`; FastAPI's own raises ValueError for NaN."""

    def render(self, content: Any) -> bytes:  # noqa: ANN401  (any JSON value)
        """Return the body."""
        return to_json(content, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
