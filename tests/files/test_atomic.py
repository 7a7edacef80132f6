"""Output is whole or absent, on file systems with and without files that have no name."""

import errno
import os
import random
import signal
import time

import pytest

from gguflora.errors import OutputError
from gguflora.files.atomic import (
    atomic_folder,
    atomic_output,
    atomic_outputs,
)
from gguflora.system.nameless import path_of
from support.processes import open_files


@pytest.fixture(params=["unnamed", "named"])
def folder(request, monkeypatch, tmp_path):
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return tmp_path


@pytest.mark.parametrize("before", [None, b"old"])
def test_whole(before, folder):
    target = folder / "out"
    if before:
        target.write_bytes(before)
    with atomic_output(target) as file:
        file.write(b"new, ")
        file.flush()
        with path_of(file).open("ab") as again:
            again.write(b"and more")
        assert (target.read_bytes() if target.exists() else None) == before
    assert target.read_bytes() == b"new, and more"
    assert list(folder.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_absent(error, folder):
    with pytest.raises(error), atomic_output(folder / "out") as file:
        file.write(b"half")
        raise error
    assert list(folder.iterdir()) == []


def test_no_such_folder(tmp_path):
    with pytest.raises(OutputError, match="No such file"), atomic_output(tmp_path / "nowhere" / "out"):
        pass


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_stays_open(folder):
    before = open_files()
    with atomic_output(folder / "out") as file:
        file.write(b"x")
    assert open_files() == before


# -- names that are taken in the meantime --


def test_another_is_quicker(folder):
    """Two outputs of one name at the same time: the second is refused, the first stays."""
    target = folder / "out"
    with pytest.raises(OutputError, match="meantime"), atomic_output(target, force=False) as slow:
        slow.write(b"slow")
        with atomic_output(target, force=False) as quick:
            quick.write(b"quick")
    assert target.read_bytes() == b"quick"
    assert list(folder.iterdir()) == [target]


def test_the_last_of_two_that_may_overwrite(folder):
    target = folder / "out"
    with atomic_output(target) as slow:
        slow.write(b"slow")
        with atomic_output(target) as quick:
            quick.write(b"quick")
        assert target.read_bytes() == b"quick"
    assert target.read_bytes() == b"slow"
    assert list(folder.iterdir()) == [target]


def test_a_file_system_without_links(folder, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", refuse)
    with atomic_output(folder / "out", force=False) as file:
        file.write(b"x")
    with pytest.raises(OutputError, match="meantime"), atomic_output(folder / "out", force=False) as file:
        file.write(b"y")
    assert (folder / "out").read_bytes() == b"x"
    assert list(folder.iterdir()) == [folder / "out"]


# -- several files --


@pytest.mark.parametrize("force", [False, True])
def test_several(force, folder):
    targets = [folder / name for name in "abc"]
    if force:
        targets[1].write_bytes(b"old")
    with atomic_outputs(targets, force=force) as files:
        for number, file in enumerate(files):
            file.write(bytes([number]))
    assert [target.read_bytes() for target in targets] == [b"\0", b"\1", b"\2"]
    assert sorted(folder.iterdir()) == targets


def test_none_of_several(folder):
    targets = [folder / name for name in "abc"]
    with pytest.raises(OutputError, match="meantime"), atomic_outputs(targets, force=False):
        targets[0].write_bytes(b"precious")
    assert sorted(folder.iterdir()) == targets[:1]
    assert targets[0].read_bytes() == b"precious"


# -- kill -9 --


def write_without_end(targets):
    """In a process of its own."""
    while True:
        with atomic_outputs(targets) as files:
            for file in files:
                for _ in range(64):
                    file.write(b"x" * 4096)


@pytest.mark.parametrize("names", ["a", "abc"])
def test_killed_at_any_moment(names, folder):
    """The first file is absent or all are whole; what else is left, the next output removes."""
    targets = [folder / name for name in names]
    dice = random.Random(names)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            write_without_end(targets)
        time.sleep(dice.uniform(0.001, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if targets[0].exists():
            assert [target.stat().st_size for target in targets] == [64 * 4096] * len(targets)
    assert any(target.exists() for target in targets), "some output was finished"
    with atomic_outputs(targets) as files:
        for file in files:
            file.write(b"new")
    assert sorted(folder.iterdir()) == targets


def test_litter_of_the_living_stays(folder, monkeypatch):
    """Another process' file that is being written is not taken for litter."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with atomic_output(folder / "out") as slow:
        slow.write(b"slow")
        (folder / ".out.0123abcd.partial").write_bytes(b"of a process that was killed")
        with atomic_output(folder / "out") as quick:
            quick.write(b"quick")
        assert len(list(folder.glob(".out.*.partial"))) == 1
    assert (folder / "out").read_bytes() == b"slow"
    assert list(folder.iterdir()) == [folder / "out"]


def test_folders_of_the_dead_and_of_the_living(tmp_path):
    """What a killed process has left goes; what another is writing stays."""
    target, dead = tmp_path / "out", tmp_path / ".out.12345678.partial"
    dead.mkdir()
    (dead / "half").touch()
    if not hasattr(os, "O_DIRECTORY"):  # folders cannot be locked: what nobody has touched for a day is dead
        for path in (dead / "half", dead):
            os.utime(path, (1, 1))
    with atomic_folder(target) as first:
        (first / "file").write_text("first")
        with atomic_folder(target) as second:
            (second / "file").write_text("second")
            assert {first, second} == set(tmp_path.iterdir())
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_keeps_the_files_that_are_not_of_the_output(tmp_path):
    target = tmp_path / "out"
    for name in ("config", "weights.old", "weights.new", "optimizer.pt", "checkpoint/weights.old"):
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        (target / name).write_text("old")
    with atomic_folder(target, marker="config", stale=("weights.*",)) as folder:
        (folder / "config").write_text("new")
        (folder / "weights.new").write_text("new")
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    kept = {"optimizer.pt": "old", "checkpoint/weights.old": "old"}
    assert found == {"config": "new", "weights.new": "new", **kept}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_in_place_of_a_file_is_refused_before_anything_changes(tmp_path):
    target = tmp_path / "out"
    (target / "weights").mkdir(parents=True)
    (target / "config").write_text("old")
    with pytest.raises(OutputError, match="is a directory"), atomic_folder(target, marker="config") as folder:
        (folder / "config").write_text("new")
        (folder / "weights").write_text("new")
    assert (target / "config").read_text() == "old"
