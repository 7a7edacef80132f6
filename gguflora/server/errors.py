"""Errors in OpenAI's format, ``{"error": {"message", "type", "param", "code"}}``, without directories or tracebacks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gguflora.errors import (
    AdapterNameError,
    DivergedError,
    EngineClosedError,
    EngineError,
    GenerationError,
    GgufloraError,
    MissingExtraError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)
from gguflora.server.json_response import JSONResponse
from gguflora.system.terminal import printable

_LOG: Final = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1
_ANTHROPIC: Final = re.compile(r"/messages(/count_tokens)?$")
_DIRECTORY: Final = re.compile(r"(?<![\w./])/(?:[^/\s:'\"]+/)+")


class Failure(HTTPException):
    """An error that the client is told.

    Args:
        status: HTTP status.
        message: what went wrong, and what to try.
        code: short name of the error, for programs.
        param: field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def kind(self) -> str:
        """OpenAI's ``type`` of the error."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the error in OpenAI's format."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def to_anthropic(self) -> dict[str, Any]:
        """Return the error in Anthropic's format."""
        kinds = {404: "not_found_error", 413: "request_too_large"}
        kind = "api_error" if self.status >= 500 else kinds.get(self.status, self.kind)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def to_response(self, path: str = "") -> JSONResponse:
        """Return the error as an HTTP response, in the format of the API that ``path`` belongs to."""
        headers = {429: {"Retry-After": str(_RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        content = self.to_anthropic() if _ANTHROPIC.search(path) else self.to_dict()
        return JSONResponse(content, self.status, headers)


def without_directories(message: str, folders: Iterable[Path] = ()) -> str:
    """Remove directories from the paths in a message, so that only the names of files remain.

    Args:
        message: the message.
        folders: directories to remove even if their names contain spaces.
    """
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
    (RequestError, 400, "invalid_request", None),
    (EngineError, 500, "engine_failed", None),  # the server's own: no context or template process could be made
    (MissingExtraError, 501, "not_installed", None),
    (GgufloraError, 400, "invalid_request", None),
)
"""Status, code and parameter of each error; the first class that matches is used."""


def as_failure(error: Exception, folders: Iterable[Path] = ()) -> Failure:
    """Turn an exception into what the client is told, without ``folders`` and other directories."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, RequestValidationError):
        return _as_validation_failure(error)
    if isinstance(error, HTTPException):
        return Failure(error.status_code, str(error.detail))
    for kind, status, code, param in _FAILURES:
        if isinstance(error, kind):
            return Failure(status, without_directories(str(error), folders), code, param)
    if isinstance(error, UnicodeEncodeError):  # pydantic cannot tell an error about a field of such a name
        return Failure(400, "the body has half of a surrogate pair where text is needed", "invalid_value")
    return Failure(500, "internal error; the server's log has the details", "internal_error")


_KIND: Final = re.compile(r".*\[.*|[A-Z]\w*|str|int|float|bool|dict")
"""What pydantic puts into the place of an error beside names of fields: which kind of a union it has tried."""


def _as_validation_failure(error: RequestValidationError) -> Failure:
    first = error.errors()[0]
    field = [str(part) for part in first["loc"] if part != "body" and not _KIND.fullmatch(str(part))]
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {first.get('ctx', {}).get('error', reason)}", "invalid_json")
    if first["type"] == "refused_field":
        name = ".".join([*field, first["ctx"]["field"]])
        return Failure(400, reason, "invalid_value", name)
    param = ".".join(field) or None
    return Failure(400, f"{param}: {reason}" if param else reason, "invalid_value", param)


async def handle_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with an error, and log it if it is the server's; FastAPI calls this."""
    failure = as_failure(error, request.app.state.service.folders())
    log_fault(failure, error, f"{request.method} {request.url.path}")
    return failure.to_response(request.url.path)


def log_fault(failure: Failure, error: Exception, request: str) -> None:
    """Log an error that the client cannot have caused, with its traceback; ``request`` is what was asked for."""
    if failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _LOG.error("%s failed", printable(request, keep=""), exc_info=error)
