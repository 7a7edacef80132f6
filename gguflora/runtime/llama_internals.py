"""Everything that gguflora uses of llama-cpp-python and llama.cpp beyond their public interfaces.

Known to work: llama-cpp-python 0.3.36. No version numbers are compared: `check_internals` checks that everything is
present and names what is missing. The public interface does not suffice because a ``Llama`` does not expect its
adapters to change:

* ``Llama._ctx`` and ``Llama._model`` wrap the context and the model. They tell whether the Llama is open, and the
  context's wrapper is where a soft prompt shifts positions.
* ``Llama._stack`` frees resources in reverse order, so that adapters are freed before the model.
* ``Llama._lora_adapter`` is the adapter of ``Llama(lora_path=...)``.
* ``Llama._n_ctx`` is the number of tokens that ``Llama`` allows, and ``Llama.input_ids`` notes them. If
  ``Llama._logits_all``, there is a row of logits for each. ``Llama._requires_eval`` marks the logits as outdated.
* All completions call ``Llama._create_completion``, and ``reset`` is a parameter of ``Llama.generate``.
* llama.cpp reports the size of a KV cache only in its log.
* ``llama_cpp._ggml.libggml`` is the ggml library that llama-cpp-python has loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any, Final

import llama_cpp
import numpy as np

from gguflora.errors import HotSwapError

LlamaContext: Final[type] = getattr(getattr(llama_cpp, "internals", None), "LlamaContext", object)
"""llama-cpp-python's wrapper of a ``llama_context``."""

_ATTRIBUTES: Final = ("_ctx", "_model", "_stack", "_lora_adapter", "_n_ctx", "_requires_eval")
_METHODS: Final = ("_create_completion", "generate", "eval", "reset", "save_state", "load_state")
_CONTEXT: Final = ("ctx", "decode", "kv_cache_seq_rm")
_KV_BYTES: Final = re.compile(r"size = +([\d.]+) MiB \( *\d+ cells")
"""The log line with the size of a KV cache or recurrent state, written when a context is made."""


class Guarded:
    """Base of gguflora's own subclasses of Llama, whose ``generate`` passes its arguments on."""


def check_internals(llm: Any) -> None:  # noqa: ANN401  (llama_cpp has no types)
    """Check that a ``Llama`` has everything that this module uses.

    Raises:
        HotSwapError: if something is missing; the message names it.
    """
    kind = type(llm)
    missing = [f"Llama.{name}" for name in _ATTRIBUTES if not hasattr(llm, name)]
    missing += [f"Llama.{name}" for name in _METHODS if not callable(getattr(kind, name, None))]
    if not missing:
        missing += [f"LlamaContext.{name}" for name in _CONTEXT if not hasattr(llm._ctx, name)]
        missing += [] if hasattr(llm._model, "model") else ["LlamaModel.model"]
        missing += [] if hasattr(llm._stack, "callback") else ["Llama._stack.callback"]
        owner: Any = next(each for each in kind.__mro__ if "generate" in vars(each) and not issubclass(each, Guarded))
        missing += [] if "reset" in signature(owner.generate).parameters else ["Llama.generate(reset=)"]
    if missing:
        raise HotSwapError(
            f"llama-cpp-python {_installed()} lacks {', '.join(missing)}, which hot-swapping needs; "
            "0.3.36 is known to work: pip install 'llama-cpp-python==0.3.36'"
        )


def _installed() -> str:
    """Return the version of what is imported as llama_cpp; a fork may have another name on the package index."""
    with suppress(PackageNotFoundError):
        return version("llama-cpp-python")
    return str(getattr(llama_cpp, "__version__", "of unknown version"))


def is_open(llm: Any) -> bool:  # noqa: ANN401
    """Return whether a ``Llama`` is still open."""
    return llm._ctx.ctx is not None


def wrappers_of(llm: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Return the wrappers of a Llama's context and model; their ``ctx`` and ``model`` are None once freed."""
    return llm._ctx, llm._model


def own_adapter(llm: Any) -> Any:  # noqa: ANN401
    """Return the ``llama_adapter_lora *`` of ``Llama(lora_path=...)``, which the Llama frees itself, or None."""
    return llm._lora_adapter or None


def call_on_close(llm: Any, release: Callable[[], None]) -> None:  # noqa: ANN401
    """Call ``release`` when the Llama is closed, before its context and model are freed."""
    llm._stack.callback(release)  # last in, first out


def set_room(llm: Any, n_ctx: int, n_virtual: int) -> None:  # noqa: ANN401
    """Set the number of tokens that a ``Llama`` believes its context can hold beside ``n_virtual`` of a soft prompt."""
    llm._n_ctx = min(n_ctx - n_virtual, len(llm.input_ids))


def fit_inputs(llm: Any) -> None:  # noqa: ANN401
    """Let a ``Llama`` note as many tokens as its context holds.

    llama.cpp rounds the size of a context up to a multiple of 256, and ``Llama.input_ids`` has the size that was asked
    for. With ``logits_all`` there are no rows for the logits of more tokens, and the Llama ends at the asked size.
    """
    missing = llm.n_ctx() - len(llm.input_ids)
    if missing > 0 and not llm._logits_all:
        llm.input_ids = np.pad(llm.input_ids, (0, missing))
    set_room(llm, llm.n_ctx(), 0)


def rewind(llm: Any, n_tokens: int) -> None:  # noqa: ANN401
    """Make a ``Llama`` keep only the first ``n_tokens`` evaluated tokens and mark its logits as outdated."""
    llm.n_tokens, llm._requires_eval = n_tokens, True


def reset_asked(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return the value of ``reset`` in the call ``generate(tokens, *args, **kwargs)``."""
    index = list(signature(kind.generate).parameters).index("reset") - 2  # type: ignore[attr-defined]  # self, tokens
    return bool(kwargs.get("reset", args[index] if len(args) > index else True))


def silence(*, verbose: bool) -> None:
    """Make llama-cpp-python print llama.cpp's log only if ``verbose``."""
    logger = getattr(llama_cpp, "_logger", None)
    if logger is not None and hasattr(logger, "set_verbose"):
        logger.set_verbose(verbose)


def kv_bytes_of(log: str) -> int | None:
    """Return the bytes of a context's KV cache and recurrent states, from the log that llama.cpp wrote when it made it.

    None if the log does not tell: the context has no cache, or this llama.cpp uses another wording.
    """
    sizes = [round(float(size) * 2**20) for size in _KV_BYTES.findall(log)]
    return sum(sizes) if sizes else None


def has_gpu() -> bool:
    """Return whether this llama.cpp was built to compute on a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def ggml_library() -> Any:  # noqa: ANN401
    """The ggml library that llama_cpp has loaded, a ``ctypes.CDLL``.

    Raises:
        HotSwapError: if llama-cpp-python does not give it.
    """
    try:
        return import_module("llama_cpp._ggml").libggml
    except (ImportError, AttributeError):
        raise HotSwapError(f"llama-cpp-python {_installed()} does not give its ggml library") from None
