"""The codebook and ternary types once more: rows on their own levels, many sizes, odd importances, threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gguflora.errors import NonFiniteError
from gguflora.quants._lib import current_isa
from gguflora.quants.types import TYPES, GgmlType
from support import weights
from support.oracles import libggml
from support.quantizing import ISAS, assert_same_bytes, by_name, quantized

CODEBOOK = [
    t for t in TYPES.values() if t.name.startswith(("IQ", "TQ")) or t.name in {"MXFP4", "NVFP4", "Q1_0", "Q2_0"}
]
SEARCHED = [t for t in CODEBOOK if t.name.startswith(("IQ1", "IQ2", "IQ3"))]


def on_levels(kind: GgmlType, n_rows: int, n_in: int) -> np.ndarray:
    """Rows that a type holds without loss, but for the scales it may choose otherwise."""
    x = weights.rows("normal", n_rows, n_in)
    packed = libggml.quantize(x, kind.id, np.ones(n_in, np.float32))
    return libggml.dequantize(packed, kind.id, n_in)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", CODEBOOK, ids=by_name)
def test_rows_on_levels_already(kind, isa):
    n_in = 1792
    imatrix = weights.importance("measured", n_in)
    for other in CODEBOOK:
        x = on_levels(other, 2, n_in)
        assert_same_bytes(x, kind, isa, imatrix)
        if kind.quantizes:
            assert_same_bytes(x, kind, isa)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize("kind", CODEBOOK, ids=by_name)
def test_many_rows(kind, isa):
    """Enough of them to meet rare neighbours and ties; weights of every row at another size."""
    rng = np.random.default_rng(kind.id)
    for n_rows, n_in in [(24, 4096), (5, 1024 + 256), (64, 256)]:
        x = rng.standard_t(4, (n_rows, n_in)) * 10.0 ** rng.uniform(-6, 2, (n_rows, 1))
        imatrix = (rng.standard_normal(n_in) ** 2).astype(np.float32)
        assert_same_bytes(x.astype(np.float32), kind, isa, imatrix)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", SEARCHED, ids=by_name)
def test_weights_between_two_levels(kind, isa):
    """Halves of small numbers: many weights lie in the very middle of two levels, where short lists do not do."""
    rng = np.random.default_rng(kind.id)
    for unit in (0.5, 1.0, 1 / 3):
        x = (rng.integers(-10, 11, (4, 1024)) * unit).astype(np.float32)
        for imatrix in (np.ones(1024, np.float32), rng.integers(0, 3, 1024).astype(np.float32)):
            assert_same_bytes(x, kind, isa, imatrix)


ABORTS = {
    -1.0: {"IQ3_XXS", "IQ3_S", "IQ2_XS", "IQ2_S"},
    3e38: {"IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"},
    1e20: set(),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", SEARCHED, ids=by_name)
@pytest.mark.parametrize("value", ABORTS)
def test_importances_out_of_range(kind, isa, value):
    """A negative importance has no root and a huge one no finite sum: there ggml's search ends the process."""
    x = weights.rows("normal", 3, 512)
    imatrix = np.full(512, value, np.float32)
    if kind.name in ABORTS[value]:
        with pytest.raises(NonFiniteError, match="row 0, column 0 is too large"):
            quantized(x, kind, isa, imatrix)
    else:
        assert_same_bytes(x, kind, isa, imatrix)


@pytest.mark.parametrize("kind", SEARCHED, ids=by_name)
def test_first_search_of_many_threads(kind):
    """The codebook is built while other threads ask for it (in the first test of a process that needs it)."""
    x = weights.rows("normal", 2, 1024)
    imatrix = weights.importance("measured", 1024)
    with ThreadPoolExecutor(8) as pool:
        packed = list(pool.map(lambda _: quantized(x, kind, current_isa(), imatrix), range(16)))
    expected = libggml.quantize(x, kind.id, imatrix)
    assert all(np.array_equal(found, expected) for found in packed)
