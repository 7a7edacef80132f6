"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``, without paths and tracebacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gguflora.errors import (
    AdapterNameError,
    DivergedError,
    EngineClosedError,
    GenerationError,
    GgufloraError,
    PromptTooLongError,
    QueueFullError,
)

_RETRY_SECONDS: Final = 1
_DIRECTORY: Final = re.compile(r"(?<![\w./])/(?:[^/\s:'\"]+/)+")


class Failure(HTTPException):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what went wrong, and what to try.
        code: for programs.
        param: the field at fault.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        headers = {429: {"Retry-After": str(_RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.to_dict(), self.status, headers)


def without_directories(message: str, folders: Iterable[Path] = ()) -> str:
    """The message with the names of files, but not where they lie; ``folders`` may have spaces in their names."""
    spellings = {str(path) for folder in folders for path in (folder, folder.absolute(), folder.resolve())}
    for spelling in sorted(spellings, key=len, reverse=True):
        message = message.replace(f"{spelling}/", "")
    return _DIRECTORY.sub("", message)


_FAILURES: Final[tuple[tuple[type[GgufloraError], int, str, str | None], ...]] = (
    (QueueFullError, 429, "queue_full", None),
    (AdapterNameError, 404, "model_not_found", "model"),
    (PromptTooLongError, 400, "context_length_exceeded", "prompt"),
    (EngineClosedError, 503, "shutting_down", None),
    (DivergedError, 400, "diverged", "model"),
    (GenerationError, 500, "generation_failed", None),
    (GgufloraError, 400, "invalid_request", None),
)
"""Status, code and parameter; the first class that fits."""


def failure_of(error: Exception, folders: Iterable[Path] = ()) -> Failure:
    """What to tell a client about an exception, without the names of ``folders`` and other directories."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return Failure(error.status_code, str(error.detail))
    for kind, status, code, param in _FAILURES:
        if isinstance(error, kind):
            return Failure(status, without_directories(str(error), folders), code, param)
    return Failure(500, "internal error; the server's log has the details", "internal_error")


def _of_validation(error: RequestValidationError) -> Failure:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {first.get('ctx', {}).get('error', reason)}", "invalid_json")
    param = ".".join(where) or None
    return Failure(400, f"{param}: {reason}" if param else reason, "invalid_value", param)


async def answer_failure(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's exception handler."""
    return failure_of(error, request.app.state.service.folders()).response()


def as_event(error: Failure) -> bytes:
    """A failure in the middle of a stream, as OpenAI's clients expect it."""
    return f"data: {json.dumps(error.to_dict())}\n\n".encode()
