"""Every error gguflora raises on purpose.

::

    GgufloraError                 caught once in cli/app.py: message on stderr, exit code 1
    |-- FormatError               a file is damaged or not of the expected format
    |   |-- GgufError
    |   |-- PatchError
    |   `-- SafetensorsError
    |-- AdapterError              an adapter's configuration or tensors do not make sense
    |   `-- UnsupportedAdapterError   they do, but this operation cannot express them
    |-- ArchitectureError         a module of the adapter has no place in the base model
    |-- MismatchError             adapter and base do not fit together (shapes, architecture)
    |-- QuantizationError         values or shapes a quant type cannot hold
    |   `-- NonFiniteError        NaN or infinity; carries row and column
    |-- OutputError               the target cannot be written (exists, no space, not writable)
    |-- UsageError                an argument is out of range, or arguments contradict each other
    |-- MissingExtraError         a package is missing that an extra of gguflora installs
    |-- RemoteError               a remote file cannot be found, read or written, or its checksum is wrong
    |-- RecipeError               a pipeline's recipe does not make sense
    |-- ClusterError              a Dask cluster cannot be used, or a process died that did a pipeline's job
    |-- HotSwapError              llama.cpp refused an adapter, or an adapter set is used wrongly
    |-- EngineError               the serving engine cannot do what was asked
    |   |-- EngineClosedError     it is closed
    |   |-- QueueFullError        too many requests wait already
    |   |-- GenerationError       a request failed while it was computed
    |   |   `-- DivergedError         its adapters' numbers have grown beyond all bounds
    |   `-- RequestError          a request makes no sense
    |       |-- AdapterNameError      no adapter of this name is loaded, or the name is taken
    |       `-- PromptTooLongError    the prompt does not fit the context
    |-- ServerError               the server cannot start
    `-- NativeError               the compiled kernels cannot do what was asked (unknown ISA)
"""

from __future__ import annotations

from collections.abc import Collection


class GgufloraError(Exception):
    """Base of all errors gguflora raises on purpose."""


class UsageError(GgufloraError):
    """An argument is out of range, or arguments contradict each other."""


class MissingExtraError(GgufloraError):
    """A package is missing that an extra of gguflora installs.

    Args:
        what: what needs the package.
        package: the package's name.
        extra: the extra of gguflora that installs it.
        otherwise: another way out.
    """

    def __init__(self, what: str, package: str, extra: str, otherwise: str = "") -> None:
        way_out = f"pip install 'gguflora[{extra}]'" + (f", {otherwise}" if otherwise else "")
        super().__init__(f"{what} needs {package}: {way_out}")
        self.extra = extra


class FormatError(GgufloraError):
    """A file is damaged or not of the expected format."""


class GgufError(FormatError):
    """A GGUF file cannot be read."""


class PatchError(FormatError):
    """A patch or undo file cannot be used."""


class SafetensorsError(FormatError):
    """A safetensors (or torch ``.bin``) file cannot be read."""


class AdapterError(GgufloraError):
    """An adapter's configuration or tensors do not make sense."""


class UnsupportedAdapterError(AdapterError):
    """The adapter is sound, but the operation asked for cannot express it."""


class ArchitectureError(GgufloraError):
    """A module of the adapter has no place in the base model."""


class MismatchError(GgufloraError):
    """Adapter and base model do not fit together."""


class QuantizationError(GgufloraError):
    """Values or shapes that a quant type cannot hold."""


class NonFiniteError(QuantizationError):
    """A NaN or an infinity where a number is needed.

    Attributes:
        row: row of the offending value.
        column: its column.
    """

    def __init__(self, message: str, row: int, column: int) -> None:
        super().__init__(message)
        self.row = row
        self.column = column


class OutputError(GgufloraError):
    """The target cannot be written."""


class HotSwapError(GgufloraError):
    """llama.cpp refused an adapter, or an adapter set is used wrongly."""


class EngineError(GgufloraError):
    """The serving engine cannot do what was asked."""


class EngineClosedError(EngineError):
    """The engine is closed."""


class QueueFullError(EngineError):
    """Too many requests wait already; try again later."""


class GenerationError(EngineError):
    """A request failed while it was computed; the engine and other requests live on."""


class DivergedError(GenerationError):
    """The logits are not finite with these adapters at these scales."""


class RequestError(EngineError):
    """A request makes no sense: a parameter out of range, a token the model does not have, a broken template."""


class AdapterNameError(RequestError):
    """No adapter of this name is loaded, or the name is taken or malformed."""


class PromptTooLongError(RequestError):
    """The prompt does not fit the context."""


class ServerError(GgufloraError):
    """The server cannot start."""


class NativeError(GgufloraError):
    """The compiled kernels cannot do what was asked."""


class RecipeError(GgufloraError):
    """A pipeline's recipe does not make sense."""


class RemoteError(GgufloraError):
    """A remote file cannot be found, read or written, or its checksum is wrong."""


class ClusterError(GgufloraError):
    """A Dask cluster cannot be used, or a process died that did a pipeline's job."""


def listed(names: Collection[str], most: int = 8) -> str:
    """A few names for a message."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
