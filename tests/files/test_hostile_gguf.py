"""GGUF files that are damaged or made to do harm, byte by byte: one clear error, in little time and memory."""

import itertools
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from gguflora.errors import GgufError
from gguflora.files.gguf import GgufFile

F32, Q8_0 = 0, 8
UINT8, UINT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 7, 8, 9, 10
TERABYTE = 1 << 40


def string(text):
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def tensor(name, dims=(32, 4), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, string("llama"))
ALIGNED_64 = entry("general.alignment", UINT32, struct.pack("<I", 64))


def gguf(entries=(ARCHITECTURE,), tensors=(), data=b"", version=3, alignment=32, counts=None):
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join((*entries, *tensors))
    return header + bytes(-len(header) % alignment) + data


def two_tensors(**options):
    """A sound file: an F32 and a Q8_0 tensor of 512 and 136 bytes."""
    tensors = (tensor("a"), tensor("b", (32, 4), Q8_0, 512))
    return gguf(tensors=tensors, data=bytes(range(128)) * 4 + bytes(136), **options)


@pytest.fixture
def open_file(tmp_path):
    def opened(content):
        (tmp_path / "model.gguf").write_bytes(content)
        return GgufFile(tmp_path / "model.gguf")

    return opened


# -- what is sound --


@pytest.mark.parametrize("version", [2, 3])
def test_versions(version, open_file):
    with open_file(two_tensors(version=version)) as file:
        assert file.architecture == "llama"
        assert {name: (t.shape, t.type.name) for name, t in file.tensors.items()} == {
            "a": ((4, 32), "F32"),
            "b": ((4, 32), "Q8_0"),
        }
        np.testing.assert_array_equal(file.read_rows(file.tensors["a"], 1, 3).ravel(), [*range(128)] * 2)


def test_alignment_and_order_of_tensors(open_file):
    """Data in another order than the list, with a gap, at multiples of 64."""
    tensors = (tensor("late", offset=640), tensor("early", (32, 1), offset=64))
    data = bytes(64) + b"e" * 128 + bytes(448) + b"l" * 512
    with open_file(gguf((ARCHITECTURE, ALIGNED_64), tensors, data, alignment=64)) as file:
        assert list(file.tensors) == ["late", "early"]
        for name, letter in (("late", b"l"), ("early", b"e")):
            assert set(file.read_rows(file.tensors[name], 0, 1).ravel()) == set(letter)


def test_arrays_of_arrays(open_file):
    inner = struct.pack("<IQ2I", UINT32, 2, 7, 8)
    nested = struct.pack("<IQ", ARRAY, 2) + 2 * inner
    with open_file(gguf((entry("nested", ARRAY, nested), ARCHITECTURE))) as file:
        assert file.metadata["nested"] == [[7, 8], [7, 8]]
        assert file.architecture == "llama"


def test_a_header_longer_than_one_read(open_file):
    words = [f"token {number}" * 9 for number in range(40_000)]
    array = struct.pack("<IQ", STRING, len(words)) + b"".join(map(string, words))
    blob = struct.pack("<IQ", UINT8, 3 << 20) + bytes(3 << 20)
    content = gguf((entry("words", ARRAY, array), entry("blob", ARRAY, blob), ARCHITECTURE), (tensor("a"),), bytes(512))
    with open_file(content) as file:
        assert file.metadata["words"] == words
        assert len(file.metadata["blob"]) == 3 << 20
        assert file.metadata.raw("general.architecture") == ARCHITECTURE


# -- what is not --


def nested(depth):
    return entry("nested", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQI", UINT32, 1, 7))


def alignment(value, kind=UINT32, code="<I"):
    return gguf((ARCHITECTURE, entry("general.alignment", kind, struct.pack(code, value))))


SHARED = (tensor("a"), tensor("b", offset=480))
CASES = {
    "empty": (b"", "not a GGUF"),
    "version_0": (two_tensors(version=0), "version 0"),
    "version_1": (two_tensors(version=1), "version 1"),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "big_endian_2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian"),
    "arrays_5_deep": (gguf((nested(5),)), "nests arrays"),
    "arrays_100_000_deep": (gguf((nested(100_000),)), "nests arrays"),
    "array_of_too_many_arrays": (gguf((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1 << 40)),)), "claims"),
    "array_length_wraps": (gguf((entry("k", ARRAY, struct.pack("<IQ", UINT64, 1 << 61)),)), "past the end"),
    "key_twice": (gguf((ARCHITECTURE, ARCHITECTURE)), "occurs twice"),
    "key_not_utf8": (gguf((entry(b"\xff\xfe", UINT32, b"1234"),)), "UTF-8"),
    "name_not_utf8": (gguf(tensors=(tensor(b"\xff\xfe"),), data=bytes(512)), "UTF-8"),
    "value_of_unknown_type": (gguf((entry("k", 13, b"1234"),)), "unknown type 13"),
    "alignment_0": (alignment(0), "alignment"),
    "alignment_48": (alignment(48), "alignment"),
    "alignment_huge": (alignment(1 << 31), "alignment"),
    "alignment_negative": (alignment(-32, 5, "<i"), "alignment"),
    "alignment_a_float": (alignment(32.0, 6, "<f"), "alignment"),
    "alignment_a_word": (gguf((entry("general.alignment", STRING, string("32")),)), "alignment"),
    "alignment_true": (alignment(1, BOOL, "<B"), "alignment"),
    "tensor_twice": (gguf(tensors=(tensor("a"), tensor("a", offset=512)), data=bytes(1024)), "two tensors"),
    "tensors_overlap": (gguf(tensors=SHARED, data=bytes(1024)), "overlap"),
    "tensors_overlap_in_any_order": (gguf(tensors=SHARED[::-1], data=bytes(1024)), "overlap"),
    "tensors_at_one_place": (gguf(tensors=(tensor("a"), tensor("b")), data=bytes(512)), "overlap"),
    "no_dimensions": (gguf(tensors=(tensor("a", ()),), data=bytes(512)), "0 dimensions"),
    "five_dimensions": (gguf(tensors=(tensor("a", (32, 1, 1, 1, 1)),), data=bytes(512)), "5 dimensions"),
    "dimension_0": (gguf(tensors=(tensor("a", (32, 0)),), data=bytes(512)), "positive"),
    "product_wraps_to_0": (gguf(tensors=(tensor("a", (1 << 32, 1 << 32)),), data=bytes(512)), "needs bytes"),
    "product_wraps_to_32": (gguf(tensors=(tensor("a", (32, (1 << 59) + 1)),), data=bytes(512)), "needs bytes"),
    "offset_wraps": (gguf(tensors=(tensor("a", offset=(1 << 64) - 32),), data=bytes(512)), "needs bytes"),
    "offset_odd": (gguf(tensors=(tensor("a", offset=4),), data=bytes(1024)), "multiple of the alignment"),
    "not_whole_blocks": (gguf(tensors=(tensor("a", (33, 4), Q8_0),), data=bytes(1024)), "33"),
    "type_unknown": (gguf(tensors=(tensor("a", kind=1000),), data=bytes(512)), "unknown type 1000"),
    "type_of_no_one": (gguf(tensors=(tensor("a", kind=6000),), data=bytes(512)), "unknown type 6000"),
    "one_tensor_too_many": (gguf(tensors=(tensor("a"),), data=b"", counts=(2, 1)), "damaged"),
    "too_many_tensors": (gguf(counts=(1 << 63, 1)), "more than fit"),
    "too_many_entries": (gguf(counts=(0, 1 << 63)), "more than fit"),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged(case, open_file):
    content, words = CASES[case]
    with pytest.raises(GgufError, match=words) as caught:
        open_file(content)
    assert "model.gguf" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_length_but_the_whole(open_file):
    content = two_tensors()
    for size in range(len(content)):
        with pytest.raises(GgufError):
            open_file(content[:size])
    open_file(content).close()


def test_every_byte_changed(open_file):
    """No byte of the header may lead anywhere but to a file or an error."""
    content = two_tensors()
    outcomes = set()
    for at, value in itertools.product(range(content.index(b"\1\2\3")), (0x00, 0x01, 0x7F, 0x80, 0xFF)):
        changed = bytearray(content)
        changed[at] = value
        try:
            with open_file(bytes(changed)) as file:
                for entry_ in file.tensors.values():
                    file.read_rows(entry_, 0, entry_.n_rows)
                dict(file.metadata)
            outcomes.add("read")
        except GgufError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


SPARSE = {
    "blob": entry("k", ARRAY, struct.pack("<IQ", UINT8, TERABYTE // 2)),
    "words": entry("k", ARRAY, struct.pack("<IQ", STRING, TERABYTE // 16)),
    "word": entry("k", STRING, struct.pack("<Q", TERABYTE // 2)),
    "key": struct.pack("<Q", TERABYTE // 2),
    "arrays": entry("k", ARRAY, struct.pack("<IQ", ARRAY, TERABYTE // 16)),
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_terabyte_of_nothing(case, tmp_path):
    """A hole in a file makes room for any claim; it is not read through, nor allocated."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf((SPARSE[case],)))
    os.truncate(path, TERABYTE)
    started = time.process_time()
    with pytest.raises(GgufError, match=r"sparse\.gguf"):
        GgufFile(path)
    assert time.process_time() - started < 30


def test_no_more_memory_than_the_file_has_bytes(open_file):
    content = gguf((ARCHITECTURE, entry("k", ARRAY, struct.pack("<IQ", UINT8, 5 << 20) + bytes(4 << 20))))
    tracemalloc.start()
    try:
        with pytest.raises(GgufError):
            open_file(content)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content)
    finally:
        tracemalloc.stop()


def test_a_file_that_becomes_shorter(open_file, tmp_path):
    """Where a mapping would kill the process."""
    with open_file(two_tensors()) as file:
        os.truncate(tmp_path / "model.gguf", 20)
        assert file.architecture == "llama"
        with pytest.raises(GgufError, match="ends within"):
            file.read_rows(file.tensors["a"], 0, 4)
        with pytest.raises(GgufError, match="was changed"):
            file.check_unchanged()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_no_file(make, tmp_path):
    make(tmp_path / "model.gguf")
    with pytest.raises(GgufError, match=r"model\.gguf"):
        GgufFile(tmp_path / "model.gguf")


def test_a_name_that_no_file_can_have():
    with pytest.raises(GgufError, match="cannot be opened"):
        GgufFile("model\0.gguf")


def test_a_hole_of_a_terabyte_after_the_tensors(open_file, tmp_path):
    """In an archive it takes no room; a patch or a merge in place would hash it for hours."""
    open_file(two_tensors() + bytes(100_000)).close()  # what writers pad is no fault
    (tmp_path / "model.gguf").write_bytes(two_tensors())
    os.truncate(tmp_path / "model.gguf", TERABYTE)
    with pytest.raises(GgufError, match="bytes after its last tensor"):
        GgufFile(tmp_path / "model.gguf")
