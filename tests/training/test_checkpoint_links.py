"""Checkpoints of a training run follow no links, and wait for no FIFO."""

import os

import pytest

torch = pytest.importorskip("torch")

from gguflora.errors import OutputError  # noqa: E402
from gguflora.training.checkpoints import STATE, Checkpoint, Progress, read_checkpoint, save_checkpoint  # noqa: E402

MINE = b"the user's own"


def checkpoint():
    return Checkpoint({"seed": 1}, Progress(step=3), {"a": torch.ones(2)}, {}, {})


@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
@pytest.mark.parametrize("place", ["state", f"state/{STATE}"])
def test_links(tmp_path, place, to):
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    (home / "file").write_bytes(MINE)
    link = tmp_path / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(home / to)
    with pytest.raises(OutputError, match="is a link"):
        save_checkpoint(tmp_path / "state", checkpoint())
    with pytest.raises(OutputError, match="is a link"):
        read_checkpoint(tmp_path / "state", {"seed": 1})
    assert (home / "file").read_bytes() == MINE
    assert sorted(path.name for path in home.rglob("*")) == ["file", "folder"]


def test_a_fifo(tmp_path):
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / "state" / STATE)
    with pytest.raises(OutputError, match="is a FIFO"):
        save_checkpoint(tmp_path / "state", checkpoint())
    with pytest.raises(OutputError, match="is a FIFO"):
        read_checkpoint(tmp_path / "state", {"seed": 1})


def test_a_draft_that_is_a_link(tmp_path):
    (tmp_path / "file").write_bytes(MINE)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / f".{STATE}.01234567.partial").symlink_to(tmp_path / "file")
    save_checkpoint(tmp_path / "state", checkpoint())
    save_checkpoint(tmp_path / "state", checkpoint())
    assert read_checkpoint(tmp_path / "state", {"seed": 1}).progress.step == 3
    assert (tmp_path / "file").read_bytes() == MINE
