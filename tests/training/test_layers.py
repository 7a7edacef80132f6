"""Products with packed weights of every quant type, and the methods' layers, against torch and PEFT on floats."""

import numpy as np
import peft
import pytest
import torch

from gguflora import quants
from gguflora.quants.types import TYPES
from gguflora.training import layers as layers_module
from gguflora.training import packed as packed_module
from gguflora.training.adapters import add_loras, choose_modules
from gguflora.training.batches import Batches
from gguflora.training.layers import PackedEmbedding, PackedLinear
from gguflora.training.options import LoraShape
from gguflora.training.packed import PackedMatrix, PackedRows
from gguflora.training.samples import Sample
from support import zoo
from support.training import (
    TOKENS,
    assert_trains_as_peft,
    in_peft,
    own_model,
    packed,
    pefts_parameters,
    relative,
    with_loras,
)

N_OUT, N_IN = 300, 512


def matrix_of(name, order=None):
    """A random matrix in a quant type, and its floats in the order of the weight."""
    kind = quants.resolve_type(name)
    rng = np.random.default_rng(1)
    imatrix = np.ones(N_IN, np.float32) if kind.needs_imatrix else None
    rows = quants.quantize(rng.standard_normal((N_OUT, N_IN)).astype(np.float32), kind, imatrix=imatrix).view(np.uint8)
    floats = torch.from_numpy(
        quants.dequantize(rows.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8)), kind)
    )
    parts = (PackedRows(rows[:120], kind), PackedRows(rows[120:], kind))
    if order is None:
        return PackedMatrix(parts, N_OUT, N_IN), floats
    stored = torch.from_numpy(order)
    place = torch.argsort(stored)
    return PackedMatrix(parts, N_OUT, N_IN, stored, place), floats[place]


@pytest.mark.parametrize("name", [kind.name for kind in TYPES.values()])
@pytest.mark.parametrize("is_permuted", [False, True])
def test_products_and_their_gradients(name, is_permuted, monkeypatch):
    check_products(name, is_permuted, monkeypatch)


@pytest.mark.parametrize("by_onednn", [False, True])
def test_either_library_multiplies(by_onednn, monkeypatch):
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(layers_module, "_HAS_FASTER_PRODUCT", by_onednn)
    check_products("Q4_K", True, monkeypatch)


def test_pages_of_the_file_are_given_back():
    model = packed(zoo.gguf_model("llama"))
    ranges = []
    real = packed_module.forget_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "forget_pages", lambda *given: ranges.append(given[1:]) or real(*given))
        before = model.hidden(torch.tensor([TOKENS[0]]))
    matrices = [module.matrix for module in model.linears().values()]
    parts = [(part.offset, part.offset + part.packed.nbytes) for matrix in matrices for part in matrix.parts]
    assert sorted(ranges) == sorted(parts)
    content = model.packed.path.read_bytes()
    for matrix in matrices:
        for part in matrix.parts:
            assert part.packed.tobytes() == content[part.offset : part.offset + part.packed.nbytes]
    torch.testing.assert_close(model.hidden(torch.tensor([TOKENS[0]])), before, rtol=0, atol=0)


def check_products(name, is_permuted, monkeypatch):
    """A product with a packed matrix, and the gradient of its input, against torch's with floats."""
    monkeypatch.setattr(packed_module, "PANEL_WEIGHTS", 64 * N_IN)  # several panels
    matrix, floats = matrix_of(name, np.random.default_rng(2).permutation(N_OUT) if is_permuted else None)
    layer = PackedLinear(matrix, torch.arange(N_OUT) / 10, torch.float32)
    x = torch.randn(2, 7, N_IN, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    found, expected = layer(x), torch.nn.functional.linear(other, floats, torch.arange(N_OUT) / 10)
    assert relative(found, expected) < 1e-6
    weights = torch.randn(2, 7, N_OUT)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert relative(x.grad, other.grad) < 1e-6
    tokens = torch.tensor([[3, 299, 3], [0, 150, 7]])
    torch.testing.assert_close(PackedEmbedding(matrix)(tokens), floats[tokens], rtol=0, atol=0)


def test_products_in_bf16():
    matrix, floats = matrix_of("Q4_K")
    x = torch.randn(9, N_IN, requires_grad=True)
    found = PackedLinear(matrix, None, torch.bfloat16)(x)
    found.sum().backward()
    assert 1e-5 < relative(found, x @ floats.t()) < 1e-2
    assert 1e-6 < relative(x.grad, floats.sum(0).expand(9, -1)) < 1e-2


def test_nothing_dequantized_stays():
    matrix, _ = matrix_of("Q8_0")
    layer = PackedLinear(matrix, None, torch.float32)
    x = torch.randn(4, N_IN, requires_grad=True)
    layer(x).sum().backward()
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held == 0
    assert sum(part.packed.nbytes for part in matrix.parts) < N_OUT * N_IN * 2


@pytest.mark.parametrize(
    "shape",
    [LoraShape(4, 8, rslora=True), LoraShape(4, 6, dora=True), LoraShape(4, 6, dora=True, rslora=True)],
    ids=["rsLoRA", "DoRA", "DoRA and rsLoRA"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_methods_train_as_peft_does(name, shape):
    model = packed(zoo.gguf_model(name))
    layers = with_loras(model, shape)
    assert_trains_as_peft(model, layers, in_peft(own_model(name), layers, shape))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_first_factors_are_those_of_peft(init):
    shape = LoraShape(4, 8, init=init)
    model = packed(zoo.gguf_model("llama"))
    tokens = torch.tensor([TOKENS[0]])
    before = model.logits(model.hidden(tokens))
    layers = add_loras(model, list(choose_modules(model, ("all",), None)), shape, 0)
    torch.testing.assert_close(model.logits(model.hidden(tokens)), before, rtol=1e-4, atol=1e-4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(layers), init_lora_weights=init)
    adapted = peft.get_peft_model(own_model("llama"), config)
    for name, layer in layers.items():
        a, b = pefts_parameters(adapted, name)
        assert relative(layer.lora_b @ layer.lora_a, b @ a) < 1e-4, name
        assert relative(layer.lora_a.abs(), a.abs()) < 1e-3, name


def test_steps_hold_every_sample_once_an_epoch_in_an_order_of_the_seed():
    samples = [Sample(tuple(range(n + 2)), (False,) + (True,) * (n + 1), f"{n}") for n in range(11)]
    batches = Batches(samples, 4, seed=3, limit=24)
    epochs = [[batches.step(e * 3 + s) for s in range(3)] for e in range(2)]
    names = [[source for step in epoch for micro in step for source in micro.sources] for epoch in epochs]
    assert all(sorted(each) == sorted(sample.source for sample in samples) for each in names)
    assert names[0] != names[1]
    again = Batches(samples, 4, seed=3, limit=24)
    assert [micro.sources for micro in again.step(4)] == [micro.sources for micro in epochs[1][1]]
    for micro in (micro for epoch in epochs for step in epoch for micro in step):
        assert micro.tokens.numel() <= 24 or len(micro.sources) == 1
        assert micro.n_trained == sum(int(source) + 1 for source in micro.sources)
    assert len(Batches(samples, 4, seed=3, limit=10**6, accumulate=2).step(0)) == 2
