"""Models split into several files: read as one, merged into as many, the same tensors as those of the whole."""

import itertools
import os
import re
import shutil
import struct
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

import gguflora
from gguflora.architectures.base_model import read_base
from gguflora.engine import Engine, Request, Sampling
from gguflora.errors import GgufError, OutputError
from gguflora.files import atomic
from gguflora.files.gguf import GgufFile, encode_entry, part_paths
from support import builders, zoo
from support.adapters import TIED
from support.builders import Adapter
from support.oracles.gguf_files import read_metadata
from support.oracles.llama_cpp import llama_logits, quiet_llama_cpp, run_script
from support.shards import TEMPLATE, WHOLE, split

LORA = Adapter(seed=3)


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "base").mkdir()
    return split(builders.gguf_model(*WHOLE), tmp_path / "base" / "llama.gguf", 3)


def raw(path):
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def in_all(paths):
    return {name: content for path in paths for name, content in raw(path).items()}


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_the_whole(given, parts):
    with GgufFile(parts[given]) as file:
        assert file.paths == parts
        assert file.path == parts[0]
        assert file.architecture == "llama"
        assert file.size == sum(path.stat().st_size for path in parts)
        for name, (_, content) in in_all(parts).items():
            entry = file.tensors[name]
            assert file.read_rows(entry, 0, entry.n_rows).tobytes() == content
    whole = read_base(builders.gguf_model("llama", "wide"))
    assert read_base(parts[given]).shapes == whole.shapes
    assert read_base(parts[given]).n_head == whole.n_head


@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
@pytest.mark.parametrize("given", [0, 2])
def test_merge_equals_that_of_the_whole(rounding, given, parts, tmp_path):
    """Tensors by their bytes, in the files where they were; answers by their logits."""
    adapter = builders.adapter("llama", LORA, "wide")
    gguflora.merge(builders.gguf_model(*WHOLE), adapter, tmp_path / "whole.gguf", rounding=rounding)
    report = gguflora.merge(parts[given], adapter, tmp_path / "merged.gguf", rounding=rounding)
    merged = part_paths(tmp_path / "merged.gguf", 3)
    assert report.output == merged[0]
    assert report.size == sum(path.stat().st_size for path in merged)
    assert names_in(tmp_path) == sorted(["base", "whole.gguf", *(path.name for path in merged)])
    assert in_all(merged) == raw(tmp_path / "whole.gguf")
    for before, after in zip(parts, merged, strict=True):
        assert list(raw(before)) == list(raw(after))
    np.testing.assert_array_equal(llama_logits(merged[0]), llama_logits(tmp_path / "whole.gguf"))


def test_metadata_is_kept_byte_for_byte(parts, tmp_path):
    """Of every file; the first one's has the record of the merge added."""
    gguflora.merge(parts[0], builders.adapter("llama", LORA, "wide"), tmp_path / "merged.gguf")
    for before, after in zip(parts, part_paths(tmp_path / "merged.gguf", 3), strict=True):
        old, new = gguf.GGUFReader(before), gguf.GGUFReader(after)
        for key, field in old.fields.items():
            if not key.startswith("GGUF."):
                found = new.fields[key]
                assert [part.tobytes() for part in found.parts] == [part.tobytes() for part in field.parts], key
        added = {key for key in new.fields if key not in old.fields}
        assert all(key.startswith("gguflora.") for key in added)
        assert bool(added) == (before == parts[0])
        assert [tensor.data_offset % 32 for tensor in new.tensors] == [0] * len(new.tensors)
    fields = read_metadata(part_paths(tmp_path / "merged.gguf", 3)[0])
    assert fields["zebra.stripes"] == [7, -8, 9]
    assert fields["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize("alignment", [64, 4096])
def test_alignment_and_any_order(alignment, tmp_path):
    (tmp_path / "base").mkdir()
    whole = builders.gguf_model("llama", "wide", "Q8_0")
    paths = split(whole, tmp_path / "base" / "x.gguf", 2, order=lambda tensors: tensors[::-1], alignment=alignment)
    adapter = builders.adapter("llama", LORA, "wide")
    gguflora.merge(whole, adapter, tmp_path / "whole.gguf")
    gguflora.merge(paths[0], adapter, tmp_path / "merged.gguf")
    merged = part_paths(tmp_path / "merged.gguf", 2)
    assert in_all(merged) == raw(tmp_path / "whole.gguf")
    assert list(in_all(merged)) == list(in_all(paths))
    assert all(tensor.data_offset % alignment == 0 for tensor in gguf.GGUFReader(merged[0]).tensors)
    np.testing.assert_array_equal(llama_logits(merged[0]), llama_logits(tmp_path / "whole.gguf"))


def test_one_file_with_another_alignment(tmp_path):
    """Unsplit, and through llama.cpp."""
    whole = builders.gguf_model("llama", "wide", "Q4_K_M")
    (base,) = split(whole, tmp_path / "base.gguf", 1, order=lambda tensors: tensors[::-1], alignment=128)
    adapter = builders.adapter("llama", LORA, "wide")
    gguflora.merge(whole, adapter, tmp_path / "whole.gguf")
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert raw(tmp_path / "merged.gguf") == raw(tmp_path / "whole.gguf")
    logits = [llama_logits(tmp_path / name) for name in ("merged.gguf", "whole.gguf")]
    np.testing.assert_array_equal(*logits)


def test_an_added_tensor_goes_to_the_last_file(tmp_path):
    """An output weight of its own, where the embedding was both; the files count one tensor more."""
    (tmp_path / "base").mkdir()
    whole, adapter = builders.gguf_model("gemma3"), builders.trained_adapter("gemma3", TIED["embedding"])
    paths = split(whole, tmp_path / "base" / "tied.gguf", 3)
    gguflora.merge(whole, adapter, tmp_path / "whole.gguf")
    gguflora.merge(paths[0], adapter, tmp_path / "merged.gguf")
    merged = part_paths(tmp_path / "merged.gguf", 3)
    assert "output.weight" in raw(merged[2])
    assert in_all(merged) == raw(tmp_path / "whole.gguf")
    count = len(raw(tmp_path / "whole.gguf"))
    assert [read_metadata(path)["split.tensors.count"] for path in merged] == [count] * 3
    np.testing.assert_array_equal(llama_logits(merged[0]), llama_logits(tmp_path / "whole.gguf"))


def test_files_of_llama_cpps_own(tmp_path):
    """By convert_hf_to_gguf.py --split-max-tensors and llama_model_quantize with keep_split."""
    directory = builders.hf_model("llama", "wide")
    arguments = ("--outtype", "f32", "--split-max-tensors", "9")
    run_script("convert_hf_to_gguf.py", directory, "--outfile", tmp_path / "f32.gguf", *arguments)
    (first, *_) = paths = sorted(tmp_path.glob("f32-*.gguf"))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.keep_split = llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M, 1, True
    with quiet_llama_cpp():
        assert llama_cpp.llama_model_quantize(str(first).encode(), str(tmp_path / "q5").encode(), parameters) == 0
    quantized = sorted(tmp_path.glob("q5-*.gguf"))
    assert len(quantized) == len(paths) > 1
    adapter = builders.adapter("llama", LORA, "wide")
    gguflora.merge(builders.gguf_model("llama", "wide", "Q5_K_M"), adapter, tmp_path / "whole.gguf")
    gguflora.merge(quantized[1], adapter, tmp_path / "merged.gguf")
    merged = part_paths(tmp_path / "merged.gguf", len(paths))
    assert in_all(merged) == raw(tmp_path / "whole.gguf")
    np.testing.assert_array_equal(llama_logits(merged[0]), llama_logits(tmp_path / "whole.gguf"))


def test_convert_and_inspect(parts, tmp_path):
    adapter = builders.adapter("llama", LORA, "wide")
    whole = builders.gguf_model("llama", "wide", "F32")
    gguflora.convert(adapter, parts[1], tmp_path / "split.gguf")
    gguflora.convert(adapter, whole, tmp_path / "whole.gguf")
    assert raw(tmp_path / "split.gguf") == raw(tmp_path / "whole.gguf")
    inspected = [gguflora.inspect(adapter, base=path).to_dict() for path in (parts[2], builders.gguf_model(*WHOLE))]
    assert inspected[0] == {**inspected[1], "base": inspected[0].get("base")}


@pytest.mark.parametrize("given", [0, 1, 2])
def test_run_and_compare_from_any_part(given, parts, tmp_path):
    """llama.cpp opens a split model by its first file only."""
    lora = tmp_path / "lora.gguf"
    gguflora.convert(builders.adapter("llama", LORA, "wide"), builders.gguf_model(*WHOLE), lora)
    with Engine(parts[given], adapters={"a": lora}, n_ctx=64, threads=1) as engine:
        request = Request([5, 6, 7], engine.adapter_set("a"), max_tokens=4, sampling=Sampling(temperature=0))
        tokens = [token for piece in engine.submit(request) for token in piece.tokens]
    with Engine(builders.gguf_model(*WHOLE), adapters={"a": lora}, n_ctx=64, threads=1) as engine:
        assert [token for piece in engine.submit(request) for token in piece.tokens] == tokens
    text = tmp_path / "text"
    text.write_text("some words of a text " * 20)
    report = gguflora.compare(parts[given], parts[given], [(lora, 1.0)], text=text, n_ctx=32)
    assert report.perplexities["base"] == report.perplexities["merged"]


def test_names():
    names = [path.name for path in part_paths(Path("m.gguf"), 2)]
    assert names == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for given in ("m", "m-00002-of-00002.gguf", "m-00001-of-00009.gguf"):
        assert [path.name for path in part_paths(Path(given), 2)] == names
    assert part_paths(Path("x/m-00001-of-00003.gguf"), 1) == (Path("x/m-00001-of-00003.gguf"),)


# -- what does not fit together --


def patch(path, key, code, value):
    """Overwrite the value of a number in the metadata."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
    struct.pack_into(code, data, at, value)
    path.write_bytes(data)


def assert_refused(paths, *words):
    for path in paths:
        with pytest.raises(GgufError, match=".*".join(map(re.escape, words))):
            GgufFile(path)


def test_a_missing_part(parts):
    parts[1].unlink()
    assert_refused([parts[0], parts[2]], parts[1].name, "does not exist", "3 files")


def test_a_part_twice(parts):
    shutil.copy(parts[0], parts[1])
    assert_refused([parts[0], parts[2]], parts[1].name, "split.no is 0", "expected 1")


def test_a_part_under_another_name(parts):
    for name in ("model.gguf", "llama-00001-of-00002.gguf", "llama-1-of-3.gguf", "llama-00002-of-00003.gguf"):
        shutil.copy(parts[0], parts[0].with_name(name))
        assert_refused([parts[0].with_name(name)], name, "-00001-of-00003.gguf")


def test_a_part_with_the_tensors_of_another(parts):
    shutil.copy(parts[0], parts[1])
    patch(parts[1], "split.no", "<H", 1)
    assert_refused(parts, parts[1].name, "as", "does; are they parts of one model")


def test_a_part_of_a_larger_model(parts, tmp_path):
    (tmp_path / "other").mkdir()
    other = split(zoo.gguf_model("qwen3moe"), tmp_path / "other" / "llama.gguf", 3)
    shutil.copy(other[2], parts[2])
    assert_refused(parts, "split.tensors.count")


@pytest.mark.parametrize(("key", "value"), [("split.no", 7), ("split.count", 2), ("split.tensors.count", 5)])
def test_lying_numbers(key, value, parts):
    patch(parts[1], key, "<i" if "tensors" in key else "<H", value)
    assert_refused(parts[:1], parts[1].name, key)


def test_a_damaged_part(parts):
    parts[2].write_bytes(parts[2].read_bytes()[:-40])
    assert_refused(parts, parts[2].name, "damaged or incomplete")


# -- all files or none --


def test_failure_leaves_no_file(parts, tmp_path, monkeypatch):
    """Whichever of the files cannot be given its name."""
    adapter = builders.adapter("llama", LORA, "wide")
    for force, broken in itertools.product((False, True), (1, 2, 3)):
        calls = itertools.count(1)
        name = "replace" if force else "link"
        owner = atomic._Draft if name == "link" else Path
        original = getattr(owner, name)

        def fails(self, path, calls=calls, broken=broken, original=original):
            if next(calls) == broken:
                raise OSError(5, "a broken disk")
            return original(self, path)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails)
            with pytest.raises(OutputError, match="a broken disk"):
                gguflora.merge(parts[0], adapter, tmp_path / "merged.gguf", force=force)
        assert names_in(tmp_path) == ["base"]


def test_existing_files(parts, tmp_path):
    adapter = builders.adapter("llama", LORA, "wide")
    merged = part_paths(tmp_path / "merged.gguf", 3)
    merged[1].write_bytes(b"precious")
    with pytest.raises(OutputError, match=merged[1].name):
        gguflora.merge(parts[0], adapter, tmp_path / "merged.gguf")
    assert names_in(tmp_path) == ["base", merged[1].name]
    gguflora.merge(parts[0], adapter, tmp_path / "merged.gguf", force=True)
    first = in_all(merged)
    gguflora.merge(parts[0], adapter, merged[2], force=True)
    assert in_all(merged) == first
    with pytest.raises(OutputError, match="is also an input"):
        gguflora.merge(parts[0], adapter, parts[0].with_name("llama.gguf"), force=True)


def test_record_of_a_merge(parts, tmp_path):
    gguflora.merge(parts[0], builders.adapter("llama", LORA, "wide"), tmp_path / "merged.gguf")
    first, second, _ = part_paths(tmp_path / "merged.gguf", 3)
    assert "gguflora.version" in read_metadata(first)
    assert set(read_metadata(second)) == {"split.no", "split.count", "split.tensors.count"}
    assert encode_entry("gguflora.version", gguflora.__version__) in first.read_bytes()


# -- what happens in the meantime --


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("harm", ["touched", "written", "shortened"])
def test_a_base_that_changes_during_the_merge(harm, n_parts, tmp_path):
    """By size and time, also where a mapping would kill the process."""
    (tmp_path / "base").mkdir()
    paths = split(builders.gguf_model(*WHOLE), tmp_path / "base" / "llama.gguf", n_parts)

    def disturb(done, total):
        status = paths[-1].stat()
        if harm == "shortened":
            os.truncate(paths[-1], status.st_size // 2)
        elif harm == "written":
            with paths[-1].open("ab") as file:
                file.write(b"more")
        else:
            os.utime(paths[-1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    with pytest.raises(GgufError, match=paths[-1].name):
        gguflora.merge(
            paths[0], builders.adapter("llama", LORA, "wide"), tmp_path / "merged.gguf", progress=disturb, threads=2
        )
    assert names_in(tmp_path) == ["base"]


@pytest.mark.parametrize("n_parts", [1, 3])
def test_two_merges_to_one_target(n_parts, tmp_path):
    """The second to finish is refused, and the first one's files stay as they are."""
    (tmp_path / "base").mkdir()
    paths = split(builders.gguf_model(*WHOLE), tmp_path / "base" / "llama.gguf", n_parts)
    adapter, other = (builders.adapter("llama", Adapter(seed=seed), "wide") for seed in (3, 4))
    merged = part_paths(tmp_path / "merged.gguf", n_parts)
    once = []

    def merge_too(done, total):
        if not once:
            once.append(gguflora.merge(paths[0], other, tmp_path / "merged.gguf", threads=1))
            once.append([path.read_bytes() for path in merged])

    with pytest.raises(OutputError, match="meantime"):
        gguflora.merge(paths[0], adapter, tmp_path / "merged.gguf", progress=merge_too, threads=1)
    assert [path.read_bytes() for path in merged] == once[1]
    assert names_in(tmp_path) == sorted(["base", *(path.name for path in merged)])


@pytest.mark.parametrize(("how", "reason"), [("symlink_to", "is a link to"), ("hardlink_to", "is also an input")])
def test_a_part_of_the_base_under_another_name_is_no_target(how, reason, parts, tmp_path):
    for index in range(3):
        (tmp_path / str(index)).mkdir()
        merged = part_paths(tmp_path / str(index) / "merged.gguf", 3)
        getattr(merged[index], how)(parts[index])
        before = [path.read_bytes() for path in parts]
        with pytest.raises(OutputError, match=reason):
            gguflora.merge(parts[0], builders.adapter("llama", LORA, "wide"), merged[0], force=True)
        assert [path.read_bytes() for path in parts] == before
