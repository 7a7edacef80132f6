"""Optional dependencies: let a package be imported without them, and raise an error only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NoReturn

from gguflora.errors import MissingExtraError


def lazy_face(package: str, homes: Mapping[str, str], needed: str, error: MissingExtraError) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package whose modules import an optional dependency.

    Args:
        package: name of gguflora's package.
        homes: the module that defines each of its public names.
        needed: name of the optional module they import.
        error: raised when a public name is called while ``needed`` is not installed.
    """

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    def get(name: str) -> Any:  # noqa: ANN401  (a function or a class)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(homes[name]), name)
        except ModuleNotFoundError as missing:
            if missing.name != needed:
                raise
            return fail

    return get
