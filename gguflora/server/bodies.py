"""Receive the body of a request whole, and refuse one that is costly to read before anything reads it.

A body of the largest size can hold a million values, and pydantic keeps an error for each value and each alternative of
a union: seconds of the event loop and gigabytes. So the values of a body are counted in its bytes first, and the models
of `gguflora.server.schemas` stop at the first error of every list (`stop_at_first_error`).
"""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import Any, Final

from pydantic_core import core_schema
from starlette.types import Message, Receive

from gguflora.server.errors import Failure

MAX_VALUES: Final = 1 << 18
"""Largest number of values in a body; a prompt may be a list of tokens."""
MAX_TEXTS: Final = 1 << 16
"""Largest number of texts, names of fields among them."""
MAX_OBJECTS: Final = 1 << 14
"""Largest number of objects and lists."""
MAX_FIELDS: Final = 1 << 15
"""Largest number of fields of all objects."""
MAX_DEPTH: Final = 128
"""Largest number of objects and lists inside each other."""

_BRACKET: Final = re.compile(rb"[\[\]{}]")
_CHILDREN: Final = ("schema", "items_schema", "choices", "keys_schema", "values_schema", "definitions")
_FAIL_FAST: Final = {
    kind
    for kind, function in (("list", core_schema.list_schema), ("set", core_schema.set_schema),
                           ("dict", core_schema.dict_schema))
    if "fail_fast" in inspect.signature(function).parameters
}  # fmt: skip


async def receive_body(receive: Receive, limit: int, seconds: float) -> Receive:
    """Receive the whole body of a request and check it.

    Args:
        receive: the request's own function.
        limit: largest size in bytes; a Content-Length may be missing or wrong.
        seconds: time in which the body must arrive.

    Returns:
        A function that returns the body in one message, and then what ``receive`` returns.

    Raises:
        Failure: 413 if the body is too large, 408 if it does not arrive in time, 400 as `check_body`.
    """
    try:
        async with asyncio.timeout(seconds):
            body = await _whole(receive, limit)
    except TimeoutError:
        raise Failure(408, f"the body did not arrive within {seconds:g} s", "body_too_slow") from None
    if body is None:
        return receive
    check_body(body)
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _whole(receive: Receive, limit: int) -> bytes | None:
    """Return the body; None if the client has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


def too_large(limit: int) -> Failure:
    """Return the error for a body of more than ``limit`` bytes."""
    return Failure(413, f"the body is too large; the limit is {limit} bytes", "body_too_large")


def check_body(body: bytes) -> None:
    """Check that JSON has a bounded number of values, without reading it; other faults are left to its reader.

    Raises:
        Failure: if the text is not UTF-8, or if it has more than `MAX_VALUES` values, `MAX_TEXTS` texts, `MAX_OBJECTS`
            objects and lists, `MAX_FIELDS` fields, or `MAX_DEPTH` objects and lists inside each other.
    """
    if b"\0" in body or not _is_utf8(body):  # json.loads would take UTF-16, in which nothing below finds its place
        raise Failure(400, "the body is not JSON in UTF-8", "invalid_json")
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote that is left begins or ends a text
    if plain.count(b'"') > 2 * MAX_TEXTS:
        raise _too_complex("texts", MAX_TEXTS)
    rest = b"".join(plain.split(b'"')[::2])
    for what, count, most in (
        ("objects and lists", rest.count(b"{") + rest.count(b"["), MAX_OBJECTS),
        ("fields", rest.count(b":"), MAX_FIELDS),
        ("values", rest.count(b","), MAX_VALUES),
    ):
        if count > most:
            raise _too_complex(what, most)
    depth = 0
    for bracket in _BRACKET.findall(rest):
        depth += 1 if bracket in b"{[" else -1
        if depth > MAX_DEPTH:
            raise _too_complex("objects and lists inside each other", MAX_DEPTH)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _too_complex(what: str, most: int) -> Failure:
    return Failure(400, f"the body has more than {most} {what}", "body_too_complex")


def stop_at_first_error(schema: Any) -> Any:  # noqa: ANN401  (one of pydantic's many TypedDicts)
    """Let every list, set and dict of a pydantic core schema stop at its first error; change it and return it."""
    if isinstance(schema, dict):
        if schema["type"] in _FAIL_FAST:
            schema["fail_fast"] = True
        for name in _CHILDREN:
            stop_at_first_error(schema.get(name))
        for field in schema["fields"].values() if schema["type"] == "model-fields" else ():
            stop_at_first_error(field)
    elif isinstance(schema, list | tuple):
        for item in schema:
            stop_at_first_error(item)
    return schema
