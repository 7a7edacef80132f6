"""The one place where text becomes tokens, so that no text can overflow the stack of the thread that asks.

llama.cpp splits text for many BPE vocabularies with ``std::regex``, whose match in libstdc++ calls itself for every
character: 30 000 letters in one word need more than the 8 MiB that a thread has. Here such text is split in a thread
of its own, with a stack that grows with the longest run that one match can take.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import groupby
from typing import Any, Final

import llama_cpp

from gguflora.errors import RequestError

_FRAME: Final = 512
"""Bytes of stack for each character of a run: no pre-tokenizer of llama-cpp-python 0.3.36 needs more than 320."""

_SPARE: Final = 1 << 20
_DIRECT: Final = 256
"""Longest run that is split in the calling thread: it needs 80 KiB, which every system's threads have."""

MAX_RUN: Final = 1 << 17
"""Longest run of characters that is accepted: splitting it touches 40 MB of stack."""

_MAX_SQUARES: Final = 1 << 23
"""Sum of the squared lengths of runs of digits for ``superbpe``: 2048 digits in a row take 0.1 s, 4096 0.5 s."""

_RUN: Final = re.compile(r"\S+|\s+")
_SPACES: Final = re.compile(r"\s\s")
_STACK_SIZE: Final = threading.Lock()  # threading.stack_size() holds for all threads that start


def tokenize(vocab: Any, text: str | bytes, *, add_bos: bool, special: bool, pre: str | None = None) -> list[int]:  # noqa: ANN401  (a ctypes pointer)
    """Split text into tokens with llama.cpp, on a stack that holds its deepest recursion.

    Args:
        vocab: the ``llama_vocab *``.
        text: the text; a lone surrogate counts as "?". Bytes must be UTF-8.
        add_bos: put the token for the beginning of a text in front, if the vocabulary has one.
        special: read the spelling of a control token as that token.
        pre: the model's ``tokenizer.ggml.pre``, see `pre_tokenizer`.

    Raises:
        RequestError: if llama.cpp cannot split this text: a run of more than `MAX_RUN` characters without a space, or
            spaces that abort it.
    """
    encoded = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
    if llama_cpp.llama_vocab_type(vocab) != llama_cpp.LLAMA_VOCAB_TYPE_BPE:
        return _tokens(vocab, encoded, add_bos, special)
    known = encoded.decode("utf-8", errors="replace")
    if pre == "whitespace" and _SPACES.search(known):  # GGML_ASSERT in llama_vocab::impl::find_bpe_rank
        raise RequestError("this model's pre-tokenizer ('whitespace') cannot split several spaces in a row; use one")
    if pre == "superbpe" and _squares_of_numbers(known) > _MAX_SQUARES:
        raise RequestError(
            "the text has too many digits in a row: this model's pre-tokenizer ('superbpe') needs time that grows with "
            "the square of their number; divide them with spaces"
        )
    longest = max((match.end() - match.start() for match in _RUN.finditer(known)), default=0)
    if longest > MAX_RUN:
        raise RequestError(
            f"the text has {longest} characters in a row with no change between space and other characters; llama.cpp "
            f"splits at most {MAX_RUN}; divide them with spaces or lines"
        )
    if longest <= _DIRECT:
        return _tokens(vocab, encoded, add_bos, special)
    return _on_stack(_SPARE + 2 * longest * _FRAME, lambda: _tokens(vocab, encoded, add_bos, special))


def _squares_of_numbers(text: str) -> int:
    return sum(sum(1 for _ in run) ** 2 for is_number, run in groupby(text, str.isnumeric) if is_number)


def pre_tokenizer(model: Any) -> str | None:  # noqa: ANN401  (a ctypes pointer)
    """Return ``tokenizer.ggml.pre`` of a ``llama_model *``; None if it has none."""
    return metadata_of(model, "tokenizer.ggml.pre")


def metadata_of(model: Any, key: str) -> str | None:  # noqa: ANN401  (a ctypes pointer)
    """Return a value of the metadata of a ``llama_model *`` as text, up to 127 bytes; None if there is none."""
    buffer = ctypes.create_string_buffer(128)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return None if size < 0 else buffer.value.decode("utf-8", errors="replace")


def _tokens(vocab: Any, encoded: bytes, add_bos: bool, special: bool) -> list[int]:  # noqa: ANN401
    size = len(encoded) + 2
    while True:
        tokens = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(vocab, encoded, len(encoded), tokens, size, add_bos, special)
        if count >= 0:
            return list(tokens[:count])
        size = -count


def _on_stack(size: int, function: Callable[[], list[int]]) -> list[int]:
    """Return what ``function`` returns in a thread with a stack of ``size`` bytes."""
    result: Future[list[int]] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised in the thread that asked
            result.set_exception(error)

    thread = threading.Thread(target=run, name="tokenize", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(-(-size // 65536) * 65536)
        try:
            thread.start()
        except RuntimeError as error:
            raise RequestError(f"no memory for the stack of {size} bytes that this text needs to be split") from error
        finally:
            threading.stack_size(before)
    return result.result()
