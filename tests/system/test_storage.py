"""Files, locks and names on systems and file systems that refuse some calls: fakes of their refusals, one at a time."""

import errno
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from gguflora.errors import OutputError
from gguflora.files.atomic import atomic_folder, atomic_output, atomic_outputs
from gguflora.files.output_checks import check_target
from gguflora.files.remote import cache
from gguflora.system import descriptors, locks, nameless, processes, storage
from gguflora.system.pipes import PipeReader

CONTENT = bytes(range(256)) * 64


def refuse(number):
    def call(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return call


def hide(monkeypatch, *names):
    for name in names:
        monkeypatch.delattr(os, name, raising=False)


@pytest.fixture(params=["all", "no preadv", "no pread"])
def offsets(request, monkeypatch):
    """Systems with all calls that take an offset, with some, and with none."""
    names = {"all": (), "no preadv": ("preadv",), "no pread": ("preadv", "pread", "pwrite")}
    hide(monkeypatch, *names[request.param])


@pytest.mark.usefixtures("offsets")
def test_at_an_offset(tmp_path):
    handle = descriptors.open_file(tmp_path / "file", write=True, new=True)
    os.write(handle, b"abc")
    descriptors.write_at(handle, CONTENT, 1000)
    assert descriptors.read_at(handle, 1 << 20, 1000) == CONTENT
    assert descriptors.read_at(handle, 5, 998) == b"\0\0" + CONTENT[:3]
    assert descriptors.read_at(handle, 5, 1 << 20) == b""
    assert os.lseek(handle, 0, os.SEEK_CUR) == 3, "the position stays"
    os.close(handle)


@pytest.mark.usefixtures("offsets")
def test_threads_at_their_offsets(tmp_path):
    handle, size = descriptors.open_file(tmp_path / "file", write=True, new=True), 1 << 12

    def work(number):
        for turn in range(50):
            offset = (turn * 8 + number) * size
            descriptors.write_at(handle, bytes([number]) * size, offset)
            assert descriptors.read_at(handle, size, offset) == bytes([number]) * size

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(bytes([index % 8]) * size for index in range(400))
    os.close(handle)


@pytest.mark.parametrize("lacks", [(), ("O_NOFOLLOW",)])
def test_links_are_not_followed(tmp_path, lacks, monkeypatch):
    hide(monkeypatch, *lacks)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for options in ({}, {"write": True, "create": True}):
        with pytest.raises(OSError, match="symbolic links"):
            descriptors.open_file(tmp_path / "link", follow=False, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lacks", [(), ("O_NONBLOCK",)])
def test_a_fifo_does_not_block(tmp_path, lacks, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    hide(monkeypatch, *lacks)
    try:
        os.close(descriptors.open_file(tmp_path / "fifo"))
    except OSError as error:
        assert error.errno == errno.ENXIO


def test_windows_opens_files_as_bytes(tmp_path, monkeypatch):
    seen, real = [], os.open
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    monkeypatch.setattr(
        os, "open", lambda path, flags, mode=0: seen.append(flags) or real(path, flags & ~(1 << 30), mode)
    )
    os.close(descriptors.open_file(tmp_path / "x", write=True, new=True))
    assert seen[0] & 1 << 30


# -- copying and reserving --


@pytest.mark.parametrize("number", [None, 0, errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
def test_copies_through_memory(number, tmp_path, monkeypatch):
    """The kernel's copy is missing, copies nothing, or refuses a pair of file systems."""
    if number is None:
        hide(monkeypatch, "copy_file_range")
    else:
        call = refuse(number) if number else lambda *_: 0
        monkeypatch.setattr(os, "copy_file_range", call, raising=False)
    (tmp_path / "source").write_bytes(CONTENT)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("w+b") as target:
        storage.copy_range(source.fileno(), 100, target.fileno(), 7, 5000)
        with pytest.raises(EOFError):
            storage.copy_range(source.fileno(), len(CONTENT) - 1, target.fileno(), 0, 2)
    assert (tmp_path / "target").read_bytes()[7:5007] == CONTENT[100:5100]


def test_a_full_disk_is_an_error_while_copying(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC), raising=False)
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        storage.copy_range(file.fileno(), 0, file.fileno(), 0, 1)


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_space_is_reserved_by_zeros(number, tmp_path, monkeypatch):
    """musl does not stand in for file systems without fallocate, macOS has none."""
    if number is None:
        hide(monkeypatch, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse(number), raising=False)
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        file.write(b"old")
        storage.reserve(file.fileno(), 5 << 20)
        storage.reserve(file.fileno(), 1 << 20)
    assert (tmp_path / "file").read_bytes() == b"old".ljust(5 << 20, b"\0")
    with (tmp_path / "file").open("r+b") as file:
        monkeypatch.setattr(descriptors, "write_some", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            storage.reserve(file.fileno(), 6 << 20)


# -- syncing --


def test_macos_syncs_the_disk_too(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda handle, command: calls.append(command))
    monkeypatch.setattr(storage, "fcntl", fake)
    with (tmp_path / "file").open("wb") as file:
        storage.sync_file(file.fileno())
        assert calls == [51]
        fake.fcntl = refuse(errno.ENOTSUP)
        monkeypatch.setattr(os, "fsync", calls.append)
        storage.sync_file(file.fileno())
        assert calls == [51, file.fileno()]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_synced(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with atomic_output(tmp_path / "out") as file:
        file.write(b"x")
    assert (tmp_path / "out").read_bytes() == b"x"


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OutputError, match="Input/output error"), atomic_output(tmp_path / "out") as file:
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_windows_opens_no_folders(tmp_path, monkeypatch):
    hide(monkeypatch, "O_DIRECTORY")
    assert descriptors.open_folder(tmp_path) is None
    storage.sync_folder(tmp_path)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_bytes(b"x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


# -- outputs on file systems that lack something --

NFS = {"fchmod": refuse(errno.EPERM)}
EXFAT = {"fchmod": refuse(errno.EPERM), "link": refuse(errno.EPERM), "symlink": refuse(errno.EPERM), "O_TMPFILE": None}
SMB = {"fchmod": refuse(errno.EOPNOTSUPP), "link": refuse(errno.EOPNOTSUPP), "O_TMPFILE": None}
OVERLAY = {"link": refuse(errno.EXDEV)}
SANDBOX = {"link": refuse(errno.ENOENT)}
ANDROID = {"link": refuse(errno.EACCES), "O_TMPFILE": None}
NO_CALLS = dict.fromkeys(("fchmod", "link", "O_TMPFILE", "O_DIRECTORY", "O_NOFOLLOW", "copy_file_range"))


@pytest.fixture(
    params=[NFS, EXFAT, SMB, OVERLAY, SANDBOX, ANDROID, NO_CALLS, "no proc", "no locks"],
    ids=["nfs", "exfat", "smb", "overlay", "sandbox", "android", "no calls", "no proc", "no locks"],
)
def poor(request, monkeypatch, tmp_path):
    """A folder of a file system, or of a system, that lacks something."""
    if request.param == "no proc":
        monkeypatch.setattr(nameless, "_DESCRIPTORS", tmp_path / "nowhere")
    elif request.param == "no locks":
        monkeypatch.setattr(locks, "fcntl", types.SimpleNamespace(flock=refuse(errno.ENOLCK), LOCK_EX=2, LOCK_NB=4))
    else:
        for name, call in request.param.items():
            if call is None:
                monkeypatch.delattr(os, name, raising=False)
            else:
                monkeypatch.setattr(os, name, call, raising=False)
    (tmp_path / "poor").mkdir()
    return tmp_path / "poor"


@pytest.mark.parametrize("force", [False, True])
def test_output_is_whole_or_absent(poor, force):
    target = poor / "out"
    with atomic_output(target, force=force) as file:
        file.write(CONTENT)
        file.flush()
        assert nameless.path_of(file).read_bytes() == CONTENT
        assert not target.exists()
    assert target.read_bytes() == CONTENT
    with pytest.raises(RuntimeError), atomic_output(target, force=force) as file:
        file.write(b"half")
        raise RuntimeError
    if not force:
        with pytest.raises(OutputError, match="meantime"), atomic_output(target, force=False) as file:
            file.write(b"second")
    assert {path.name: path.read_bytes() for path in poor.iterdir()} == {"out": CONTENT}


@pytest.mark.parametrize("force", [False, True])
def test_several_outputs_and_folders(poor, force):
    targets = [poor / name for name in "abc"]
    with atomic_outputs(targets, force=force) as files:
        for number, file in enumerate(files):
            file.write(bytes([number]))
    with atomic_folder(poor / "folder", marker="m") as folder:
        (folder / "m").write_bytes(b"3")
    assert [path.read_bytes() for path in [*targets, poor / "folder" / "m"]] == [b"\0", b"\1", b"\2", b"3"]
    assert sorted(path.name for path in poor.iterdir()) == ["a", "b", "c", "folder"]


def test_links_in_the_cache_become_copies(poor, monkeypatch):
    (poor / "source").write_bytes(CONTENT)
    storage.point(poor / "target", poor / "source")
    assert (poor / "target").read_bytes() == CONTENT
    monkeypatch.setenv("GGUFLORA_CACHE", str(poor / "cache"))
    with cache.locked(poor / "source"):
        cache.record_sha256(poor / "source", "0")


def test_a_disk_that_does_not_say_how_large_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(total=0, free=0))
    check_target(tmp_path / "out", [], force=False, size=1 << 40)


def test_a_folder_in_which_one_may_write_but_not_list(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(os, "scandir", refuse(errno.EACCES))
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *mode, **options: (
            refuse(errno.EACCES)()
            if flags == os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            else real(path, flags, *mode, **options)
        ),
    )
    with atomic_output(tmp_path / "out") as file:
        file.write(b"x")
    assert (tmp_path / "out").read_bytes() == b"x"


# -- Windows: what is open cannot be renamed --


def open_paths():
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


@pytest.fixture
def windows(monkeypatch):
    """Renaming fails for files that this process has open, as it does on Windows."""
    real = Path.replace

    def replace(source, target):
        if {str(source), str(target)} & open_paths():
            raise PermissionError(errno.EACCES, "in use")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(storage, "RENAMES_OPEN_FILES", False)
    monkeypatch.setattr(storage, "_PAUSES", (0.01, 0.01))
    hide(monkeypatch, "O_TMPFILE", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod")


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("force", [False, True])
def test_drafts_are_closed_before_they_are_renamed(tmp_path, force):
    targets = [tmp_path / name for name in "abc"]
    with atomic_outputs(targets, force=force) as files:
        for file in files:
            file.write(b"new")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_bytes(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "folder"]


@pytest.mark.usefixtures("windows")
def test_an_output_that_another_program_has_open(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with (
        (tmp_path / "out").open("rb"),
        pytest.raises(OutputError, match="another program has it open"),
        atomic_output(tmp_path / "out") as file,
    ):
        file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out": b"old"}


@pytest.mark.usefixtures("windows")
def test_a_virus_scanner_delays_the_rename(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.05,) * 100)
    (tmp_path / "out").write_bytes(b"old")
    scanner = (tmp_path / "out").open("rb")
    threading.Timer(0.2, scanner.close).start()
    with atomic_output(tmp_path / "out") as file:
        file.write(b"new")
    assert (tmp_path / "out").read_bytes() == b"new"


# -- locks --


@pytest.fixture(params=["fcntl", "msvcrt"])
def kind(request, monkeypatch):
    """Locks of Linux and macOS, and those of Windows."""
    if request.param == "msvcrt":
        flock = locks.fcntl.flock if locks.fcntl else None
        if flock is None:
            return

        def locking(handle, mode, count):
            assert (mode, count, os.lseek(handle, 0, os.SEEK_CUR)) == (2, 1, 1 << 30)
            flock(handle, 2 | 4)

        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))


@pytest.mark.usefixtures("kind")
def test_a_lock_is_held_once(tmp_path):
    with (tmp_path / "file").open("w+b") as first, (tmp_path / "file").open("r+b") as second:
        assert locks.try_lock(first.fileno())
        with pytest.raises(BlockingIOError):
            locks.try_lock(second.fileno())
        threading.Timer(0.2, first.close).start()
        begun = time.monotonic()
        assert locks.lock(second.fileno())
        assert time.monotonic() - begun > 0.1
        assert os.lseek(second.fileno(), 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("fcntl", [None, types.SimpleNamespace(flock=refuse(errno.ENOLCK), LOCK_EX=2, LOCK_NB=4)])
def test_without_locks_only_old_leftovers_go(tmp_path, monkeypatch, fcntl):
    monkeypatch.setattr(locks, "fcntl", fcntl)
    monkeypatch.setattr(locks, "msvcrt", None)
    paths = [tmp_path / ".out.00000001.partial", tmp_path / ".out.00000002.partial"]
    for path in paths:
        path.write_bytes(b"half")
    os.utime(paths[0], (1, 1))
    with atomic_output(tmp_path / "out") as file:
        file.write(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [paths[1].name, "out"]


# -- processes, memory, pipes --


def test_without_resource(monkeypatch):
    monkeypatch.setattr(processes, "resource", None)
    assert processes.most_open_files() is None
    assert processes.confine(1) is None
    assert processes.peak_memory() > 1 << 20


@pytest.mark.parametrize(("names", "expected"), [((), str(os.getuid())), (("getuid",), "J_rg_x")])
def test_a_user_has_a_key(monkeypatch, names, expected):
    hide(monkeypatch, *names)
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "J/rg x")
    assert processes.user_key() == expected


def test_memory_without_memfd(monkeypatch):
    hide(monkeypatch, "memfd_create")
    with nameless.memory_file("name") as path:
        path.write_bytes(b"x")
        assert path.read_bytes() == b"x"
    assert not path.exists()
    assert not path.parent.exists()


def test_a_pipe_has_a_limit_of_time():
    code = "import os, sys; os.write(1, b'a\\n'); sys.stdin.read(); os.write(1, b'b\\n')"
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        reader = PipeReader(process.stdout)
        assert reader.read(60) == b"a\n"
        with pytest.raises(TimeoutError):
            reader.read(0.05)
        process.stdin.close()
        assert reader.read(60) == b"b\n"
        assert (reader.read(60), reader.read(60)) == (b"", b"")
        reader.close()
