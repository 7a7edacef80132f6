"""Every error gguflora raises on purpose.

The tree of the classes:

    GgufloraError                 caught once in cli/app.py: message on stderr, exit code 1
    |-- FormatError               a file is damaged or not of the expected format
    |   |-- GgufError
    |   |-- PatchError
    |   `-- SafetensorsError
    |-- AdapterError              an adapter's configuration or tensors are invalid
    |   `-- UnsupportedAdapterError   the adapter is valid, but this operation does not support it
    |-- ArchitectureError         a module of the adapter has no counterpart in the base model
    |-- MismatchError             adapter and base do not fit together (shapes, architecture)
    |-- QuantizationError         values or shapes that a quant type cannot hold
    |   `-- NonFiniteError        NaN or infinity; carries row and column
    |-- TrainingDataError         rows of training data cannot be used; carries all of them
    |-- TrainingError             a training run cannot go on, or would train another model than is served
    |-- OutputError               the target cannot be written (exists, no space, not writable)
    |-- UsageError                an argument is out of range, or arguments contradict each other
    |-- MissingExtraError         a package that one of gguflora's extras installs is missing
    |-- RemoteError               a remote file cannot be found, read or written, or its checksum is wrong
    |-- RecipeError               a pipeline's recipe is invalid
    |-- ClusterError              a Dask cluster cannot be used, or a process running a pipeline job died
    |-- HotSwapError              llama.cpp refused an adapter, or an adapter set is used wrongly
    |-- EngineError               the serving engine cannot carry out a request
    |   |-- EngineClosedError     the engine is closed
    |   |-- QueueFullError        too many requests are waiting
    |   |-- GenerationError       a request failed while it was computed
    |   |   `-- DivergedError         its logits are not finite
    |   `-- RequestError          a request is invalid
    |       |-- AdapterNameError      no adapter of this name is loaded, or the name is taken
    |       `-- PromptTooLongError    the prompt does not fit the context
    |-- ServerError               the server cannot start
    `-- NativeError               the compiled kernels do not support the request (unknown ISA)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class GgufloraError(Exception):
    """Base of all errors gguflora raises on purpose. Every one can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args, vars(self))


def _unpickled(kind: type[GgufloraError], args: tuple[Any, ...], attributes: dict[str, Any]) -> GgufloraError:
    """Return an error as it was, without a call of its constructor, whose arguments may differ from ``args``."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class UsageError(GgufloraError):
    """An argument is out of range, or arguments contradict each other."""


class MissingExtraError(GgufloraError):
    """A package that one of gguflora's extras installs is missing.

    Args:
        feature: the feature that needs the package.
        package: name of the package.
        extra: the extra of gguflora that installs it.
        alternative: what the user can do instead of installing it.

    Attributes:
        extra: the extra of gguflora that installs the package.
    """

    def __init__(self, feature: str, package: str, extra: str, alternative: str = "") -> None:
        remedy = f"pip install 'gguflora[{extra}]'" + (f", {alternative}" if alternative else "")
        if package == "llama-cpp-python":
            remedy += " (pip compiles it, which takes minutes; gguflora doctor says what it needs)"
        super().__init__(f"{feature} needs {package}: {remedy}")
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
    """An adapter's configuration or tensors are invalid."""


class UnsupportedAdapterError(AdapterError):
    """The adapter is valid, but the requested operation does not support it."""


class ArchitectureError(GgufloraError):
    """A module of the adapter has no counterpart in the base model."""


class MismatchError(GgufloraError):
    """Adapter and base model do not fit together."""


class QuantizationError(GgufloraError):
    """Values or shapes that a quant type cannot hold."""


class NonFiniteError(QuantizationError):
    """A NaN or an infinity where a finite number is required.

    Attributes:
        row: row of the offending value.
        column: column of the offending value.
    """

    def __init__(self, message: str, row: int, column: int) -> None:
        super().__init__(message)
        self.row = row
        self.column = column


class TrainingDataError(GgufloraError):
    """Rows of training data cannot be used.

    Attributes:
        problems: one for each row: file, line and reason.
    """

    def __init__(self, message: str, problems: Collection[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class TrainingError(GgufloraError):
    """A training run cannot go on, or would train another model than the one that is served."""


class OutputError(GgufloraError):
    """The target cannot be written."""


class HotSwapError(GgufloraError):
    """llama.cpp refused an adapter, or an adapter set is used wrongly."""


class EngineError(GgufloraError):
    """The serving engine cannot carry out a request."""


class EngineClosedError(EngineError):
    """The engine is closed."""


class QueueFullError(EngineError):
    """Too many requests are waiting; try again later."""


class GenerationError(EngineError):
    """A request failed while it was computed; the engine and other requests are not affected."""


class MixingError(EngineError):
    """A batch of several adapter sets could not be computed; the engine computes it again, set by set."""


class DivergedError(GenerationError):
    """The logits are not finite with these adapters at these scales."""


class RequestError(EngineError):
    """A request is invalid: a parameter out of range, a token the model does not have, a broken template."""


class AdapterNameError(RequestError):
    """No adapter of this name is loaded, or the name is taken or malformed."""


class PromptTooLongError(RequestError):
    """The prompt does not fit the context."""


class ServerError(GgufloraError):
    """The server cannot start."""


class NativeError(GgufloraError):
    """The compiled kernels do not support the request."""


class RecipeError(GgufloraError):
    """A pipeline's recipe is invalid."""


class RemoteError(GgufloraError):
    """A remote file cannot be found, read or written, or its checksum is wrong."""


class ClusterError(GgufloraError):
    """A Dask cluster cannot be used, or a process running a pipeline job died."""


def listed(names: Collection[str], limit: int = 8) -> str:
    """Format names for a message: the first ``limit`` in sorted order, then the number of the others."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
