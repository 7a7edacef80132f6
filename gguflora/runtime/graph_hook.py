"""The one owner of llama.cpp's ``cb_eval``: a hook into the graph of a context, in C (``csrc/llama_hook.c``).

llama.cpp calls the hook for every node of its graph; it never takes the GIL. It notes the LoRA factors that a graph
has, multiplies the rank rows of every token by weights of that token, keeps numbers that are not finite out of the
KV cache, and sums over the inputs of weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.errors import HotSwapError
from gguflora.quants._lib import ffi, lib
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.input_watch import InputWatch
from gguflora.runtime.llama_internals import ggml_library
from gguflora.runtime.tensor_layout import Ggml, LayoutError, TensorLayout, find_layout

_FAULTS: Final = {
    lib.GFL_HOOK_TOKENS: "the graph's tokens are not those of the batch in its order",
    lib.GFL_HOOK_COLUMNS: "its columns are neither all tokens nor those with outputs",
    lib.GFL_HOOK_SHAPE: "its product has another shape than expected",
    lib.GFL_HOOK_FACTOR: "it is not of the stack",
    lib.GFL_HOOK_MEMORY: "there is no memory",
    lib.GFL_HOOK_INPUT: "its inputs are other tensors than in the batch before",
    lib.GFL_HOOK_INFINITE: "its input is NaN or infinite",
}

_DEVICES: Final = (1, 2)  # enum ggml_backend_dev_type: GPU, IGPU


class GraphFaultError(HotSwapError):
    """A batch was not computed as asked; its results mean nothing."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of a LoRA as llama.cpp holds it.

    Attributes:
        name: name of its tensor, such as ``blk.0.attn_q.weight.lora_a``.
        tensor: address of the ``ggml_tensor``.
        data: address of the numbers.
        type: ggml's number.
        ne: numbers along each of the four axes.
        nb: bytes from one to the next along each.
    """

    name: str
    tensor: int
    data: int
    type: int
    ne: tuple[int, ...]
    nb: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HookReport:
    """What a batch came to: nodes masked, rows of KV cells cleaned, ubatches stopped before the output matrix.

    ``diverged`` says by token whether it was not finite.
    """

    n_ubatches: int
    n_masked: int
    n_cleaned: int
    n_stopped: int
    diverged: NDArray[np.bool_]


@cache
def proven_layout() -> TensorLayout:
    """The layout of a tensor in the ggml that llama_cpp has loaded, proven once.

    Raises:
        LayoutError: if it cannot be proven.
    """
    ggml = Ggml(ggml_library())
    layout = find_layout(ggml)
    _prove_in_c(ggml, layout)
    return layout


def unavailable() -> str | None:
    """Why there can be no hook here; None if there can."""
    try:
        proven_layout()
        library = ggml_library()
        get, kind = library.ggml_backend_dev_get, library.ggml_backend_dev_type
        get.restype, get.argtypes, kind.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        library.ggml_backend_dev_count.restype = ctypes.c_size_t
        kinds = [kind(get(number)) for number in range(library.ggml_backend_dev_count())]
    except (HotSwapError, AttributeError) as error:
        return str(error)
    if any(number in _DEVICES for number in kinds):
        return "llama.cpp computes on a device, whose memory the hook cannot read"
    return None


def _prove_in_c(ggml: Ggml, layout: TensorLayout) -> None:
    """Let the hook read a node made for it."""
    hook = GraphHook(layout)
    with ggml.memory() as context:
        a = ggml.ggml_new_tensor(context, layout.f16, 2, (ctypes.c_int64 * 2)(7, 5))
        ggml.ggml_set_name(a, b"proof.lora_a")
        x = ggml.ggml_new_tensor(context, layout.f32, 2, (ctypes.c_int64 * 2)(7, 3))
        node = ggml.ggml_mul_mat(context, a, x)
        hook.begin_finding()
        lib.gfl_hook_eval(ffi.cast("void *", node), True, hook.pointer)
        hook.end()
        wanted = Factor("proof.lora_a", a, ggml.ggml_get_data(a), layout.f16, (7, 5, 1, 1), (2, 14, 70, 70))
        if hook.found() != [wanted]:
            raise LayoutError("the hook into llama.cpp's graph misreads a tensor that was made for it")
    hook.free()


class GraphHook:
    """A hook for one context at a time, in which nothing else may run meanwhile.

    Attributes:
        pointer: the ``gfl_hook *``.
    """

    def __init__(self, layout: TensorLayout) -> None:
        self.pointer: Any = lib.gfl_hook_new(ffi.new("gfl_tensor_layout *", asdict(layout)))
        if not self.pointer:
            raise MemoryError
        self._n_tokens = 0

    def free(self) -> None:
        """Free it; its context must be gone. Idempotent."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            lib.gfl_hook_free(pointer)

    def attach(self, parameters: Any) -> None:  # noqa: ANN401  (llama_cpp has no types)
        """Let a context made of these ``llama_context_params`` call the hook."""
        kind = dict(llama_cpp.llama_context_params._fields_)["cb_eval"]
        parameters.cb_eval = kind(_address(lib, "gfl_hook_eval"))
        parameters.cb_eval_user_data = int(ffi.cast("uintptr_t", self.pointer))

    def attach_abort(self, parameters: Any) -> None:  # noqa: ANN401
        """Let a context made of these compute nothing while factors are looked for: being asked is enough."""
        kind = dict(llama_cpp.llama_context_params._fields_)["abort_callback"]
        parameters.abort_callback = kind(_address(lib, "gfl_hook_aborts"))
        parameters.abort_callback_data = int(ffi.cast("uintptr_t", self.pointer))

    def set_stack(self, tensors: Sequence[int], width: int, factors: Float32Array) -> None:
        """Mask products of these factors A (``ggml_tensor`` addresses) from the next batch on.

        Args:
            tensors: addresses of the factors.
            width: rank rows of a bay.
            factors: (n_tensors, n_bays), by which a token's weight of a bay is multiplied in each of them.
        """
        factors = np.ascontiguousarray(factors, np.float32)
        count, n_bays = factors.shape
        addresses = ffi.new("uintptr_t[]", list(tensors))
        if not lib.gfl_hook_set_stack(self.pointer, count, addresses, n_bays, width, _at(factors, "float *")):
            raise MemoryError

    def begin_finding(self) -> None:
        """Note the factors of the graph of the next batch, of one token."""
        lib.gfl_hook_clear_found(self.pointer)
        self._begin(lib.GFL_HOOK_FIND, None, np.ones(1, np.int8), None)

    def begin(
        self,
        tokens: NDArray[np.int32] | None,
        outputs: NDArray[np.int8],
        weights: Float32Array | None,
    ) -> None:
        """Announce the next batch.

        Args:
            tokens: tokens of the batch, in its order; None for embeddings.
            outputs: whose logits are wanted.
            weights: (n_tokens, n_bays); None if the stack is not in force.
        """
        mode = lib.GFL_HOOK_CLEAN | (0 if weights is None else lib.GFL_HOOK_MASK)
        self._begin(mode, tokens, outputs, weights)

    def watch(self, watched: InputWatch, isa: int) -> None:
        """Sum over the inputs of these weights in batches that `begin_watching` announces.

        After the first, batches end before the output matrix and have no logits, unless its inputs are watched.
        """
        if not lib.gfl_hook_watch(self.pointer, isa, watched.pointer, len(watched)):
            raise HotSwapError(f"this machine lacks instruction set {isa}")

    def begin_watching(self, tokens: NDArray[np.int32]) -> None:
        """Announce the next batch, whose inputs are watched and whose tokens all have outputs."""
        self._begin(lib.GFL_HOOK_WATCH, tokens, np.ones(len(tokens), np.int8), None)

    def _begin(
        self,
        mode: int,
        tokens: NDArray[np.int32] | None,
        outputs: NDArray[np.int8],
        weights: Float32Array | None,
    ) -> None:
        self._n_tokens = len(outputs)
        arrays = (_at(tokens, "int32_t *"), _at(outputs, "int8_t *"), _at(weights, "float *"))
        if not lib.gfl_hook_begin(self.pointer, mode, self._n_tokens, *arrays):
            raise MemoryError

    def end(self) -> HookReport:
        """The batch is over.

        Raises:
            GraphFaultError: if it was not computed as asked.
        """
        diverged = np.zeros(self._n_tokens, np.uint8)
        report = lib.gfl_hook_end(self.pointer, _at(diverged, "uint8_t *"))
        if report.fault:
            node = ffi.string(report.node).decode(errors="replace")
            raise GraphFaultError(f"llama.cpp's graph is not as expected at {node!r}: {_FAULTS[report.fault]}")
        counts = report.n_ubatches, report.n_masked, report.n_cleaned, report.n_stopped
        return HookReport(*counts, diverged.astype(np.bool_))

    def found(self) -> list[Factor]:
        """The factors noted since `begin_finding`, in the graph's order."""
        return [self._found(index) for index in range(lib.gfl_hook_n_found(self.pointer))]

    def _found(self, index: int) -> Factor:
        factor = lib.gfl_hook_found(self.pointer, index)
        name = ffi.string(factor.name).decode(errors="replace")
        tensor, data = (int(ffi.cast("uintptr_t", pointer)) for pointer in (factor.tensor, factor.data))
        return Factor(name, tensor, data, factor.type, tuple(factor.ne), tuple(factor.nb))


def copy_strided(
    target: int, target_stride: int, source: int | None, source_stride: int, count: int, size: int
) -> None:
    """Copy ``count`` rows of ``size`` bytes between addresses; zeros if there is no source."""
    pointers = (ffi.cast("uint8_t *", target), ffi.NULL if source is None else ffi.cast("uint8_t *", source))
    lib.gfl_copy_strided(pointers[0], target_stride, pointers[1], source_stride, count, size)


def all_finite(address: int, count: int, size: int) -> bool:
    """Whether ``count`` floats of ``size`` bytes (2 or 4) are finite."""
    return bool(lib.gfl_all_finite(ffi.cast("uint8_t *", address), count, size))


def _at(array: NDArray[Any] | None, kind: str) -> Any:  # noqa: ANN401  (cffi has no types)
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


def _address(library: Any, name: str) -> int:  # noqa: ANN401
    return int(ffi.cast("uintptr_t", ffi.addressof(library, name)))
