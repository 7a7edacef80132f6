"""The version, as the installed package states it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _installed() -> str:
    try:
        return version("gguflora")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0.0.0+unknown"


__version__: Final = _installed()
