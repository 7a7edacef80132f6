"""Split long and strange texts into tokens, by every pre-tokenizer of llama.cpp: ``python -m tools.fuzz tokens``.

Trials run in processes of their own; one that dies is a finding. Short texts must give the tokens that llama.cpp itself
gives on a stack that is large enough for all of them.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final

from support.vocabularies import PRE_TOKENIZERS, vocabulary

BATCH: Final = 20
"""Texts of one process."""
SECONDS: Final = 60.0
"""Time of one text; a busy machine is slow itself."""
_STACK: Final = 1 << 30
_COMPARED: Final = 30_000
_LONGEST: Final = 2 << 20
_UNITS: Final = (
    "a", "A", "1", " ", "\n", "\t", ".", "中", "é", "😀", "\u0300", "\u200b", "\u3000", "aB1-", "'s", "'", " a", "\r\n",
    "\u0627", "\u0e01", "</s>", "<s>", "_", "\0", "ß'LL", "  ", "\u017f", "\ud83d", "(x)", "0x",
)  # fmt: skip


def text_of(dice: random.Random) -> str:
    """Return a text of runs; one of ten is as long as a body may be."""
    longest = dice.choice([10, 100, 1000, _COMPARED, _COMPARED, _COMPARED, _COMPARED, _COMPARED, 200_000, _LONGEST])
    parts: list[str] = []
    while longest > 0:
        unit = dice.choice(_UNITS)
        count = max(dice.choice([1, 2, 300, longest, longest // 2]) // len(unit), 1)
        parts.append(unit * count)
        longest -= len(unit) * count
    return "".join(parts)


def fuzz(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Split texts for some time.

    Returns:
        The number of texts, and what was found.
    """
    trials, found, end, batch = 0, dict[str, None](), time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="gguflora-fuzz-") as folder:
        while time.monotonic() < end:
            pre = PRE_TOKENIZERS[(batch * 7 + seed) % len(PRE_TOKENIZERS)]
            done, what = _batch(Path(folder), pre, f"{seed}-{batch}", end)
            trials += done
            if what:
                found[f"{pre}, batch {seed}-{batch}, text {done}: {what}"] = None
            batch += 1
    return trials, list(found)


def _batch(folder: Path, pre: str, dice: str, end: float) -> tuple[int, str]:
    """Return how many texts a process has split, and what was wrong."""
    file, said = vocabulary(folder / "vocabulary.gguf", pre), folder / "said"
    said.write_text("0\n")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _trials(file, dice, said, end)
            status = 0
        except BaseException:
            said.write_text(f"{said.read_text().splitlines()[0]}\n{traceback.format_exc()[-1500:]}")
        finally:
            os._exit(status)
    last, changed = "", time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if (now := said.read_text()) != last:
            last, changed = now, time.monotonic()
        if time.monotonic() > changed + SECONDS:
            os.kill(child, 9)
        time.sleep(0.02)
    count, _, what = said.read_text().partition("\n")
    return int(count or 0), what.strip() or (f"the process ended with status {ended[1]}" if ended[1] else "")


def _trials(file: Path, dice: str, said: Path, end: float) -> None:
    """Split texts, in the child."""
    import llama_cpp  # noqa: PLC0415

    from gguflora.errors import RequestError  # noqa: PLC0415
    from gguflora.runtime.llama_internals import silence  # noqa: PLC0415
    from gguflora.runtime.tokenizing import pre_tokenizer, tokenize  # noqa: PLC0415

    silence(verbose=False)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), parameters)
    vocab, pre = llama_cpp.llama_model_get_vocab(model), pre_tokenizer(model)
    for number in range(BATCH):
        text = text_of(random.Random(f"{dice}-{number}"))
        said.write_text(f"{number + 1}\n")
        try:
            tokens = tokenize(vocab, text, add_bos=False, special=True, pre=pre)
        except RequestError:
            tokens = None
        # "superbpe" needs half a minute for many digits, and "whitespace" aborts; both are refused above
        if tokens is not None and len(text) <= _COMPARED:
            assert tokens == _on_big_stack(vocab, text), f"other tokens for {text[:60]!r} ({len(text)} characters)"
        if time.monotonic() > end:
            return


def _on_big_stack(vocab: Any, text: str) -> list[int]:  # noqa: ANN401  (a ctypes pointer)
    """Return llama.cpp's own tokens."""
    from gguflora.runtime.tokenizing import _tokens  # noqa: PLC0415

    found: list[list[int]] = []
    encoded = text.encode("utf-8", errors="replace")
    before = threading.stack_size(_STACK)
    try:
        thread = threading.Thread(target=lambda: found.append(_tokens(vocab, encoded, False, True)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    return found[0]
