"""A directory for what several tests use."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def workspace() -> Path:
    """The directory of everything built in this process, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="gguflora-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
