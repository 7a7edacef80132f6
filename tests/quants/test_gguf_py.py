"""The kernels against gguf-py's own in numpy: an oracle that needs neither torch nor llama.cpp.

gguf-py dequantizes nearly every type and quantizes the simpler ones. What it does not know, and importance matrices,
are held against libggml (test_quants.py).
"""

import gguf
import gguf.quants
import numpy as np
import pytest

from gguflora.quants import kernels
from gguflora.quants.types import TYPES, GgmlType, type_named
from support.quantizing import ISAS, by_name, quantized

KNOWN = [kind for kind in TYPES.values() if kind.name not in {"Q1_0", "Q2_0"}]
QUANTIZED = [
    type_named(name)
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
]
N_IN = 2816

by_isa = pytest.mark.parametrize("isa", ISAS)


def rows() -> np.ndarray:
    """Rows of weights: model-like, heavy-tailed, of other sizes, constant, zero, on half steps."""
    random = np.random.default_rng(3)
    return np.array(
        [
            *(0.02 * random.standard_normal((4, N_IN))),
            *random.standard_t(2, (4, N_IN)),
            *(10.0 ** np.arange(-12, 4)[:, None] * random.standard_normal((16, N_IN))),
            np.full(N_IN, -1.5),
            np.zeros(N_IN),
            random.integers(-31, 32, N_IN) / 2,
        ],
        np.float32,
    )


def theirs(kind: GgmlType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(kind.id)


@by_isa
@pytest.mark.parametrize("kind", QUANTIZED, ids=by_name)
def test_quantize(kind, isa):
    x = rows()
    expected = gguf.quants.quantize(x, theirs(kind)).view(np.uint8)
    np.testing.assert_array_equal(quantized(x, kind, isa), expected)


@by_isa
@pytest.mark.parametrize("kind", KNOWN, ids=by_name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantize_any_bytes(kind, isa):
    """Among them scales that are infinite or no numbers."""
    data = np.random.default_rng(kind.id).integers(0, 256, (24, kind.row_bytes(N_IN)), dtype=np.uint8)
    kinds = {"F32": np.float32, "F16": np.float16}
    expected = gguf.quants.dequantize(data.view(kinds.get(kind.name, np.uint8)), theirs(kind))
    found = np.full((len(data), N_IN), 7, np.float32)
    kernels.dequantize_rows(data, kind, found, isa=isa)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert numbers.mean() > 0.5
    np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@by_isa
@pytest.mark.parametrize("kind", QUANTIZED, ids=by_name)
def test_merge_to_nearest(kind, isa):
    """Dequantized, changed by a sum of two products in order, quantized again."""
    random = np.random.default_rng(kind.id)
    packed = gguf.quants.quantize(rows()[:8], theirs(kind))
    a, b = random.standard_normal((2, N_IN)).astype(np.float32), random.standard_normal((8, 2)).astype(np.float32)
    change = b[:, :1] * a[0] + b[:, 1:] * a[1]
    expected = gguf.quants.quantize(gguf.quants.dequantize(packed, theirs(kind)) + change, theirs(kind)).view(np.uint8)
    found = np.empty_like(expected)
    kernels.merge_rows(packed.view(np.uint8), kind, found, kind, kernels.Product(a, b), isa=isa)
    np.testing.assert_array_equal(found, expected)
