"""Hide what not all systems have, in every Python that starts with this folder in PYTHONPATH.

It resembles Windows: no ``fcntl`` but an ``msvcrt`` with locks, no files without names, nothing at an offset. What the
tests and their libraries themselves need (``fork`` and what goes with it, ``getuid``, FIFOs) stays; the modules,
``O_NONBLOCK`` and ``fchmod`` are hidden from gguflora only, because torch and filelock need them.
"""

import builtins
import os
import types

MODULES = ("fcntl", "resource")
CALLS = (
    *("O_BINARY", "O_CLOEXEC", "O_DIRECTORY", "O_DSYNC", "O_NOFOLLOW", "O_PATH", "O_TMPFILE"),
    *("copy_file_range", "memfd_create", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite"),
    *("pwritev", "sched_getaffinity"),
)
OUR_CALLS = ("O_NONBLOCK", "fchmod")


class _Os(types.ModuleType):
    """The module ``os`` as gguflora sees it."""

    def __getattr__(self, name: str) -> object:
        if name in OUR_CALLS:
            raise AttributeError(f"module 'os' has no attribute {name!r}")
        return getattr(os, name)


def _windows_locks() -> types.ModuleType:
    import fcntl

    module = types.ModuleType("msvcrt")
    module.LK_NBLCK = 2

    def locking(handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (module.LK_NBLCK, 1)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    module.locking = locking
    return module


def _hide() -> None:
    import shutil  # noqa: F401  (asks for what there is when it is imported)
    import subprocess  # noqa: F401
    import tempfile

    tempfile._O_TMPFILE_WORKS = False

    real, locks, our_os = builtins.__import__, _windows_locks(), _Os("os")

    def import_module(name: str, *more: object, **options: object) -> object:
        names = more[0] if more else options.get("globals")
        if (names or {}).get("__name__", "").startswith("gguflora"):
            if name in MODULES:
                raise ImportError(name)
            if name == "msvcrt":
                return locks
            if name == "os" and not (more[2:3] or (options.get("fromlist"),))[0]:
                return our_os
        return real(name, *more, **options)

    builtins.__import__ = import_module
    for name in CALLS:
        if hasattr(os, name):
            delattr(os, name)


_hide()
