"""What gguflora leans on inside llama-cpp-python and llama.cpp, beyond their public interfaces: all of it, here.

Known to work: llama-cpp-python 0.3.36. Versions are never compared; `check_internals` looks whether what is needed is
there, and says what is missing. It is needed because a ``Llama`` knows nothing of adapters that come and go:

* ``Llama._ctx`` and ``Llama._model``, the wrappers of context and model, say whether they are open, and the wrapper of
  the context is where a soft prompt shifts positions;
* ``Llama._stack`` frees in reverse order what was opened, adapters before the model;
* ``Llama._lora_adapter`` is the adapter of ``Llama(lora_path=...)``;
* ``Llama._n_ctx`` is the room that ``Llama`` believes to have, and ``Llama._requires_eval`` whether its logits are old;
* ``Llama._create_completion`` is what all completions go through, and ``reset`` an argument of ``Llama.generate``;
* llama.cpp tells the size of a KV cache only in its log.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from inspect import signature
from typing import Any, Final

import llama_cpp

from gguflora.errors import HotSwapError

LlamaContext: Final[type] = getattr(getattr(llama_cpp, "internals", None), "LlamaContext", object)
"""llama-cpp-python's wrapper of a ``llama_context``."""

_ATTRIBUTES: Final = ("_ctx", "_model", "_stack", "_lora_adapter", "_n_ctx", "_requires_eval")
_METHODS: Final = ("_create_completion", "generate", "eval", "reset", "save_state", "load_state")
_CONTEXT: Final = ("ctx", "decode", "kv_cache_seq_rm")
_KV_BYTES: Final = re.compile(r"size = +([\d.]+) MiB \( *\d+ cells")
"""How llama.cpp's log tells the bytes of a KV cache or recurrent state when a context is made."""


class Guarded:
    """Marks the classes of ours that hand ``generate`` on."""


def check_internals(llm: Any) -> None:  # noqa: ANN401  (llama_cpp has no types)
    """Raise unless this ``Llama`` has everything that this module names.

    Raises:
        HotSwapError: naming what is missing.
    """
    kind = type(llm)
    missing = [f"Llama.{name}" for name in _ATTRIBUTES if not hasattr(llm, name)]
    missing += [f"Llama.{name}" for name in _METHODS if not callable(getattr(kind, name, None))]
    if not missing:
        missing += [f"LlamaContext.{name}" for name in _CONTEXT if not hasattr(llm._ctx, name)]
        missing += [] if hasattr(llm._model, "model") else ["LlamaModel.model"]
        missing += [] if hasattr(llm._stack, "callback") else ["Llama._stack.callback"]
        given: Any = next(each for each in kind.__mro__ if "generate" in vars(each) and not issubclass(each, Guarded))
        missing += [] if "reset" in signature(given.generate).parameters else ["Llama.generate(reset=)"]
    if missing:
        raise HotSwapError(
            f"llama-cpp-python {version('llama-cpp-python')} lacks {', '.join(missing)}, which hot-swapping needs; "
            "0.3.36 is known to work: pip install 'llama-cpp-python==0.3.36'"
        )


def is_open(llm: Any) -> bool:  # noqa: ANN401
    """Whether a ``Llama`` has not been closed."""
    return llm._ctx.ctx is not None


def wrappers_of(llm: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """The wrappers of its context and its model; their ``ctx`` and ``model`` are None once freed."""
    return llm._ctx, llm._model


def own_adapter(llm: Any) -> Any:  # noqa: ANN401
    """The ``llama_adapter_lora *`` of ``Llama(lora_path=...)``, which the Llama frees itself; None without one."""
    return llm._lora_adapter or None


def call_on_close(llm: Any, release: Callable[[], None]) -> None:  # noqa: ANN401
    """Call ``release`` when the Llama is closed, before its context and model are freed."""
    llm._stack.callback(release)  # last in, first out


def set_room(llm: Any, n_tokens: int) -> None:  # noqa: ANN401
    """Let a ``Llama`` believe that its context has room for so many tokens."""
    llm._n_ctx = n_tokens


def go_back(llm: Any, n_tokens: int) -> None:  # noqa: ANN401
    """Let a ``Llama`` keep only the first tokens of those evaluated; the logits it has are old then."""
    llm.n_tokens, llm._requires_eval = n_tokens, True


def reset_asked(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The argument ``reset`` of a call ``generate(tokens, *args, **kwargs)``."""
    place = list(signature(kind.generate).parameters).index("reset") - 2  # type: ignore[attr-defined]  # self, tokens
    return bool(kwargs.get("reset", args[place] if len(args) > place else True))


def silence(*, verbose: bool) -> None:
    """Let llama-cpp-python print llama.cpp's log only if ``verbose``."""
    logger = getattr(llama_cpp, "_logger", None)
    if logger is not None and hasattr(logger, "set_verbose"):
        logger.set_verbose(verbose)


def kv_bytes_of(log: str) -> int | None:
    """Bytes of the KV cache and recurrent states of a context, from what llama.cpp logged when it was made.

    None where the log does not say: the context keeps nothing, or a later llama.cpp says it in other words.
    """
    sizes = [round(float(size) * 2**20) for size in _KV_BYTES.findall(log)]
    return sum(sizes) if sizes else None
