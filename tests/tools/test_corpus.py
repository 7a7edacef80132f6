"""What tools/fuzz.py has found stays mended; and a few hundred new trials of each target."""

import random

import pytest

from support import ROOT, fuzzing

CORPUS = ROOT / "tests/corpus"
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_dir())
TRIALS = 60


def test_there_is_a_corpus():
    assert FOUND


@pytest.mark.parametrize("folder", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_was_found(folder):
    assert fuzzing.finding(fuzzing.SEEDS[folder.parent.name][1], folder) is None


@pytest.mark.parametrize("target", fuzzing.SEEDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_few_trials(target, tmp_path):
    write, reader = fuzzing.SEEDS[target]
    seed = tmp_path / "seed"
    seed.mkdir()
    write(seed)
    assert fuzzing.finding(reader, seed) is None, "the sound files"
    for number in range(TRIALS):
        found = fuzzing.trial(seed, tmp_path / "scratch", random.Random(f"{target}-{number}"), reader)
        assert found is None, f"trial {number}: {found}"


def test_a_finding_is_seen(tmp_path):
    """Neither a crash of a reader nor an endless loop passes."""

    def crash(folder):
        raise KeyError(folder)

    assert fuzzing.finding(crash, tmp_path).startswith("KeyError")


def test_an_endless_reader_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)

    def endless(folder):
        while folder:
            pass

    assert fuzzing.finding(endless, tmp_path).startswith("TooSlowError")
