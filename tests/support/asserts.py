"""What a merge or a conversion did to a model, and that it did the same as another."""

import gguf
import numpy as np

import gguflora
from support import builders
from support.oracles.gguf_files import lora_changes, read_metadata, read_tensors
from support.oracles.peft import merged_gguf


def merged_changes(arch, spec):
    """What PEFT's merge does to each GGUF tensor, where it does anything."""
    base = read_tensors(builders.gguf_model(arch))
    merged = read_tensors(merged_gguf(builders.hf_model(arch), builders.adapter(arch, spec)))
    changes = {name: merged[name].astype(np.float64) - base[name] for name in base}
    return {name: change for name, change in changes.items() if change.any()}


def assert_same_changes(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].shape == change.shape, name
        error = np.linalg.norm(found[name] - change) / np.linalg.norm(change)
        assert error <= tolerance, f"{name}: relative error of the change is {error:.1e}"


def assert_same_content(one, other):
    """The same metadata and tensors, in whatever order."""
    assert read_metadata(one) == read_metadata(other)
    found, expected = (
        {t.name: (t.tensor_type, t.data) for t in gguf.GGUFReader(path).tensors} for path in (one, other)
    )
    assert found.keys() == expected.keys()
    for name, (qtype, data) in expected.items():
        assert found[name][0] == qtype
        np.testing.assert_array_equal(found[name][1], data, err_msg=name)


def assert_equals_peft(arch, adapter, tmp_path, merged=1e-4, converted=1e-5):
    """Merge and conversion change the same tensors as PEFT, equally; the others keep their bytes."""
    base = builders.gguf_model(arch)
    expected = changes(base, merged_gguf(builders.hf_model(arch), adapter))
    assert expected, "the adapter must matter"
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, merged)
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected, converted)


def changes(base, merged):
    """What a merge did to each tensor, where it did anything."""
    before, after = (
        {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors} for path in (base, merged)
    )
    assert before.keys() == after.keys()
    found = {name: after[name].astype(np.float64) - before[name] for name in before}
    return {name: change for name, change in found.items() if change.any()}


def assert_close(found, expected, tolerance, what):
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= tolerance, f"{what}: relative error of the change is {error:.1e}"


def assert_same(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        assert np.linalg.norm(found[key] - delta) <= tolerance * np.linalg.norm(delta), key
