"""ggml's own quantizers, out of the libggml-base that llama-cpp-python ships: the truth about bytes."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


def type_sizes(type_id: int) -> tuple[str, int, int]:
    """Name, weights per block, bytes per block."""
    traits = _library().ggml_get_type_traits(type_id).contents
    return traits.type_name.decode(), traits.blck_size, traits.type_size


def requires_imatrix(type_id: int) -> bool:
    return bool(_library().ggml_quantize_requires_imatrix(type_id))


def quantize(x: np.ndarray, type_id: int, imatrix: np.ndarray | None = None) -> np.ndarray:
    """ggml_quantize_chunk over all rows of x (n_rows, n_in): uint8 (n_rows, row_bytes)."""
    n_rows, n_in = x.shape
    assert x.dtype == np.float32 and x.flags.c_contiguous
    out = np.zeros((n_rows, _library().ggml_row_size(type_id, n_in)), np.uint8)
    quantize_into(out, x, type_id, imatrix)
    return out


def quantize_into(out: np.ndarray, x: np.ndarray, type_id: int, imatrix: np.ndarray | None = None) -> None:
    n_rows, n_in = x.shape
    importance = None if imatrix is None else imatrix.ctypes.data
    done = _library().ggml_quantize_chunk(type_id, x.ctypes.data, out.ctypes.data, 0, n_rows, n_in, importance)
    assert done == out.size


def dequantize(data: np.ndarray, type_id: int, n_in: int) -> np.ndarray:
    """The to_float of the type's traits: float32 (n_rows, n_in)."""
    out = np.empty((len(data), n_in), np.float32)
    dequantize_into(out, data, type_id)
    return out


def dequantize_into(out: np.ndarray, data: np.ndarray, type_id: int) -> None:
    assert data.flags.c_contiguous and out.flags.c_contiguous
    traits = _library().ggml_get_type_traits(type_id).contents
    if type_id == 0:  # F32 has no to_float
        out[:] = data.view(np.float32)
    else:
        traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
