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
    shown,
)

P = ParamSpec("P")
R = TypeVar("R")

KINDS: Final[Mapping[str, Mapping[str, Kind]]] = {
    "apply_patch": {"base": "file", "patch": "file"},
    "combine": {"adapters": "adapter", "base": "config"},
    "compare": {"base": "file", "merged": "file", "adapters": "adapter", "text": "file"},
    "convert": {"adapter": "adapter", "base": "config"},
    "diff": {"a": "adapter", "b": "adapter", "base": "config"},
    "export": {"lora": "adapter", "base": "config"},
    "extract": {"finetuned": "model", "base": "model"},
    "inspect": {"adapter": "adapter", "base": "config"},
    "load": {"path": "adapter"},
    "assemble": {"base": "file", "adapters": "adapter", "imatrix": "file"},
    "merge_part": {"base": "file", "adapters": "adapter", "base_f16": "model", "imatrix": "file"},
    "merge": {"base": "file", "adapters": "adapter", "base_f16": "model", "imatrix": "file"},
    "read_adapter": {"path": "adapter"},
    "open_chat": {"base": "file", "adapters": "adapter"},
    "resize": {"adapter": "adapter", "base": "config"},
    "run": {"base": "file", "adapters": "adapter"},
    "serve": {"base": "file", "adapters": "adapter"},
}
"""The inputs of each command, and as what a folder is fetched."""

_OUTPUTS: Final = ("out", "patch", "plot", "report")


def local_inputs(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose inputs, as `KINDS` lists them, may be remote: it is given local copies.

    The command raises `RemoteError` if one cannot be fetched, and `OutputError` if an output is remote.
    """
    kinds = KINDS[command.__name__]

    @wraps(command)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        names = list(signature(command).parameters)[: len(args)]
        given = {**dict(zip(names, args, strict=True)), **kwargs}
        _refuse_remote_outputs(given, kinds)
        local = {name: _fetched(value, kinds[name]) if name in kinds else value for name, value in given.items()}
        return command(*[local.pop(name) for name in names], **local)  # type: ignore[arg-type]

    return called


def _refuse_remote_outputs(arguments: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    for name in _OUTPUTS:
        value = arguments.get(name)
        if name not in kinds and isinstance(value, str | os.PathLike) and looks_remote(value):
            raise OutputError(f"{shown(value)}: outputs of single commands are local; a pipeline's may be remote")
    if arguments.get("in_place") and is_remote(arguments["base"]):
        raise RemoteError(f"{shown(arguments['base'])}: only a local model can be changed in place")


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
