"""Every error gguflora raises on purpose.

::

    GgufloraError                 caught once in cli/app.py: message on stderr, exit code 1
    |-- FormatError               a file is damaged or not of the expected format
    |   |-- GgufError
    |   `-- SafetensorsError
    |-- AdapterError              an adapter's configuration or tensors do not make sense
    |   `-- UnsupportedAdapterError   they do, but this operation cannot express them
    |-- ArchitectureError         a module of the adapter has no place in the base model
    |-- MismatchError             adapter and base do not fit together (shapes, architecture)
    |-- QuantizationError         values or shapes a quant type cannot hold
    |   `-- NonFiniteError        NaN or infinity; carries row and column
    |-- OutputError               the target cannot be written (exists, no space, not writable)
    |-- HotSwapError              llama.cpp refused an adapter, or an adapter set is used wrongly
    `-- NativeError               the compiled kernels cannot do what was asked (unknown ISA)
"""

from __future__ import annotations


class GgufloraError(Exception):
    """Base of all errors gguflora raises on purpose."""


class FormatError(GgufloraError):
    """A file is damaged or not of the expected format."""


class GgufError(FormatError):
    """A GGUF file cannot be read."""


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


class NativeError(GgufloraError):
    """The compiled kernels cannot do what was asked."""
