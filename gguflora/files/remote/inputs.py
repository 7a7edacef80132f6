"""Commands take remote inputs: they are fetched before the command sees them."""

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
    looks_remote,
    redacted,
)

P = ParamSpec("P")
R = TypeVar("R")

_KINDS: Final = "remote_inputs"
"""Attribute of a command that holds the kinds of its inputs."""

_OUTPUTS: Final = ("out", "patch", "plot", "report")


def remote_inputs(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a command take remote inputs: those it names are fetched, and the command is given local copies.

    The command raises `RemoteError` if one cannot be fetched, and `OutputError` if an output is remote.

    Args:
        kinds: of each input, as what a folder is fetched. `input_kinds` tells them again.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @wraps(command)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            names = list(signature(command).parameters)[: len(args)]
            given = {**dict(zip(names, args, strict=True)), **kwargs}
            _refuse_remote_outputs(given, kinds)
            local = {name: _fetched(value, kinds[name]) if name in kinds else value for name, value in given.items()}
            return command(*[local.pop(name) for name in names], **local)  # type: ignore[arg-type]

        called.__dict__[_KINDS] = kinds
        return called

    return decorate


def input_kinds(command: Callable[..., object]) -> Mapping[str, Kind]:
    """The inputs of a command that may be remote, and as what a folder is fetched; none if it takes no such inputs."""
    kinds: Mapping[str, Kind] = getattr(command, _KINDS, {})
    return kinds


def _refuse_remote_outputs(arguments: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    for name in _OUTPUTS:
        value = arguments.get(name)
        if name not in kinds and isinstance(value, str | os.PathLike) and looks_remote(value):
            raise OutputError(f"{redacted(value)}: outputs of single commands are local; a pipeline's may be remote")
    if arguments.get("in_place") and is_remote(arguments["base"]):
        raise RemoteError(f"{redacted(arguments['base'])}: only a local model can be changed in place")


def _fetched(given: Any, kind: Kind) -> Any:  # noqa: ANN401  (a location, with its scale perhaps, or a list of them)
    if isinstance(given, Mapping):
        return {name: _fetched(one, kind) for name, one in given.items()}
    if isinstance(given, list):
        return [_fetched(one, kind) for one in given]
    if isinstance(given, tuple):
        return tuple(_fetched(one, kind) for one in given)
    if isinstance(given, str | os.PathLike) and is_remote(given):
        from gguflora.files.remote.fetching import fetch  # noqa: PLC0415  (import gguflora does not load it)

        return fetch(os.fspath(given), kind)
    return given
