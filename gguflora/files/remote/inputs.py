"""A decorator that lets functions take remote inputs: it fetches them, and passes local paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, Final, ParamSpec, TypeVar

from gguflora.errors import OutputError, RemoteError
from gguflora.files.remote.location import (
    Kind,
    is_remote,
    local_path,
    looks_remote,
    redacted,
)

P = ParamSpec("P")
R = TypeVar("R")

_KINDS: Final = "remote_inputs"
"""Attribute of a decorated function that holds the kinds of its inputs."""

_OUTPUTS: Final = ("out", "patch", "plot", "report")
"""Arguments that name outputs."""


def remote_inputs(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it takes remote inputs: they are fetched, and the function gets local paths.

    The decorated function raises `RemoteError` if an input cannot be fetched, and `OutputError` if an output is remote.

    Args:
        kinds: the name of each argument that may be remote, and the kind of folder it is. `input_kinds` returns them.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @wraps(command)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            names = list(signature(command).parameters)[: len(args)]
            given = {**dict(zip(names, args, strict=True)), **kwargs}
            _refuse_remote_outputs(given, kinds)
            local = {name: _fetch_all(value, kinds[name]) if name in kinds else value for name, value in given.items()}
            return command(*[local.pop(name) for name in names], **local)  # type: ignore[arg-type]

        wrapper.__dict__[_KINDS] = kinds
        return wrapper

    return decorate


def input_kinds(command: Callable[..., object]) -> Mapping[str, Kind]:
    """Return the arguments of a function that may be remote, and the kind of each; empty if it is not decorated."""
    kinds: Mapping[str, Kind] = getattr(command, _KINDS, {})
    return kinds


def _refuse_remote_outputs(arguments: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    for name in _OUTPUTS:
        value = arguments.get(name)
        if name not in kinds and isinstance(value, str | os.PathLike) and looks_remote(value):
            raise OutputError(
                f"{redacted(value)}: outputs of single commands are local; give a local path, or run a pipeline, "
                "whose outputs may be remote"
            )
    if arguments.get("in_place") and is_remote(arguments["base"]):
        raise RemoteError(f"{redacted(arguments['base'])}: only a local model can be changed in place")


def _fetch_all(given: Any, kind: Kind) -> Any:  # noqa: ANN401  (a location, perhaps with its scale, or a list of them)
    if isinstance(given, Mapping):
        return {name: _fetch_all(item, kind) for name, item in given.items()}
    if isinstance(given, list):
        return [_fetch_all(item, kind) for item in given]
    if isinstance(given, tuple):
        return tuple(_fetch_all(item, kind) for item in given)
    if isinstance(given, str) and (path := local_path(given)) is not None:
        return path
    if isinstance(given, str | os.PathLike) and is_remote(given):
        from gguflora.files.remote.fetching import fetch  # noqa: PLC0415  (import gguflora does not load it)

        return fetch(os.fspath(given), kind)
    return given
