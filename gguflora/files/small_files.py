"""Read a small file of a stranger whole: a FIFO would block the reader, and a sparse file would fill its memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from gguflora.system.descriptors import open_file

MAX_BYTES: Final = 128 << 20
"""Largest size of a file that is read whole; the largest tokenizer.json known has 35 MB."""

CONFIG_BYTES: Final = 8 << 20
"""Largest size of a configuration. As JSON it takes up to 30 times as much memory; those of PEFT seldom have 1 MB."""


def read_small(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of up to ``limit`` bytes.

    Raises:
        OSError: if it cannot be read, is no regular file, or is larger; the message says which.
    """
    handle = open_file(path)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        content = b"" if found.st_size > limit else file.read(limit + 1)
    if found.st_size > limit or len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than the {limit} bytes that such a file may have", str(path))
    return content


def read_small_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        OSError: as `read_small`.
        ValueError: if it is not UTF-8.
    """
    return read_small(path, limit).decode("utf-8")
