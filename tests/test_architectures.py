"""Every weight of a random model of each architecture, where llama.cpp's converter has put it; LoRAs on all of them."""

import architecture_models as zoo
import numpy as np
import oracles
import pytest

import gguflora
from gguflora.architectures import KNOWN, can_untie, pieces_of
from gguflora.base_model import read_base
from gguflora.deltas import Replace
from gguflora.placement import Placed, flat_shape

TRANSPOSED = {"gpt2": ".c_", "gptoss": ".experts.", "llama4": ".experts."}
"""Weights that the Hugging Face model keeps as (n_in, n_out)."""

ELSEWHERE = ("A_log", "pooler.dense.weight", "pooler.dense.bias")
"""Weights that GGUF holds as other values, or not at all."""


def as_matrices(name, weights):
    """Matrices (n_out, n_in) by the names that `pieces_of` wants: experts one by one, vectors as columns."""
    for key, values in weights.items():
        is_stack = values.ndim == 3 and "conv1d" not in key
        matrices = {f"{key}.{e}": values[e] for e in range(len(values))} if is_stack else {key: values}
        for path, matrix in matrices.items():
            transposed = matrix.ndim == 2 and TRANSPOSED.get(name, " ") in key and not key.endswith("bias")
            yield path, matrix.T if transposed else matrix.reshape(len(matrix), -1)


def assert_pieces_equal(name, gguf, weights):
    """Each weight's pieces hold each of its values once, and are what the converter wrote; nothing is left over."""
    base, tensors = read_base(gguf), zoo.tensors(gguf)
    untouched = {tensor: np.ones(values.shape, bool) for tensor, values in tensors.items()}
    for path, matrix in as_matrices(name, weights):
        pieces = pieces_of(base, path)
        if path.endswith(ELSEWHERE) or (path == "lm_head.weight" and not can_untie(base)):
            assert not pieces, path
            continue
        assert pieces, f"{path} has no place"
        count = np.zeros(matrix.shape, int)
        if base.is_tied and pieces[0].tensor == "output.weight":
            continue
        for piece in pieces:
            placed = Placed(path, Replace(matrix), piece)
            rows = slice(piece.first, piece.first + placed.shape[0])
            stored = tensors[piece.tensor].reshape(flat_shape(tensors[piece.tensor].shape))
            np.testing.assert_allclose(stored[rows], placed.take(matrix) + piece.shift, atol=1e-6, err_msg=path)
            untouched[piece.tensor].reshape(stored.shape)[rows] = False
            back = np.zeros(matrix.shape)
            placed.put(stored[rows], back)
            count += back != 0
        assert count.max() == 1, path
        assert count.mean() > 0.99, path  # a few values may be 0
    left = {tensor for tensor, mask in untouched.items() if mask.any()}
    assert all(tensor.endswith("ssm_a") for tensor in left), f"no weight lies in {left}"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_checkpoints_weights_lie_where_the_converter_puts_them(name):
    assert_pieces_equal(name, zoo.gguf_model(name), zoo.saved_weights(name))


@pytest.mark.parametrize("name", zoo.HAS_CLASS)
def test_modules_weights_lie_where_the_converter_puts_them(name):
    """Under the names that PEFT sees, which are not always those of the checkpoint."""
    assert_pieces_equal(name, zoo.gguf_model(name), zoo.weights_in_memory(name))


def test_every_known_architecture_has_a_model():
    assert {read_base(zoo.gguf_model(name)).architecture for name in zoo.MODELS} == set(KNOWN)


def lora_of(name, **options):
    """PEFT's merge of a random LoRA on all linear layers: its directory, and the merged model by the converter."""
    path = zoo.checkpoint(name).parent / f"{name}-lora"
    model = zoo.peft_model(name, **options)
    model.save_pretrained(path / "adapter")
    merged = zoo.save(name, model.merge_and_unload(), path / "merged")
    return path / "adapter", zoo.to_gguf(name, merged)


@pytest.mark.parametrize("name", zoo.HAS_CLASS)
def test_lora_on_every_linear_layer(name, tmp_path):
    adapter, merged = lora_of(name)
    base, expected = zoo.tensors(zoo.gguf_model(name)), zoo.tensors(merged)
    changes = {key: expected[key] - values for key, values in base.items() if (expected[key] != values).any()}
    gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "merged.gguf")
    found = zoo.tensors(tmp_path / "merged.gguf")
    assert found.keys() == base.keys()
    for key, values in base.items():
        if key in changes:
            assert_close(found[key] - values, changes[key], 1e-4, key)
        else:
            np.testing.assert_array_equal(found[key], values, err_msg=key)
    gguflora.convert(adapter, zoo.gguf_model(name), tmp_path / "lora.gguf", outtype="f32")
    factors = oracles.lora_changes(tmp_path / "lora.gguf")
    assert factors.keys() == changes.keys()
    for key, change in changes.items():
        assert_close(factors[key], change, 1e-5, key)


def assert_close(found, expected, tolerance, what):
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= tolerance, f"{what}: relative error of the change is {error:.1e}"
