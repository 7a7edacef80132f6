"""Importance matrices in both formats, written here from what llama.cpp's imatrix collects; damaged ones refused."""

import os
import struct

import numpy as np
import pytest

from gguflora.errors import FormatError, MismatchError
from gguflora.merging.imatrix import _Reader, importance_of, read_imatrix
from support.imatrix import CHUNK, write_imatrix

DENSE, STACK, TIED = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "token_embd.weight"
ORIGIN = struct.pack("<ii", 7, 9) + b"words.txt"


def collected():
    """Sums of squares and counts by tensor; of four experts one saw nothing."""
    random = np.random.default_rng(0)
    dense = random.chisquare(3, (1, 96)).astype(np.float32) * 1000
    stack = random.chisquare(3, (4, 64)).astype(np.float32) * 100
    stack[2] = 0
    return {DENSE: (dense, [7 * CHUNK]), STACK: (stack, [CHUNK, 3, 0, 5 * CHUNK])}


def dat_entry(name, calls, values):
    encoded = name.encode()
    return struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(values)) + values.tobytes()


def write_dat(path, entries, end=ORIGIN):
    """As `llama-imatrix --output-format dat`: means times the number of calls."""
    content = struct.pack("<i", len(entries))
    for name, (sums, counts) in entries.items():
        calls = -(-max(counts) // CHUNK)
        divisors = np.array(counts, np.float32)[:, None]
        means = np.where(divisors, sums / np.where(divisors, divisors, 1), 1).astype(np.float32)
        content += dat_entry(name, calls, (means * np.float32(calls)).ravel())
    path.write_bytes(content + end)
    return path


def test_gguf(tmp_path):
    imatrix = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", collected()))
    sums, counts = collected()[STACK]
    assert imatrix[DENSE].shape == (96,)
    assert imatrix[STACK].shape == (4, 64)
    np.testing.assert_array_equal(imatrix[DENSE], collected()[DENSE][0][0] / np.float32(7 * CHUNK))
    for expert in (0, 1, 3):
        np.testing.assert_array_equal(imatrix[STACK][expert], sums[expert] / np.float32(counts[expert]))
    np.testing.assert_array_equal(imatrix[STACK][2], 1)
    assert all(weights.dtype == np.float32 for weights in imatrix.values())


def test_counts_are_rounded_as_lround_does(tmp_path):
    sums = np.full((6, 4), 12.0)
    path = write_imatrix(tmp_path / "imatrix.gguf", {STACK: (sums, [2.5, 3.4999, 0.49, -3, 0.5, 16777217.0])})
    expected = np.float32([4, 4, 1, 1, 12, 12 / np.float32(16777216)])
    np.testing.assert_array_equal(read_imatrix(path)[STACK][:, 0], expected)


@pytest.mark.parametrize("end", [b"", ORIGIN[:4], ORIGIN])
def test_dat(end, tmp_path):
    """The same weights, up to the rounding of the products that the file holds."""
    new = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", collected()))
    old = read_imatrix(write_dat(tmp_path / "imatrix.dat", collected(), end))
    assert list(old) == list(new)
    assert {name: weights.ndim for name, weights in old.items()} == {DENSE: 1, STACK: 1}
    for name in old:
        np.testing.assert_allclose(old[name], new[name].ravel(), rtol=2e-7)


def test_dat_without_calls_is_taken_as_it_is(tmp_path):
    values = np.float32([1, 2.5, 0])
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<i", 1) + dat_entry(DENSE, 0, values))
    np.testing.assert_array_equal(read_imatrix(tmp_path / "imatrix.dat")[DENSE], values)


def test_division_is_in_single_precision(tmp_path):
    values = np.random.default_rng(1).random(999, np.float32)
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<i", 1) + dat_entry(DENSE, 7, values))
    expected = np.array([float(value) / 7 for value in values]).astype(np.float32)
    np.testing.assert_array_equal(read_imatrix(tmp_path / "imatrix.dat")[DENSE], expected)


def test_importance_of_a_tensor(tmp_path):
    for imatrix in (
        read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", {**collected(), TIED: ([[1.0] * 96], [1])})),
        read_imatrix(write_dat(tmp_path / "imatrix.dat", {**collected(), TIED: (np.ones((1, 96)), [1])})),
    ):
        assert importance_of(imatrix, DENSE, (33, 96)).shape == (1, 96)
        assert importance_of(imatrix, STACK, (4, 8, 64)).shape == (4, 64)
        assert importance_of(imatrix, "blk.1.attn_q.weight", (33, 96)) is None
        assert importance_of(imatrix, TIED, (288, 64)) is None
        for name, shape in ((DENSE, (96, 32)), (STACK, (5, 8, 64)), (STACK, (8, 64))):
            with pytest.raises(MismatchError, match=name):
                importance_of(imatrix, name, shape)


ONE = np.float32([1, 2])
DATS = {
    "empty": b"",
    "short": b"\1\0",
    "no_entries": struct.pack("<i", 0),
    "negative_entries": struct.pack("<i", -1),
    "too_many_entries": struct.pack("<i", 1 << 30) + dat_entry(DENSE, 1, ONE),
    "one_entry_too_many": struct.pack("<i", 2) + dat_entry(DENSE, 1, ONE),
    "name_negative": struct.pack("<ii", 1, -5) + bytes(100),
    "name_past_the_end": struct.pack("<ii", 1, 1 << 30) + bytes(100),
    "no_name": struct.pack("<i", 1) + dat_entry("", 1, ONE),
    "twice": struct.pack("<i", 2) + 2 * dat_entry(DENSE, 1, ONE),
    "no_values": struct.pack("<i", 1) + dat_entry(DENSE, 1, ONE[:0]) + bytes(100),
    "values_past_the_end": struct.pack("<i", 1) + dat_entry(DENSE, 1, ONE)[:-1],
    "nan": struct.pack("<i", 1) + dat_entry(DENSE, 1, np.float32([1, np.nan])),
    "infinite": struct.pack("<i", 1) + dat_entry(DENSE, 1, np.float32([np.inf])),
    "negative": struct.pack("<i", 1) + dat_entry(DENSE, 1, np.float32([-1])),
    "text": b"this is no importance matrix at all, but a text" * 100,
}


@pytest.mark.parametrize("case", DATS)
def test_damaged_dat(case, tmp_path):
    (tmp_path / "imatrix.dat").write_bytes(DATS[case])
    with pytest.raises(FormatError, match=r"imatrix\.dat"):
        read_imatrix(tmp_path / "imatrix.dat")


SUMS = np.ones((1, 4))
GGUFS = {
    "no_counts": {DENSE: (SUMS, None)},
    "no_sums": {DENSE: (None, [1])},
    "other_tensors": {},
    "counts_do_not_divide": {DENSE: (SUMS, [1, 1, 1])},
    "counts_nan": {DENSE: (SUMS, [np.nan])},
    "counts_infinite": {DENSE: (SUMS, [np.inf])},
    "sums_nan": {DENSE: (SUMS * np.nan, [1])},
    "sums_negative": {DENSE: (-SUMS, [1])},
}


@pytest.mark.parametrize("case", GGUFS)
def test_damaged_gguf(case, tmp_path):
    path = write_imatrix(tmp_path / "imatrix.gguf", GGUFS[case])
    with pytest.raises(FormatError, match=r"imatrix\.gguf"):
        read_imatrix(path)


def test_gguf_of_another_type(tmp_path):
    with pytest.raises(FormatError, match="F16"):
        read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", {DENSE: (SUMS, [1])}, np.float16))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None])
def test_no_file(make, tmp_path):
    make(tmp_path / "imatrix")
    with pytest.raises(FormatError, match="imatrix"):
        read_imatrix(tmp_path / "imatrix")


def test_a_dat_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    """It costs an error, where a mapped file would end the process (SIGBUS)."""
    path = write_dat(tmp_path / "cut.dat", {DENSE: (np.ones((1, 1 << 20), np.float32), [1])})
    integer = _Reader.integer

    def cut(reader, what):
        os.truncate(path, 1 << 20)
        return integer(reader, what)

    monkeypatch.setattr(_Reader, "integer", cut)
    with pytest.raises(FormatError, match="shorter"):
        read_imatrix(path)
