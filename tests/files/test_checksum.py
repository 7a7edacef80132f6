"""The checksum of files that are no models."""

import hashlib

import pytest

import gguflora
from gguflora.files.checksum import sha256_of
from support import builders


def test_several_files_are_hashed_as_one(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"a" * 1000 + b"b" * 1000).hexdigest()


@pytest.fixture
def hole(tmp_path):
    """A file of a TB that takes no room."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("the file system has no files of a TB")
    return path


def test_a_large_hole_is_refused(hole):
    with pytest.raises(OSError, match="nearly all holes: 0 of 1,099,511,627,776 bytes"):
        sha256_of(hole)


def test_a_pipeline_refuses_a_large_hole(hole, tmp_path):
    adapter = builders.adapter("llama", builders.Adapter(seed=3))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'output = "out"\n[sources]\nadapters = ["{adapter}"]\n[[steps]]\nname = "lora"\naction = "convert"\n'
        f'for = {{ adapter = "sources.adapters" }}\nadapter = "{{adapter}}"\nbase = "{hole}"\n'
        'out = "{adapter}.gguf"\n'
    )
    assert "nearly all holes" in str(gguflora.run_pipeline(recipe))
