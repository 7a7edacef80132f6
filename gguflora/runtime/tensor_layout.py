"""Where the fields of a ``ggml_tensor`` lie, found by making tensors through ggml's public functions.

Nothing is assumed of the order or size of the fields. Each is searched for in the bytes of a few tensors whose types,
shapes, data and sources are known, and must be found at exactly one place; a ggml where that fails is refused.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from gguflora.errors import HotSwapError

TYPES: Final = {"f32": 0, "f16": 1, "i32": 26, "i64": 27}
"""ggml's numbers of types, which are those of the GGUF format; `find_layout` asks ggml for their names."""

_POINTER, _TEXT, _WHOLE, _LONG = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
_FUNCTIONS: Final[dict[str, tuple[Any, Sequence[Any]]]] = {
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_type_name": (_TEXT, [_WHOLE]),
    "ggml_type_size": (ctypes.c_size_t, [_WHOLE]),
    "ggml_new_tensor": (_POINTER, [_POINTER, _WHOLE, _WHOLE, ctypes.POINTER(_LONG)]),
    "ggml_set_name": (_POINTER, [_POINTER, _TEXT]),
    "ggml_get_name": (_POINTER, [_POINTER]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_op_name": (_TEXT, [_WHOLE]),
    "ggml_op_desc": (_TEXT, [_POINTER]),
    "ggml_add": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_mul_mat_id": (_POINTER, [_POINTER, _POINTER, _POINTER, _POINTER]),
    "ggml_get_rows": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_set_rows": (_POINTER, [_POINTER, _POINTER, _POINTER, _POINTER]),
}
"""What is called, with result and arguments; ``ggml_init`` besides."""

_MEMORY: Final = 1 << 20
_MOST_OPS: Final = 80
"""No operation that is looked for has a higher number: ``ggml_op_name`` is not asked about others."""


class LayoutError(HotSwapError):
    """The fields of a tensor are not where they can be found."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Byte offsets of fields, and the numbers of operations and types; as ``gfl_tensor_layout`` in C."""

    type: int
    ne: int
    nb: int
    op: int
    src: int
    data: int
    name: int
    mul_mat: int
    mul_mat_id: int
    get_rows: int
    set_rows: int
    f32: int = TYPES["f32"]
    f16: int = TYPES["f16"]
    i32: int = TYPES["i32"]
    i64: int = TYPES["i64"]


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of a loaded ggml library (a ``ctypes.CDLL``) that are needed here.

    Raises:
        LayoutError: naming a function that is missing.
    """

    def __init__(self, library: Any) -> None:  # noqa: ANN401  (ctypes has no types for it)
        for name, (result, arguments) in _FUNCTIONS.items():
            setattr(self, name, _function(library, name, result, arguments))
        self.ggml_init = _function(library, "ggml_init", _POINTER, [_InitParams])

    @contextmanager
    def memory(self) -> Iterator[int]:
        """A ``ggml_context`` to make tensors in."""
        context = self.ggml_init(_InitParams(_MEMORY, None, False))
        if not context:
            raise LayoutError("ggml could not be given memory for a few tensors")
        try:
            yield context
        finally:
            self.ggml_free(context)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (set above)
        raise AttributeError(name)


def _function(library: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:  # noqa: ANN401
    try:
        address = ctypes.cast(getattr(library, name), _POINTER).value or 0
    except AttributeError:
        raise LayoutError(f"this ggml has no function {name}") from None
    # a function object of our own: declaring types on the library's would change it for everybody else
    return ctypes.CFUNCTYPE(result, *arguments)(address)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A tensor that was made: its address, what is known of it, and its bytes."""

    pointer: int
    type: int
    shape: tuple[int, ...]
    sources: tuple[int, ...]
    content: bytes

    def holds(self, offset: int, wanted: bytes) -> bool:
        return self.content[offset : offset + len(wanted)] == wanted


def find_layout(ggml: Ggml) -> TensorLayout:
    """Find and prove the layout of a tensor.

    Raises:
        LayoutError: if a field is found nowhere or at several places.
    """
    for name, number in TYPES.items():
        if ggml.ggml_type_name(number) != name.encode():
            raise LayoutError(f"this ggml does not number its types as GGUF does: {number} is not {name}")
    with ggml.memory() as context:
        samples = _samples(ggml, context)
        whole = list(samples.values())
        op = _only("op", 4, whole, lambda sample, at: _is_op(ggml, sample, at))
        operations = {
            name: _int32(samples[name].content, op) for name in ("mul_mat", "mul_mat_id", "get_rows", "set_rows")
        }
        leaves = [sample for sample in whole if not sample.sources]
        return TensorLayout(
            type=_only("type", 4, whole, lambda sample, at: sample.holds(at, struct.pack("=i", sample.type))),
            ne=_only("ne", 8, whole, lambda sample, at: sample.holds(at, struct.pack("=4q", *sample.shape))),
            nb=_only("nb", 8, leaves, lambda sample, at: sample.holds(at, _strides(ggml, sample))),
            op=op,
            src=_only("src", 8, whole, _has_sources),
            data=_only("data", 8, leaves, lambda sample, at: sample.holds(at, _data(ggml, sample))),
            name=_name_offset(ggml, whole),
            **operations,
        )


def _samples(ggml: Ggml, context: int) -> dict[str, _Sample]:
    """Tensors of several types and shapes, and one of each operation that matters."""
    made: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {}

    def leaf(name: str, kind: str, *shape: int) -> int:
        full = (*shape, *[1] * (4 - len(shape)))
        pointer = ggml.ggml_new_tensor(context, TYPES[kind], 4, (_LONG * 4)(*full))
        ggml.ggml_set_name(pointer, name.encode())
        made[name] = (pointer, TYPES[kind], full, ())
        return int(pointer)

    def node(name: str, shape: tuple[int, ...], *sources: int, call: tuple[int, ...] | None = None) -> None:
        pointer = getattr(ggml, f"ggml_{name}")(context, *(call or sources))
        made[name] = (pointer, TYPES["f32"], (*shape, *[1] * (4 - len(shape))), sources)

    a, x = leaf("a", "f16", 7, 5), leaf("x", "f32", 7, 3)
    experts, wide, chosen = leaf("experts", "f32", 7, 5, 4), leaf("wide", "f32", 7, 2, 3), leaf("chosen", "i32", 2, 3)
    rows, cells, ids = leaf("rows", "i32", 6), leaf("cells", "f32", 7, 13), leaf("ids", "i64", 3)
    leaf("four", "f32", 3, 5, 11, 2)
    node("mul_mat", (5, 3), a, x)
    node("mul_mat_id", (5, 2, 3), experts, wide, chosen)
    node("get_rows", (7, 6), a, rows)
    node("set_rows", (7, 13), x, ids, call=(cells, x, ids))
    node("add", (7, 3), x, x)
    size = int(ggml.ggml_tensor_overhead())  # a little more than a tensor, and all of it in the context's memory
    if not all(entry[0] for entry in made.values()) or not 64 <= size <= 1 << 14:
        raise LayoutError("this ggml does not make the tensors it is asked for")
    return {name: _Sample(*entry, ctypes.string_at(entry[0], size)) for name, entry in made.items()}


def _only(field: str, step: int, samples: Sequence[_Sample], fits: Callable[[_Sample, int], bool]) -> int:
    """The one offset, a multiple of ``step``, that fits all samples."""
    places = [at for at in range(0, len(samples[0].content), step) if all(fits(sample, at) for sample in samples)]
    if len(places) != 1:
        raise LayoutError(f"the field {field!r} of a ggml tensor was found at {len(places)} places, expected one")
    return places[0]


def _is_op(ggml: Ggml, sample: _Sample, offset: int) -> bool:
    if offset + 4 > len(sample.content):
        return False
    number = _int32(sample.content, offset)
    return 0 <= number < _MOST_OPS and ggml.ggml_op_name(number) == ggml.ggml_op_desc(sample.pointer)


def _has_sources(sample: _Sample, offset: int) -> bool:
    wanted = sample.sources or (0, 0)
    return sample.holds(offset, struct.pack(f"={len(wanted)}Q", *wanted))


def _strides(ggml: Ggml, sample: _Sample) -> bytes:
    strides = [int(ggml.ggml_type_size(sample.type))]
    for length in sample.shape[:-1]:
        strides.append(strides[-1] * length)
    return struct.pack("=4Q", *strides)


def _data(ggml: Ggml, sample: _Sample) -> bytes:
    return struct.pack("=Q", ggml.ggml_get_data(sample.pointer) or 0)


def _name_offset(ggml: Ggml, samples: Sequence[_Sample]) -> int:
    offsets = {int(ggml.ggml_get_name(sample.pointer)) - sample.pointer for sample in samples}
    if len(offsets) != 1 or not 0 <= min(offsets) <= len(samples[0].content) - 64:
        raise LayoutError("the field 'name' of a ggml tensor was not found at one place")
    return offsets.pop()


def _int32(content: bytes, offset: int) -> int:
    (number,) = struct.unpack_from("=i", content, offset)
    return int(number)
