"""The chat templates in the directories of adapters: which of them the chat of a request gets."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

from gguflora.adapters.tokenizer import TEMPLATE_FILES, TOKENIZER_FILES
from gguflora.engine.requests import Sampling
from gguflora.errors import AdapterError, RequestError
from gguflora.runtime.chat_template import ChosenTemplate, choose_template, read_template

_LOG: Final = logging.getLogger(__name__)
_KEPT: Final = 1024
"""Adapters whose templates are kept."""

Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]
"""Size, time of change and inode of each file of a tokenizer: while it is equal, no file is read again."""


class AdapterTemplates:
    """Chooses the template of a chat by the adapters of its set. Thread-safe.

    Args:
        choice: ``adapter``: one template must be in the directories of a set; None: the template on which all adapters
            of a set agree, where one without a template means the base's. Anything else: always the engine's template.
        n_vocab: number of tokens of the model.
    """

    def __init__(self, choice: str | None, n_vocab: int) -> None:
        self._choice = choice
        self._n_vocab = n_vocab
        self._base = ""
        self._engines = ""
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Stamp, ChosenTemplate | None]] = {}
        self._told: set[str] = set()

    def choose_first(
        self, file: str | os.PathLike[str] | None, adapters: Sequence[Path], base: str, *, may_come: bool
    ) -> ChosenTemplate | None:
        """Return the engine's own template in place of the base's, or None.

        Args:
            file: file with a template.
            adapters: paths of the adapters that are loaded at the start.
            base: the base's template.
            may_come: whether other adapters can be loaded later, so that none needs to have a template now.

        Raises:
            EngineError, AdapterError: see `gguflora.runtime.chat_template.choose_template`.
        """
        chosen = None
        if file is not None or self._choice != "adapter" or not self._is_by_request(adapters, may_come=may_come):
            chosen = choose_template(self._choice, file, adapters, base)
        if file is not None:
            self._choice = "file"
        self._base, self._engines = base, base if chosen is None else chosen.text
        return chosen

    def _is_by_request(self, adapters: Sequence[Path], *, may_come: bool) -> bool:
        """Return whether the adapters have several templates, or none so far."""
        found = {template.text for path in adapters if (template := read_template(path)) is not None}
        return len(found) > 1 or (not found and may_come)

    def of(self, adapters: Mapping[str, Path]) -> ChosenTemplate | None:
        """Return the template for a set of adapters in place of the engine's; None for the engine's.

        Args:
            adapters: paths of the set's adapters by name.

        Raises:
            RequestError: if a template cannot be read, or ``adapter`` is asked for and the set has several.
        """
        if self._choice not in {None, "adapter"} or not adapters:
            return None
        found = {name: self._of_one(name, path) for name, path in adapters.items()}
        own = {name: each for name, each in found.items() if each is not None}
        chosen: ChosenTemplate | None
        if self._choice == "adapter":
            if len({each.text for each in own.values()}) > 1:
                raise RequestError(
                    f"the adapters {', '.join(sorted(own))} have different chat templates; name one of them, or start "
                    "with chat_template='base' or a chat_template_file"
                )
            chosen = next(iter(own.values()), None)
        else:
            texts = {each.text if each else self._base for each in found.values()}
            if len(texts) > 1:
                names = ", ".join(sorted(found))
                self._tell(names, f"the adapters {names} have different chat templates; the engine's is used")
                return None
            chosen = next(iter(own.values()), ChosenTemplate(self._base))
        if chosen is None or chosen.text == self._engines:
            return None
        if own:
            name = next(iter(own))
            self._tell(name, f"requests for {name} get its own chat template, which differs from the base's")
        return chosen

    def _tell(self, key: str, message: str) -> None:
        with self._lock:
            is_new = key not in self._told and len(self._told) < _KEPT
            self._told.add(key)
        if is_new:
            _LOG.warning("%s", message)

    def _of_one(self, name: str, path: Path) -> ChosenTemplate | None:
        stamp = _stamp(path)
        with self._lock:
            known = self._read.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            template = read_template(path)
        except AdapterError as error:
            raise RequestError(f"the chat template of the adapter {name!r} cannot be used: {error}") from error
        if template and template.end_token is not None and not 0 <= template.end_token < self._n_vocab:
            template = replace(template, end_token=None)  # a token that this base has not
        with self._lock:
            self._read.pop(path, None)
            self._read[path] = stamp, template
            while len(self._read) > _KEPT:
                del self._read[next(iter(self._read))]
        return template


def ended_by(sampling: Sampling, template: ChosenTemplate | None) -> Sampling:
    """Return sampling whose answers end at the token that ends an answer in a template."""
    end = None if template is None else template.end_token
    if end is None or sampling.ignore_eos or end in sampling.stop_token_ids:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, end))


def _stamp(path: Path) -> Stamp:
    return tuple(_stamp_of_file(path / name) for name in (*TOKENIZER_FILES, *TEMPLATE_FILES))


def _stamp_of_file(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
