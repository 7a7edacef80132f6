"""Output is whole or absent, on file systems with and without files that have no name."""

import os
from pathlib import Path

import pytest

from gguflora.errors import OutputError
from gguflora.files.output import atomic_output, path_of


@pytest.fixture(params=["unnamed", "named"])
def folder(request, monkeypatch, tmp_path):
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # opening it for writing fails with EISDIR
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
    before = len(list(Path("/proc/self/fd").iterdir()))
    with atomic_output(folder / "out") as file:
        file.write(b"x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
