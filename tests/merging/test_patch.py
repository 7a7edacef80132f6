"""A merge written as a patch, applied to its base, is the merged file; anything else is an error."""

import contextlib
import hashlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguflora
from gguflora.errors import AdapterError, GgufloraError, MismatchError, OutputError, PatchError
from gguflora.files.gguf import part_paths
from gguflora.merging.patch.coding import (
    PLAIN,
    Grain,
    backward,
    encode,
    forward,
)
from gguflora.merging.patch.format import (
    MAX_LENGTH,
    Patch,
    checksum,
    open_patch,
    write_patch_file,
)
from gguflora.quants.types import TYPES
from support import builders
from support.adapters import resized
from support.builders import Adapter
from support.oracles.gguf_files import read_tensors
from support.shards import split

WEAK = Adapter(seed=4)
OUTTYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS"]


def model(outtype="Q4_K_M", arch="llama"):
    return builders.gguf_model(arch, "wide", outtype)


def lora(spec=WEAK, arch="llama"):
    return builders.adapter(arch, spec, "wide")


def check(base, adapters, folder, **options):
    """Patch and merge with the same arguments; returns the patch."""
    gguflora.merge(base, adapters, folder / "merged.gguf", **options)
    report = gguflora.merge(base, adapters, patch=folder / "a.patch", **options)
    applied = gguflora.apply_patch(base, folder / "a.patch", folder / "out.gguf")
    assert (folder / "out.gguf").read_bytes() == (folder / "merged.gguf").read_bytes()
    assert report.written == (folder / "a.patch").stat().st_size == applied.patch_size
    assert report.size == applied.size == (folder / "merged.gguf").stat().st_size
    assert applied.facts.merged_sha256 == hashlib.sha256((folder / "merged.gguf").read_bytes()).hexdigest()
    return folder / "a.patch"


# -- the same bytes as the merge --


@pytest.mark.parametrize("rounding", ["adaptive", "nearest"])
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_makes_the_merged_file(outtype, rounding, tmp_path):
    check(model(outtype), [(lora(), 0.25)], tmp_path, rounding=rounding)


@pytest.mark.parametrize("outtype", ["q8_0", "f16"])
def test_tensors_of_another_type(outtype, tmp_path):
    check(model(), lora(), tmp_path, outtype=outtype)


def test_new_tokens(tmp_path):
    adapter, _ = resized("llama")
    check(builders.gguf_model("llama"), adapter, tmp_path)


def test_an_output_weight_of_its_own(tmp_path):
    check(model(arch="gemma3"), lora(Adapter(targets=("embed_tokens",), seed=1), "gemma3"), tmp_path)
    assert "output.weight" in read_tensors(tmp_path / "out.gguf")


def test_a_second_merge_is_recorded_after_the_first(tmp_path):
    gguflora.merge(model(), lora(), tmp_path / "first.gguf")
    check(tmp_path / "first.gguf", lora(Adapter(seed=5)), tmp_path)


def test_nothing_to_merge(tmp_path):
    patch = check(model(), [(lora(), 0.0)], tmp_path)
    assert patch.stat().st_size < 2000


def test_does_not_carry_what_the_base_has(tmp_path):
    """The tokenizer stays at home."""
    path = check(model(), [(lora(Adapter(targets=("q_proj",))), 0.1)], tmp_path)
    with open_patch(path) as patch:
        anew = sum(record.length for record in patch.records if record.source is None)
        copied = sum(last - first for first, last, _ in patch.copies)
    assert anew < 1000
    assert copied > 0.8 * model().stat().st_size


def test_does_not_depend_on_threads(tmp_path):
    for threads in (1, 2, 5):
        gguflora.merge(model(), lora(), patch=tmp_path / f"{threads}", threads=threads)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    gguflora.apply_patch(model(), tmp_path / "5", tmp_path / "one.gguf", threads=1)
    gguflora.apply_patch(model(), tmp_path / "1", tmp_path / "five.gguf", threads=5)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "five.gguf").read_bytes()


@pytest.mark.parametrize("options", [{}, {"outtype": "q8_0"}])
def test_a_split_base(options, tmp_path):
    (tmp_path / "base").mkdir()
    parts = split(model(), tmp_path / "base" / "model.gguf", 3)
    gguflora.merge(parts[0], [(lora(), 0.25)], tmp_path / "merged.gguf", **options)
    report = gguflora.merge(parts[2], [(lora(), 0.25)], patch=tmp_path / "a.patch", **options)
    applied = gguflora.apply_patch(parts[1], tmp_path / "a.patch", tmp_path / "out.gguf")
    merged, out = part_paths(tmp_path / "merged.gguf", 3), part_paths(tmp_path / "out.gguf", 3)
    assert [path.read_bytes() for path in out] == [path.read_bytes() for path in merged]
    assert applied.output == out[0]
    assert applied.facts.merged_sizes == tuple(path.stat().st_size for path in merged)
    assert report.size == applied.size == sum(applied.facts.merged_sizes)
    with pytest.raises(MismatchError):
        gguflora.apply_patch(model(), tmp_path / "a.patch", tmp_path / "whole.gguf")
    with pytest.raises(OutputError, match="already exists"):
        gguflora.apply_patch(parts[0], tmp_path / "a.patch", tmp_path / "out.gguf")


# -- what is refused --


def test_another_base(tmp_path):
    gguflora.merge(model(), lora(), patch=tmp_path / "a.patch")
    other = tmp_path / "other.gguf"
    content = bytearray(model().read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    for base in (other, model("Q8_0")):
        with pytest.raises(MismatchError) as error:
            gguflora.apply_patch(base, tmp_path / "a.patch", tmp_path / "out.gguf")
        assert model().name in str(error.value)
        assert base.name in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"a.patch", "other.gguf"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base and a patch of a few kilobytes."""
    folder = tmp_path_factory.mktemp("small")
    adapter = builders.adapter("llama", Adapter(targets=("k_proj",)))
    gguflora.merge(builders.gguf_model("llama", "small", "Q8_0"), adapter, patch=folder / "a.patch")
    return builders.gguf_model("llama", "small", "Q8_0"), (folder / "a.patch").read_bytes()


def refused(base, content, folder, match=None):
    (folder / "bad.patch").write_bytes(content)
    with pytest.raises(PatchError, match=match):
        gguflora.apply_patch(base, folder / "bad.patch", folder / "out.gguf")
    assert [path.name for path in folder.iterdir()] == ["bad.patch"]


def test_every_damaged_byte_is_found(small, tmp_path):
    base, content = small
    places = {*range(64), *range(64, len(content), max(1, len(content) // 250)), len(content) - 1}
    for place in sorted(places):
        bad = bytearray(content)
        bad[place] ^= 1 << place % 8
        refused(base, bad, tmp_path)


def test_every_missing_byte_is_found(small, tmp_path):
    base, content = small
    for size in (0, 3, 8, 63, 64, 65, 400, len(content) // 2, len(content) - 1):
        refused(base, content[:size], tmp_path)
    refused(base, content + b"\0", tmp_path, "its size")


def lie(content, folder, edit):
    """A patch with right checksums and wrong contents."""
    (folder / "good.patch").write_bytes(content)
    with open_patch(folder / "good.patch") as patch:
        output = io.BytesIO()
        write_patch_file(output, edit(patch))
    (folder / "good.patch").unlink()
    return output.getvalue()


def first_record(**changes):
    return lambda patch: replace(patch, records=[replace(patch.records[0], **changes), *patch.records[1:]])


LIES = {
    "gap": lambda patch: replace(patch, records=patch.records[1:]),
    "twice": lambda patch: replace(patch, records=[*patch.records, patch.records[0]]),
    "past the base": lambda patch: replace(patch, copies=[(first, last + 1, to) for first, last, to in patch.copies]),
    "backwards": lambda patch: replace(patch, copies=[(last, first, to) for first, last, to in patch.copies]),
    "source": first_record(source=2**63),
    "huge": first_record(length=2**32 - 1),
    "width": first_record(grain=Grain(34, 3)),
    "block": first_record(grain=Grain(0, 8)),
    "size": lambda patch: replace(patch, facts=replace(patch.facts, merged_sizes=(1 << 60,))),
    "kind": lambda patch: replace(patch, facts=replace(patch.facts, merged_sha256=1)),
    "hash": lambda patch: replace(patch, facts=replace(patch.facts, merged_sha256="0" * 64)),
    "record's hash": first_record(new=1),
}


@pytest.mark.parametrize("edit", LIES.values(), ids=LIES)
def test_lies_are_found(edit, small, tmp_path):
    base, content = small
    refused(base, lie(content, tmp_path, edit), tmp_path)


def test_a_bomb_does_not_go_off():
    ones = np.ones(MAX_LENGTH, np.uint8)
    bomb = encode(np.zeros_like(ones), ones, PLAIN)
    with pytest.raises(PatchError, match="does not end"):
        forward((100).to_bytes(4, "little") + bomb[4:], np.zeros(100, np.uint8), PLAIN)


@settings(max_examples=300)
@given(st.binary(max_size=400), st.integers(1, 300))
def test_any_payload_is_decoded_or_refused(payload, length):
    old = np.zeros(length, np.uint8)
    with contextlib.suppress(PatchError):
        assert len(forward(payload, old, PLAIN)) == length


def test_no_patch(tmp_path):
    for content in (b"", b"GGUF" * 30):
        refused(model(), content, tmp_path, "is not a patch")
    with pytest.raises(PatchError, match="cannot be opened"):
        gguflora.apply_patch(model(), tmp_path / "none.patch", tmp_path / "out.gguf")


def test_targets(tmp_path):
    """Where the result goes is said once, and nothing is overwritten unasked."""
    for given_ways in ({}, {"out": tmp_path / "out", "patch": tmp_path / "patch"}):
        with pytest.raises(OutputError, match="exactly one"):
            gguflora.merge(model(), lora(), **given_ways)
    gguflora.merge(model(), lora(), patch=tmp_path / "a.patch")
    with pytest.raises(OutputError, match="already exists"):
        gguflora.merge(model(), lora(), patch=tmp_path / "a.patch")
    before = (tmp_path / "a.patch").read_bytes()
    with pytest.raises(OutputError, match="also an input"):
        gguflora.apply_patch(model(), tmp_path / "a.patch", tmp_path / "a.patch", force=True)
    assert (tmp_path / "a.patch").read_bytes() == before
    report = gguflora.merge(model(), lora(), patch=tmp_path / "b.patch", dry_run=True)
    assert report.written == 0
    assert not (tmp_path / "b.patch").exists()


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(AdapterError):
        gguflora.merge(model(), [(lora(), math.inf)], patch=tmp_path / "a.patch")
    with pytest.raises(GgufloraError):
        gguflora.merge(model("F16"), [(lora(), 1e38)], patch=tmp_path / "a.patch")
    assert list(tmp_path.iterdir()) == []


# -- the coding --


@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.49, 0.51, 1.0])
@pytest.mark.parametrize("name", [kind.name for kind in TYPES.values()])
def test_coding_comes_back(name, share):
    grain = Grain.from_type(next(kind for kind in TYPES.values() if kind.name == name))
    rng = np.random.default_rng(1)
    old = rng.integers(0, 256, grain.block * 4 * 700, np.uint8)
    new = np.where(rng.random(len(old)) < share, rng.integers(0, 256, len(old), np.uint8), old)
    payload = encode(old, new, grain)
    np.testing.assert_array_equal(forward(payload, old, grain), new)
    np.testing.assert_array_equal(backward(payload, new, grain), old)


@pytest.mark.parametrize("distance", [1, 254, 255, 256, 509, 510, 511, 100_000])
def test_coding_of_far_changes(distance):
    old, new = np.zeros(200_001, np.uint8), np.zeros(200_001, np.uint8)
    new[distance - 1 :: distance] = 7
    np.testing.assert_array_equal(forward(encode(old, new, PLAIN), old, PLAIN), new)


@pytest.mark.parametrize(("name", "width"), [("Q4_K", 4), ("Q6_K", 4), ("Q8_0", 8), ("Q2_K", 2), ("F16", 16)])
def test_coding_subtracts_field_by_field(name, width):
    """A code that goes one up costs the same wherever it was: no borrow, no carry."""
    grain = Grain.from_type(next(kind for kind in TYPES.values() if kind.name == name))
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 1 << width, grain.block * 8 // width * (80_000 // grain.block))
    moved = (codes + 1) % (1 << width)
    per_byte = max(1, 8 // width)

    def packed(values):
        if width == 16:
            return values.astype("<u2").view(np.uint8)
        shifts = np.arange(per_byte) * width
        return (values.reshape(-1, per_byte) << shifts).sum(axis=1).astype(np.uint8)

    assert grain.width == width
    payload = encode(packed(codes), packed(moved), grain)
    assert len(payload) < len(packed(codes)) / 7  # one symbol, one bit for each byte


@pytest.mark.parametrize("moved", [0.01, 0.04, 0.1, 0.3])
def test_size_is_near_the_entropy(moved):
    """Codes of four bits, some of which go one up or down."""
    grain = Grain.from_type(next(kind for kind in TYPES.values() if kind.name == "Q4_K"))
    rng = np.random.default_rng(3)
    n_codes = grain.block * 2 * 4000
    codes = rng.integers(1, 15, n_codes)
    steps = rng.choice([-1, 0, 1], n_codes, p=[moved / 2, 1 - moved, moved / 2])
    old, new = ((c[0::2] | c[1::2] << 4).astype(np.uint8) for c in (codes, codes + steps))
    bits = -(moved * math.log2(moved / 2) + (1 - moved) * math.log2(1 - moved))
    assert len(encode(old, new, grain)) < 1.1 * n_codes * bits / 8


# -- reports and the command line --


def test_facts(tmp_path):
    gguflora.merge(model(), [(lora(), 0.5)], patch=tmp_path / "a.patch", seed=3)
    with open_patch(tmp_path / "a.patch") as patch:
        assert isinstance(patch, Patch)
        facts = patch.facts
        assert all(checksum(np.frombuffer(b"", np.uint8)) != record.new for record in patch.records)
    assert facts.base_name == model().name
    assert facts.base_sha256 == hashlib.sha256(model().read_bytes()).hexdigest()
    assert (facts.rounding, facts.seed) == ("adaptive", 3)
    assert [scale for _, _, scale in facts.adapters] == [0.5]


def test_command_line(tmp_path):
    command = [sys.executable, "-P", "-m", "gguflora"]
    made = [*command, "merge", model(), "--lora", lora(), "--patch", tmp_path / "a.patch"]
    assert "% of the model" in subprocess.run(made, check=True, capture_output=True, text=True).stdout
    applied = [*command, "apply-patch", model(), tmp_path / "a.patch", "-o", tmp_path / "out.gguf", "--json"]
    report = json.loads(subprocess.run(applied, check=True, capture_output=True).stdout)
    assert report["merged_sha256"] == hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest()
    assert report["adapters"][0]["scale"] == 1.0
    both = subprocess.run([*command, "merge", model(), "--lora", lora()], check=False, capture_output=True, text=True)
    assert both.returncode == 2
    assert "exactly one of" in both.stderr
