"""What some systems lack is named in the package `system` only, and the tests pass without all of it."""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import gguflora
from support import ROOT

PACKAGE = Path(gguflora.__file__).parent
CALLS = {
    *("O_BINARY", "O_CLOEXEC", "O_DIRECTORY", "O_DIRECT", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "O_TMPFILE"),
    *("chown", "copy_file_range", "fchmod", "fchown", "fdatasync", "fork", "forkpty", "fsync", "getegid", "geteuid"),
    *("getgid", "getgroups", "getloadavg", "getpgid", "getuid", "getxattr", "initgroups", "kill", "killpg", "lchmod"),
    *("link", "lockf", "memfd_create", "mkfifo", "mknod", "nice", "pidfd_open", "pipe2", "posix_fadvise", "uname"),
    *(
        "posix_fallocate",
        "posix_spawn",
        "pread",
        "preadv",
        "pwrite",
        "pwritev",
        "register_at_fork",
        "sched_getaffinity",
    ),
    *(
        "sched_setaffinity",
        "sendfile",
        "setsid",
        "setuid",
        "setxattr",
        "splice",
        "statvfs",
        "symlink",
        "sync",
        "sysconf",
    ),
}
"""Names in ``os`` that are not on all systems, or do something else there."""
METHODS = {"hardlink_to", "setitimer", "symlink_to", "madvise", "MADV_DONTNEED", "poll", "add_signal_handler"}
KEYWORDS = {"dir_fd", "src_dir_fd", "dst_dir_fd", "preexec_fn", "pass_fds", "start_new_session"}
MODULES = {"fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "select", "selectors", "termios", "tty", "winreg"}
SHORT = ("tests/files/test_atomic.py", "tests/merging/test_patch.py", "tests/merging/test_in_place.py")
LONG = (
    "tests/files",
    "tests/merging",
    "tests/pipeline",
    "tests/lora/test_convert.py",
    "tests/runtime/test_templates.py",
)
LEFT_OUT = ("tests/pipeline/test_dask.py",)  # distributed itself needs `resource`


def named(source):
    """What a module names of these, with the line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name("os"), name) if name in CALLS:
                yield node.lineno, name
            case ast.Attribute(_, name) if name in METHODS:
                yield node.lineno, name
            case ast.keyword(arg=name) if name in KEYWORDS:
                yield node.lineno, name
            case ast.Import(aliases):
                yield from ((node.lineno, alias.name) for alias in aliases if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(name, aliases) if name:
                found = {alias.name for alias in aliases} & CALLS if name == "os" else {name} & MODULES
                yield from ((node.lineno, each) for each in found)
            case ast.Constant(str() as text) if text.startswith("/proc"):
                yield node.lineno, text
            case ast.Call(ast.Name("hasattr" | "getattr"), [ast.Name("os"), ast.Constant(name), *_]) if name in CALLS:
                yield node.lineno, name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import os\nos.pread(1, 2, 3)", "pread"),
        ("def f():\n    import fcntl", "fcntl"),
        ("from os import O_TMPFILE", "O_TMPFILE"),
        ("from resource import getrlimit", "resource"),
        ("Path('/proc/self/fd')", "/proc/self/fd"),
        ("Path('x').symlink_to('y')", "symlink_to"),
        ("os.open('x', 0, dir_fd=3)", "dir_fd"),
        ("getattr(os, 'O_BINARY', 0)", "O_BINARY"),
    ],
)
def test_the_rule_can_fail(source, name):
    assert [found for _, found in named(source)] == [name]


def test_only_the_room_of_the_system_names_them():
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "system"
        for line, name in named(path.read_text(encoding="utf-8"))
    }
    assert found == set()


LEAVES_NOTHING = "not stopped_anywhere and not test_interrupted"
"""Left out: after kill -9 nothing at all is left only where an output has no name before it is whole."""


def run_hidden(*arguments):
    environment = os.environ | {"GGUFLORA_TEST_HIDE": "1"}
    with tempfile.TemporaryDirectory(prefix="g") as folder:  # a short path, since paths of sockets must be short
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={folder}/h"]
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_they_are_hidden():
    code = "import runpy, os\nrunpy.run_path('tests/support/hidden/sitecustomize.py')\n"
    code += "assert not hasattr(os, 'pread') and not hasattr(os, 'O_TMPFILE')\n"
    code += "import gguflora.system.storage as s, gguflora.system.locks as l\n"
    code += "assert s.fcntl is None and l.fcntl is None and l.msvcrt is not None\n"
    code += "import gguflora.system.descriptors as d\n"
    code += "assert not hasattr(d.os, 'O_NONBLOCK') and not hasattr(s.os, 'fchmod')\n"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_outputs_patches_and_merges_in_place_without_them():
    said = run_hidden(*SHORT, "-m", "not slow and not full", "-k", LEAVES_NOTHING)
    assert int(said.split(" passed")[0].split()[-1]) > 50


@pytest.mark.full
def test_all_outputs_without_them():
    left_out = (f"--ignore={path}" for path in LEFT_OUT)
    said = run_hidden(*LONG, *left_out, "-m", "not full", "-k", LEAVES_NOTHING)
    assert int(said.split(" passed")[0].split()[-1]) > 500
