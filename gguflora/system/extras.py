"""Packages that an installation may lack: faces that can be imported without them, and fail when they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NoReturn

from gguflora.errors import MissingExtraError


def lazy_face(package: str, homes: Mapping[str, str], needed: str, error: MissingExtraError) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose modules need another that may be missing.

    Args:
        package: name of the package of ours.
        homes: the module of each of its public names.
        needed: the module that they import.
        error: raised when one of them is called while ``needed`` is missing.
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
