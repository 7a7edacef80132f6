"""The checksum of files."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from gguflora.system.descriptors import open_file


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file, or of several files as if they were concatenated.

    Raises:
        OSError: if one cannot be read, or is no regular file: a device never ends, a FIFO may never begin.
    """
    digest = hashlib.sha256()
    for path in paths:
        with os.fdopen(open_file(path), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
