"""Nothing that gguflora writes follows a link in its place: a cloned folder could lead to files of the user."""

import os
import shutil
import threading

import pytest

import gguflora
from gguflora.diagnostics import demo
from gguflora.errors import GgufloraError, OutputError
from gguflora.files.remote import cache
from gguflora.files.sidecars import journal_path, undo_path
from support import builders
from support.builders import Adapter
from support.shards import split

WEAK = Adapter(seed=4)
MINE = b"the user's own"


@pytest.fixture
def victim(tmp_path):
    """A file of the user beside a cloned folder; it stays as it is, and nothing appears beside it."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "notes"
    path.write_bytes(MINE)
    yield path
    assert path.read_bytes() == MINE
    assert [each.name for each in path.parent.iterdir()] == ["notes"]


@pytest.fixture
def cloned(tmp_path):
    """A folder with a model of its own."""
    folder = tmp_path / "cloned"
    folder.mkdir()
    shutil.copy(builders.gguf_model("llama", "wide", "Q4_0"), folder / "model.gguf")
    return folder


def lora():
    return builders.adapter("llama", WEAK, "wide")


def merge(folder, **options):
    return gguflora.merge(folder / "model.gguf", [(lora(), 1.0)], **options)


WRITERS = {
    "convert": ("out.gguf", lambda f: gguflora.convert(lora(), f / "model.gguf", f / "out.gguf", force=True)),
    "merge": ("out.gguf", lambda f: merge(f, out=f / "out.gguf", force=True)),
    "patch": ("out.patch", lambda f: merge(f, patch=f / "out.patch", force=True)),
    "combine": ("peft", lambda f: gguflora.combine([(lora(), 1.0)], f / "peft", force=True)),
    "quantize": ("out.gguf", lambda f: gguflora.quantize(f / "model.gguf", f / "out.gguf", "Q8_0", force=True)),
    "in place": ("model.gguf.undo", lambda f: merge(f, in_place=True)),
    "journal": ("model.gguf.journal", lambda f: merge(f, in_place=True)),
}


@pytest.mark.parametrize("to", ["notes", "new", "."])
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_a_link(cloned, victim, name, to):
    place, write = WRITERS[name]
    before = (cloned / "model.gguf").read_bytes()
    (cloned / place).symlink_to(victim.parent / to)
    with pytest.raises(GgufloraError, match=r"is a link|was merged in place before|is half merged"):
        write(cloned)
    assert (cloned / "model.gguf").read_bytes() == before
    assert (cloned / place).is_symlink()


@pytest.mark.parametrize("name", [".out.gguf.01234567.partial", ".out.gguf.partial"])
def test_a_draft_that_is_a_link(cloned, victim, name):
    (cloned / name).symlink_to(victim)
    merge(cloned, out=cloned / "out.gguf")
    (cloned / "folder").symlink_to(victim.parent)
    (cloned / ".peft.01234567.partial").symlink_to(victim.parent)
    gguflora.combine([(lora(), 1.0)], cloned / "peft")


def test_a_journal_that_is_a_link_while_a_merge_is_undone(cloned, victim):
    merge(cloned, in_place=True)
    merged = (cloned / "model.gguf").read_bytes()
    journal_path(cloned / "model.gguf").symlink_to(victim)
    with pytest.raises(OutputError, match="is a link"):
        gguflora.unmerge(cloned / "model.gguf")
    assert (cloned / "model.gguf").read_bytes() == merged
    journal_path(cloned / "model.gguf").unlink()
    gguflora.unmerge(cloned / "model.gguf")


def test_a_link_that_appears_after_the_check(cloned, victim, monkeypatch):
    """The journal itself is opened without following links."""
    from gguflora.merging.in_place import journal

    def plant(path):
        if not os.path.lexists(path):
            path.symlink_to(victim)

    monkeypatch.setattr(journal, "check_regular", plant)
    with pytest.raises(OutputError, match=r"cannot be changed in place|is half merged"):
        merge(cloned, in_place=True)


def test_a_part_that_leads_elsewhere(cloned, victim, tmp_path):
    """Of a split model in a cloned folder one file is a file of the user."""
    parts = split(cloned / "model.gguf", cloned / "parts", 2)
    shutil.move(parts[1], tmp_path / "elsewhere.gguf")
    parts[1].symlink_to(tmp_path / "elsewhere.gguf")
    before = (tmp_path / "elsewhere.gguf").read_bytes()
    with pytest.raises(OutputError, match="is a link out of"):
        gguflora.merge(parts[0], [(lora(), 1.0)], in_place=True)
    undo_path(parts[0]).unlink(missing_ok=True)
    assert (tmp_path / "elsewhere.gguf").read_bytes() == before


def test_the_lock_of_the_cache(tmp_path, victim):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".x.lock").symlink_to(victim.parent / "new")
    with pytest.raises(OSError, match="symbolic link"), cache.locked(tmp_path / "cache" / "x"):
        pass


def test_links_swapped_while_outputs_are_written(cloned, victim):
    """Another process plants a link again and again: the output is a file, or it is refused."""
    target, done = cloned / "out.gguf", threading.Event()

    def plant():
        while not done.is_set():
            spare = cloned / "spare"
            spare.symlink_to(victim)
            spare.replace(target)
            target.unlink(missing_ok=True)

    planter = threading.Thread(target=plant)
    planter.start()
    try:
        for _ in range(30):
            try:
                gguflora.convert(demo.HERE / "shout", demo.BASE, target, force=True)
            except OutputError as error:
                assert "is a link" in str(error) or "cannot be written" in str(error)
    finally:
        done.set()
        planter.join()
