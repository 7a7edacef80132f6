"""The checksum of files."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from gguflora.system.descriptors import open_file

_LARGE: Final = 64 << 30
_HOLES: Final = 64
"""A large file of which less than the 64th part is stored is no model: hashing its holes would take hours."""


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file, or of several files as if they were concatenated.

    Raises:
        OSError: if one cannot be read, is no regular file (a device never ends, a FIFO may never begin), or is large
            and nearly all holes.
    """
    digest = hashlib.sha256()
    for path in paths:
        with os.fdopen(open_file(path), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            stored = getattr(status, "st_blocks", status.st_size) * 512
            if status.st_size > _LARGE and stored < status.st_size // _HOLES:
                raise OSError(errno.EFBIG, f"is nearly all holes: {stored:,} of {status.st_size:,} bytes", str(path))
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
