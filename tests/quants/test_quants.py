"""quantize and dequantize against libggml-base: the same bytes, the same bits, for every type and instruction set."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gguflora import quants
from gguflora.errors import NonFiniteError, QuantizationError
from gguflora.quants import kernels
from gguflora.quants.types import TYPES, GgmlType, type_named
from support import weights
from support.oracles import libggml
from support.quantizing import ISAS, assert_same_bytes, by_name, quantized

ALL_TYPES = list(TYPES.values())
N_IN = 2816  # 11 super-blocks: an odd number, more than any vector's lanes


def dequantized(data: np.ndarray, kind: GgmlType, n_in: int, isa: str) -> np.ndarray:
    out = np.full((len(data), n_in), 7, np.float32)
    kernels.dequantize_rows(data, kind, out, isa=isa)
    return out


@pytest.mark.parametrize("kind", ALL_TYPES, ids=by_name)
def test_sizes_are_ggmls(kind):
    assert libggml.type_sizes(kind.id) == (
        kind.name.lower() if "_K" not in kind.name else kind.name.lower()[:-1] + "K",
        kind.block_weights,
        kind.block_bytes,
    )
    assert libggml.requires_imatrix(kind.id) == kind.needs_imatrix


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [t for t in ALL_TYPES if t.quantizes], ids=by_name)
def test_bytes_equal_ggml(kind, isa):
    for name in weights.KINDS:
        assert_same_bytes(weights.rows(name, 3, N_IN if N_IN % kind.block_weights == 0 else 2816), kind, isa)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q5_K"])
def test_shortcuts_are_right(name):
    """Many sub-blocks, some near levels (errors that hardly differ, errors near zero), some whose squares underflow."""
    rng = np.random.default_rng(12)
    noise = rng.standard_normal((24, 4096))
    levels = rng.integers(-8, 8, noise.shape) / 8
    sizes = 10.0 ** rng.uniform(-16, 4, (24, 128)).repeat(32, axis=1)
    for x in (noise, noise * sizes, noise - 3, np.abs(noise), levels, levels + 1e-4 * noise, levels + 1e-6 * noise):
        for isa in ISAS:
            assert_same_bytes(x.astype(np.float32), type_named(name), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ALL_TYPES, ids=by_name)
def test_bytes_equal_ggml_with_imatrix(kind, isa):
    for importance in ("measured", "flat", "sparse", "zero"):
        imatrix = weights.importance(importance, N_IN)
        for name in weights.KINDS:
            assert_same_bytes(weights.rows(name, 2, N_IN, seed=1), kind, isa, imatrix)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ALL_TYPES, ids=by_name)
def test_floats_equal_ggml(kind, isa):
    """On what ggml writes and on arbitrary bytes, NaNs and infinities included."""
    rng = np.random.default_rng(5)
    imatrix = weights.importance("measured", N_IN)
    written = libggml.quantize(weights.rows("normal", 3, N_IN), kind.id, imatrix)
    noise = rng.integers(0, 256, written.shape, dtype=np.uint8)
    for data in (written, noise):
        expected = libggml.dequantize(data, kind.id, N_IN)
        found = dequantized(data, kind, N_IN, isa)
        same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
        assert same.all(), (kind.name, isa, np.argwhere(~same)[:3], found[~same][:3], expected[~same][:3])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ALL_TYPES, ids=by_name)
@pytest.mark.parametrize("blocks", [1, 2, 3, 17])
def test_rows_of_few_blocks(kind, isa, blocks):
    n_in = blocks * kind.block_weights
    imatrix = weights.importance("measured", n_in)
    x = weights.rows("normal", 5, n_in)
    assert_same_bytes(x, kind, isa, imatrix if kind.needs_imatrix else None)
    data = libggml.quantize(x, kind.id, imatrix)
    assert np.array_equal(dequantized(data, kind, n_in, isa), libggml.dequantize(data, kind.id, n_in))


@pytest.mark.parametrize("kind", [t for t in ALL_TYPES if t.quantizes], ids=by_name)
@settings(max_examples=60)
@given(data=st.data())
def test_bytes_equal_ggml_on_made_up_rows(kind, data):
    exponent = data.draw(st.integers(-140, 9))
    values = st.one_of(
        st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]), st.floats(-(2**-10), 2**-10, width=32)
    )
    x = data.draw(arrays.arrays(np.float32, (1, 512), elements=values)) * np.float32(2.0**exponent)
    for isa in ISAS:
        assert_same_bytes(x.astype(np.float32), kind, isa)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("kind", ALL_TYPES, ids=by_name)
def test_threads_do_not_change_bytes(kind, threads):
    x = weights.rows("normal", 301, 2816)
    imatrix = weights.importance("measured", 2816) if kind.needs_imatrix else None
    packed = quants.quantize(x, kind.id, imatrix=imatrix, threads=threads)
    assert np.array_equal(packed.view(np.uint8), libggml.quantize(x, kind.id, imatrix))
    assert np.array_equal(
        quants.dequantize(packed, kind.id, threads=threads), libggml.dequantize(packed.view(np.uint8), kind.id, 2816)
    )


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_drop_in_for_gguf(name):
    x = weights.rows("normal", 6, 256).reshape(2, 3, 256)
    qtype = gguf.GGMLQuantizationType[name]
    expected, found = gguf.quants.quantize(x, qtype), quants.quantize(x, qtype)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(found, expected)
    back = quants.dequantize(found, qtype)
    assert back.dtype == np.float32 and np.array_equal(back, gguf.quants.dequantize(expected, qtype))
    assert np.array_equal(quants.quantize(x, name.lower()), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [t for t in ALL_TYPES if t.quantizes], ids=by_name)
def test_not_finite_names_row_and_column(kind, isa, bad):
    x = weights.rows("normal", 70, 2816)
    x[53, 1201] = bad
    with pytest.raises(NonFiniteError, match="row 53, column 1201") as caught:
        quantized(x, kind, isa)
    assert (caught.value.row, caught.value.column) == (53, 1201)


def test_row_is_counted_over_all_axes():
    x = np.zeros((3, 400, 1024), np.float32)
    x[2, 399, 7] = np.nan
    with pytest.raises(NonFiniteError, match="row 1199, column 7") as caught:
        quants.quantize(x, "Q8_0", threads=2)
    assert (caught.value.row, caught.value.column) == (1199, 7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("F16", 7e4), ("Q8_0", 1e7), ("Q4_0", 1e6), ("Q4_1", 1e5), ("Q4_K", 1e9), ("Q6_K", 1e9), ("BF16", 3.4e38)],
)
def test_too_large_for_the_type(name, value, isa):
    x = weights.rows("normal", 3, 512)
    x[1, 300:] = value
    x[1, 400:] = -value
    with pytest.raises(NonFiniteError, match="too large"):
        quantized(x, type_named(name), isa)


def test_shapes_and_types_are_checked():
    with pytest.raises(QuantizationError, match="multiple of 256"):
        quants.quantize(np.zeros((2, 32), np.float32), "Q4_K")
    with pytest.raises(QuantizationError, match="blocks of 144 bytes"):
        quants.dequantize(np.zeros((2, 100), np.uint8), "Q4_K")
    with pytest.raises(QuantizationError, match="unknown quant type"):
        quants.quantize(np.zeros((2, 32), np.float32), "Q4_9")
    with pytest.raises(QuantizationError, match="unknown quant type"):
        quants.quantize(np.zeros((2, 32), np.float32), 4)
    with pytest.raises(QuantizationError, match="single number"):
        quants.quantize(np.float32(1), "F16")
    with pytest.raises(QuantizationError, match="imatrix"):
        quants.quantize(np.zeros((2, 32), np.float32), "Q8_0", imatrix=np.ones(31, np.float32))
    assert quants.quantize(np.zeros((0, 256), np.float32), "Q4_K").shape == (0, 144)
