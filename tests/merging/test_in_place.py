"""A merge in place can be undone at any moment: when it is finished, and wherever it was stopped."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gguflora
from gguflora.errors import FormatError, GgufError, OutputError, PatchError
from gguflora.files.shard_names import part_paths
from gguflora.files.sidecars import journal_path, undo_path
from gguflora.merging.in_place import journal
from gguflora.system import descriptors, locks
from support import builders
from support.adapters import resized
from support.builders import Adapter
from support.oracles.gguf_files import read_tensors
from support.shards import split

WEAK = Adapter(seed=4)
FEW = Adapter(seed=5, targets=("q_proj", "v_proj"))


def lora(spec=WEAK, size="wide"):
    return builders.adapter("llama", spec, size)


@pytest.fixture(params=["Q4_K_M"])
def base(request, tmp_path):
    """A model of the test's own, alone in its directory."""
    path = tmp_path / "model.gguf"
    shutil.copy(builders.gguf_model("llama", "wide", request.param), path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def path_of(handle):
    return Path(f"/proc/self/fd/{handle}").readlink()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what is merged, and what comes back --


@pytest.mark.parametrize("base", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_XS"], indirect=True)
def test_there_and_back(base, tmp_path):
    before = digest(base)
    gguflora.merge(base, [(lora(), 0.5)], tmp_path / "merged.gguf")
    expected = read_tensors(tmp_path / "merged.gguf")
    (tmp_path / "merged.gguf").unlink()
    report = gguflora.merge(base, [(lora(), 0.5)], in_place=True)
    assert names(tmp_path) == ["model.gguf", "model.gguf.undo"]
    assert report.written == (tmp_path / "model.gguf.undo").stat().st_size
    assert digest(base) != before
    for name, values in read_tensors(base).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    undone = gguflora.unmerge(base)
    assert digest(base) == before == undone.sha256
    assert undone.changed > 0
    assert names(tmp_path) == ["model.gguf"]


def test_nothing_to_merge(base, tmp_path):
    before = digest(base)
    gguflora.merge(base, [(lora(), 0.0)], in_place=True)
    assert digest(base) == before
    assert gguflora.unmerge(base).changed == 0
    assert names(tmp_path) == ["model.gguf"]


def test_through_a_symbolic_link(base, tmp_path):
    before, link = digest(base), tmp_path / "link.gguf"
    link.symlink_to(base)
    gguflora.merge(link, lora(), in_place=True)
    assert names(tmp_path) == ["link.gguf", "model.gguf", "model.gguf.undo"]
    gguflora.unmerge(link)
    assert digest(base) == before


def test_merged_once_only(base):
    gguflora.merge(base, lora(), in_place=True)
    after = digest(base)
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"was merged in place before.*unmerge"):
            gguflora.merge(base, lora(FEW), in_place=True, dry_run=dry_run)
    assert digest(base) == after


def test_command_line(base, tmp_path):
    before, command = digest(base), [sys.executable, "-P", "-m", "gguflora"]
    merged = subprocess.run(
        [*command, "merge", base, "--lora", lora(), "--in-place"], check=True, capture_output=True, text=True
    )
    assert "the undo file has" in merged.stdout
    report = json.loads(subprocess.run([*command, "unmerge", base, "--json"], check=True, capture_output=True).stdout)
    assert report["sha256"] == digest(base) == before
    assert names(tmp_path) == ["model.gguf"]


def test_a_split_base(base, tmp_path):
    parts = split(base, tmp_path / "parts.gguf", 3)
    base.unlink()
    before = [digest(path) for path in parts]
    gguflora.merge(parts[0], [(lora(), 0.5)], tmp_path / "merged.gguf")
    merged = [read_tensors(path) for path in part_paths(tmp_path / "merged.gguf", 3)]
    gguflora.merge(parts[1], [(lora(), 0.5)], in_place=True)
    assert f"{parts[0].name}.undo" in names(tmp_path)
    for path, expected in zip(parts, merged, strict=True):
        for name, values in read_tensors(path).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
    with pytest.raises(OutputError, match="was merged in place before"):
        gguflora.merge(parts[2], lora(), in_place=True)
    report = gguflora.unmerge(parts[2])
    assert [digest(path) for path in parts] == before
    assert (report.base, report.size) == (parts[0], sum(path.stat().st_size for path in parts))
    assert f"{parts[0].name}.undo" not in names(tmp_path)


# -- what is refused --


def assert_refused(base, match, adapter=None, **options):
    before = digest(base)
    with pytest.raises(OutputError, match=match):
        gguflora.merge(base, adapter or lora(), in_place=True, **options)
    assert digest(base) == before
    assert not undo_path(base).exists()


def test_another_layout(base, tmp_path):
    assert_refused(base, "would become Q8_0.*--out", outtype="q8_0")
    shutil.copy(builders.gguf_model("llama"), base)
    assert_refused(base, "would become", resized("llama")[0])
    shutil.copy(builders.gguf_model("gemma3", "wide", "Q4_K_M"), base)
    assert_refused(
        base, "would be added", builders.adapter("gemma3", Adapter(targets=("embed_tokens",), seed=1), "wide")
    )


def test_while_another_does_it(base):
    with base.open("rb") as other:
        assert locks.try_lock(other.fileno())
        assert_refused(base, "by another process")
    gguflora.merge(base, lora(), in_place=True)
    after = digest(base)
    with base.open("rb") as other:
        assert locks.try_lock(other.fileno())
        with pytest.raises(OutputError, match="by another process"):
            gguflora.unmerge(base)
    assert digest(base) == after


def test_a_file_that_cannot_be_written(base, monkeypatch):
    real = os.open

    def read_only(path, flags, *rest, **options):
        if Path(path) == base and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert_refused(base, "Permission denied")


def test_no_undo_file(base):
    with pytest.raises(PatchError, match="does not exist"):
        gguflora.unmerge(base)


@pytest.mark.parametrize("where", ["changed", "unchanged", "longer"])
def test_changed_since(where, base):
    before = base.read_bytes()
    gguflora.merge(base, lora(FEW), in_place=True)
    merged = base.read_bytes()
    moved = {at for at in range(len(before)) if before[at] != merged[at]}
    edited = bytearray(merged)
    if where == "longer":
        edited.append(0)
    else:
        edited[max(moved) if where == "changed" else 100] ^= 1
    base.write_bytes(edited)
    with pytest.raises(PatchError, match=r"changed by something else|is for .* bytes"):
        gguflora.unmerge(base)
    assert base.read_bytes() == edited
    assert undo_path(base).exists()


def test_a_damaged_undo_file(base):
    gguflora.merge(base, lora(FEW), in_place=True)
    undo, merged = undo_path(base), digest(base)
    content = undo.read_bytes()
    for place in [*range(0, 64, 5), *range(64, len(content), len(content) // 40), len(content) - 1]:
        undo.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(FormatError):
            gguflora.unmerge(base)
        assert digest(base) == merged
    gguflora.merge(builders.gguf_model("llama", "wide", "Q4_K_M"), lora(FEW), patch=undo, force=True)
    with pytest.raises(PatchError):
        gguflora.unmerge(base)
    assert digest(base) == merged


# -- stopped midway --


class Stopped(BaseException):
    """The process is no more."""


class Disk:
    """A disk that stops at the n-th call that changes it, and may lose what was not synced by then."""

    def __init__(self, monkeypatch, folder, last=None):
        self.last, self.calls, self._folder = last, 0, folder
        self._unsynced = []
        self._pwrite, self._fsync, self._unlink = descriptors.write_some, os.fsync, Path.unlink
        monkeypatch.setattr(descriptors, "write_some", self.pwrite)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(Path, "unlink", lambda path, **options: self.unlink(path, **options))  # noqa: PLW0108  (a method)

    def _count(self):
        self.calls += 1
        if self.last is not None and self.calls > self.last + 1:
            raise Stopped
        return self.last is not None and self.calls == self.last + 1

    def pwrite(self, handle, content, offset):
        stops, path = self._count(), path_of(handle)
        if stops:
            content = content[: len(content) // 2]
        if path.name in {"model.gguf", "model.gguf.journal"}:
            with path.open("rb") as file:
                file.seek(offset)
                self._unsynced.append((path, offset, file.read(len(content)).ljust(len(content), b"\0")))
        written = self._pwrite(handle, content, offset)
        if stops:
            raise Stopped
        return written

    def fsync(self, handle):
        if self._count():
            raise Stopped
        self._fsync(handle)
        self._unsynced = [entry for entry in self._unsynced if entry[0] != path_of(handle)]

    def unlink(self, path, **options):
        if path.parent == self._folder and self._count():
            raise Stopped
        self._unlink(path, **options)

    def lose(self, seed):
        """A power cut: some sectors of what was not synced never reached the disk."""
        rng = np.random.default_rng(seed)
        for path, offset, old in reversed(self._unsynced):
            if not path.exists():
                continue
            with path.open("r+b") as file:
                for first in range(0, len(old), 512):
                    if rng.random() < 0.5:
                        file.seek(offset + first)
                        file.write(old[first : first + 512])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A base, an adapter that changes few rows of it, and several chunks to change them in."""
    monkeypatch.setattr(journal, "CHUNK_BYTES", 10_000)
    path = tmp_path / "model.gguf"
    shutil.copy(builders.gguf_model("llama", "small", "Q8_0"), path)
    return path, lora(Adapter(seed=5, targets=("q_proj", "k_proj", "v_proj", "o_proj")), "small")


def stopped(monkeypatch, folder, last, work, *, loses):
    """Whether the end of the disk, after so many calls, stops the work; the disk may also lose what was not synced."""
    with monkeypatch.context() as patched:
        disk = Disk(patched, folder, last)
        try:
            work()
        except Stopped:
            pass
        else:
            return False
    if loses:
        disk.lose(last)
    return True


@pytest.mark.parametrize("loses", [False, True], ids=["killed", "power cut"])
def test_stopped_anywhere(loses, tiny, monkeypatch, tmp_path):
    """Whatever call is the last, the base comes back, and a half-merged model is taken for one."""
    base, adapter = tiny
    before, outcomes = base.read_bytes(), set()
    for last in itertools.count():
        if not stopped(
            monkeypatch, tmp_path, last, lambda: gguflora.merge(base, adapter, in_place=True, threads=1), loses=loses
        ):
            break
        undo, half = undo_path(base).exists(), journal_path(base).exists()
        outcomes.add((undo, half, base.read_bytes() == before))
        if undo:
            with pytest.raises((GgufError, OutputError), match="unmerge"):
                gguflora.merge(base, adapter, in_place=True)
            gguflora.unmerge(base)
        if half:
            assert undo
        assert base.read_bytes() == before
        assert names(tmp_path) == ["model.gguf"]
    assert last > 20
    assert {(False, False, True), (True, False, True), (True, True, False)} <= outcomes


def fail_at(monkeypatch, base, last, error, *, once=False):
    """Writes to the model fail from one on, or just that one."""
    real, calls = descriptors.write_some, itertools.count()

    def pwrite(handle, content, offset):
        if path_of(handle) == base:
            call = next(calls)
            if call == last or (call > last and not once):
                raise error
        return real(handle, content, offset)

    monkeypatch.setattr(descriptors, "write_some", pwrite)


def test_half_merged_models_are_not_used(tiny, monkeypatch, tmp_path):
    base, adapter = tiny
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        fail_at(patched, base, 4, Stopped())
        gguflora.merge(base, adapter, in_place=True)
    assert journal_path(base).exists()
    for way in ({"out": tmp_path / "out.gguf"}, {"patch": tmp_path / "a.patch"}, {"in_place": True}):
        with pytest.raises(GgufError, match=r"half merged.*gguflora unmerge"):
            gguflora.merge(base, adapter, **way)
    with pytest.raises(GgufError, match="half merged"):
        gguflora.inspect(adapter, base=base)


@pytest.mark.parametrize("loses", [False, True], ids=["killed", "power cut"])
def test_unmerge_stopped_anywhere(loses, tiny, monkeypatch, tmp_path):
    base, adapter = tiny
    before = base.read_bytes()
    gguflora.merge(base, adapter, in_place=True)
    merged, undo = base.read_bytes(), undo_path(base).read_bytes()
    for last in itertools.count():
        base.write_bytes(merged)
        undo_path(base).write_bytes(undo)
        if not stopped(monkeypatch, tmp_path, last, lambda: gguflora.unmerge(base, threads=1), loses=loses):
            break
        if undo_path(base).exists():
            gguflora.unmerge(base)
        assert base.read_bytes() == before
        assert names(tmp_path) == ["model.gguf"]
    assert last > 10


KILLED = """
import os, signal, sys
import gguflora
from gguflora.files.sidecars import journal_path, undo_path
from gguflora.files.gguf import part_paths
from gguflora.merging.in_place import journal
journal.CHUNK_BYTES = 10_000
base, adapter, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
from gguflora.system import descriptors
real, calls = descriptors.write_some, [0]
def pwrite(handle, content, offset):
    if os.readlink(f"/proc/self/fd/{handle}") == base:
        calls[0] += 1
        if calls[0] == last:
            real(handle, content[:1000], offset)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, content, offset)
descriptors.write_some = pwrite
gguflora.merge(base, adapter, in_place=True)
"""


@pytest.mark.parametrize("last", [1, 4])
def test_killed(last, tiny, tmp_path):
    base, adapter = tiny
    before = base.read_bytes()
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, base, adapter, str(last)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["model.gguf", "model.gguf.journal", "model.gguf.undo"]
    assert base.read_bytes() != before
    gguflora.unmerge(base)
    assert base.read_bytes() == before
    assert names(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("last", [0, 4])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
def test_an_error_midway_puts_everything_back(error, last, tiny, monkeypatch, tmp_path):
    base, adapter = tiny
    before = base.read_bytes()
    fail_at(monkeypatch, base, last, error, once=True)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        gguflora.merge(base, adapter, in_place=True)
    assert isinstance(caught.value, KeyboardInterrupt) or "the file is unchanged" in str(caught.value)
    assert base.read_bytes() == before
    assert names(tmp_path) == ["model.gguf"]


def test_a_broken_disk_says_how_to_go_on(tiny, monkeypatch):
    base, adapter = tiny
    before = base.read_bytes()
    with monkeypatch.context() as patched:
        fail_at(patched, base, 4, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OutputError, match=r"half merged.*gguflora unmerge"):
            gguflora.merge(base, adapter, in_place=True)
    assert base.read_bytes() != before
    gguflora.unmerge(base)
    assert base.read_bytes() == before


def test_a_full_disk(tiny, monkeypatch, tmp_path):
    base, adapter = tiny
    before = base.read_bytes()

    def full(handle, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(OutputError, match="No space left"):
            gguflora.merge(base, adapter, in_place=True)
    assert base.read_bytes() == before
    assert names(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(("command", "said"), [("unmerge", "run it again"), ("merge", "nothing was written")])
def test_what_is_said_when_interrupted(command, said, monkeypatch, capsys):
    """The truth about the files, which is another one where a base is being given back."""
    import gguflora.cli

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguflora, command, interrupted)
    options = ["--lora", "a", "-o", "out.gguf"] if command == "merge" else []
    monkeypatch.setattr(sys, "argv", ["gguflora", command, "base.gguf", *options])
    with pytest.raises(SystemExit) as stopped:
        gguflora.cli.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"interrupted; {said}" + (
        " to restore the base completely\n" if command == "unmerge" else "\n"
    )
