"""Stochastic rounding: kernels against the numpy reference bit by bit, and the statistics it exists for."""

import numpy as np
import pytest

from gguflora.errors import NonFiniteError, QuantizationError
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.kernels import SUMS, Product
from gguflora.quants.types import TYPES, type_named
from support import weights
from support.oracles import dither as reference
from support.oracles import libggml

ISAS = isa_names()
DITHERED = [kind for kind in TYPES.values() if kind.name in reference.CODECS]
by_name = pytest.mark.parametrize("kind", DITHERED, ids=lambda kind: kind.name)
by_isa = pytest.mark.parametrize("isa", ISAS)
KEY = 0x1234_5678_9ABC_DEF0


def rows_of(kind, n_rows, n_in, seed=0, name="model-like", imatrix=None):
    return libggml.quantize(weights.rows(name, n_rows, n_in, seed), kind.id, imatrix)


def width(kind, blocks=3):
    """A width that is no multiple of 256 if the type has such."""
    return kind.block_weights * (9 if kind.block_weights == 32 else blocks)


def change_of(src, kind, n_in, relative, rank=3, seed=5):
    """Factors of a change whose root mean square is `relative` times that of the weights."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in [(rank, n_in), (len(src), rank)])
    size = np.sqrt(np.mean(libggml.dequantize(src, kind.id, n_in) ** 2))
    return a, b * np.float32(relative * size / np.sqrt(np.mean((b @ a) ** 2)))


def product(a, b):
    delta = np.zeros((len(b), a.shape[1]), np.float32)
    for k in range(len(a)):
        delta = delta + b[:, k : k + 1] * a[k]
    return delta


def fitted(src, kind, delta, isa, imatrix=None):
    out = np.full_like(src, 0xAA)
    sums, n_new = kernels.choose_scales(src, kind, out, delta, imatrix=imatrix, isa=isa)
    return out, sums, n_new


def dithered(src, kind, headers, delta, isa, gain=1.0, key=KEY, first_row=0):
    out = headers.copy()
    sums = kernels.round_stochastic(src, kind, out, delta, gain=gain, key=key, first_row=first_row, isa=isa)
    return out, sums


def assert_equals_reference(src, kind, delta, isa, dense, imatrix=None, gain=1.25):
    headers, moved, squares, n_new = reference.choose_scales(src, kind, dense, imatrix)
    found, sums, count = fitted(src, kind, delta, isa, imatrix)
    assert np.array_equal(found, headers)
    assert count == n_new
    assert np.array_equal(sums, np.stack([moved, squares], axis=1))
    expected, expected_sums = reference.round_stochastic(src, kind, headers, dense, gain, KEY, 7)
    out, sums = dithered(src, kind, headers, delta, isa, gain, KEY, 7)
    assert np.array_equal(out, expected)
    assert np.allclose(sums, expected_sums, rtol=1e-5, atol=1e-7 * expected_sums[:, :1] + 1e-30)
    assert np.array_equal(sums, dithered(src, kind, headers, delta, "scalar", gain, KEY, 7)[1])
    values = libggml.dequantize(src, kind.id, dense.shape[1])
    error = libggml.dequantize(out, kind.id, dense.shape[1]) - (values + dense)
    assert np.allclose(sums[:, 3], (error.astype(float) ** 2).sum(axis=1), rtol=1e-5)
    return count


@by_name
def test_reference_reads_what_ggml_reads(kind):
    src = rows_of(kind, 4, width(kind))
    rows = reference.Rows.of(src, kind)
    assert np.array_equal(rows.ungrouped(rows.values()), libggml.dequantize(src, kind.id, width(kind)))
    again = reference.Rows.of(src, kind)
    again.codec.store(again.blocks, rows.codes().reshape(len(rows.blocks), -1))
    assert np.array_equal(again.blocks, rows.blocks)


@by_isa
@by_name
@pytest.mark.parametrize("relative", [0.003, 0.05, 0.3, 3.0])
def test_bytes_are_those_of_the_reference(kind, isa, relative):
    n_in, searched = width(kind), 0
    for name in ("model-like", "heavy-tailed", "wide blocks", "sparse", "positive", "negative"):
        src = rows_of(kind, 5, n_in, name=name)
        a, b = change_of(src, kind, n_in, relative)
        searched += assert_equals_reference(src, kind, Product(a, b), isa, product(a, b))
    assert searched or relative < 1 or kind.name.startswith("TQ")  # the search is part of what is compared


@by_isa
@by_name
def test_bytes_with_imatrix(kind, isa):
    n_in = width(kind)
    imatrix = weights.importance("measured", n_in)
    src = rows_of(kind, 5, n_in, name="heavy-tailed", imatrix=imatrix)
    a, b = change_of(src, kind, n_in, 0.5)
    assert_equals_reference(src, kind, Product(a, b), isa, product(a, b), imatrix)


@by_isa
@by_name
def test_dense_sparse_changes(kind, isa):
    """Whole blocks, groups and single weights without a change, and headers that the fit did not choose."""
    n_in = width(kind)
    src = rows_of(kind, 6, n_in)
    rng = np.random.default_rng(1)
    size = np.abs(libggml.dequantize(src, kind.id, n_in)).mean()
    for share in (0.0, 0.003, 0.5):
        delta = (rng.standard_normal((6, n_in)) * size * 0.2 * (rng.random((6, n_in)) < share)).astype(np.float32)
        assert_equals_reference(src, kind, delta, isa, delta)
        others = rows_of(kind, 6, n_in, seed=9)
        out, _ = dithered(src, kind, others, delta, isa)
        assert np.array_equal(out, reference.round_stochastic(src, kind, others, delta, 1.0, KEY, 0)[0])


@by_isa
@by_name
def test_any_bytes_as_base(kind, isa):
    """Blocks that ggml would not write: scales of zero or below, codes at the ends, denormal scales."""
    rng = np.random.default_rng(2)
    n_in = width(kind, 4)
    raw = rng.integers(0, 256, (6, n_in // kind.block_weights, kind.block_bytes), dtype=np.uint8)
    scales = np.array([0.0, -0.5, 6e-8, 2.0, -1e-6, 0.01], np.float16)
    for part in halves_of(kind):
        raw[:, :, part] = scales[:, None].view(np.uint8).reshape(6, 1, 2)
    if kind.name == "MXFP4":
        raw[:, :, 0] = np.array([0, 1, 120, 124, 128, 130])[:, None]
    src = raw.reshape(6, -1)
    if kind.name == "TQ1_0":
        src = canonical_trits(src, kind)
    a, b = change_of(src, kind, n_in, 0.1)
    assert_equals_reference(src, kind, Product(a, b), isa, product(a, b))


def halves_of(kind):
    """Where a block has its half floats."""
    at = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    at |= {"Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "NVFP4": []}
    return [slice(i, i + 2) for i in at.get(kind.name, [0])]


def canonical_trits(src, kind):
    rows = reference.Rows.of(src, kind)
    rows.codec.store(rows.blocks, rows.codes().reshape(len(rows.blocks), -1))
    return rows.blocks.reshape(src.shape)


@by_name
def test_no_change_is_the_base(kind):
    n_in = width(kind)
    src = rows_of(kind, 3, n_in)
    others = rows_of(kind, 3, n_in, seed=8)
    zero = np.zeros((3, n_in), np.float32)
    headers, sums, n_new = fitted(src, kind, zero, None)
    assert np.array_equal(headers, src)
    assert n_new == 0
    assert not sums.any()
    for start in (src, others):
        out, sums = dithered(src, kind, start, zero, None)
        assert np.array_equal(out, src)
        assert not sums[:, [1, 2, 3]].any()


@by_name
def test_bytes_do_not_depend_on_grouping(kind):
    n_in = width(kind) * 4
    src = rows_of(kind, 61, n_in, name="heavy-tailed")
    a, b = change_of(src, kind, n_in, 0.2)
    headers, sums, n_new = fitted(src, kind, Product(a, b), None)
    whole, whole_sums = dithered(src, kind, headers, Product(a, b), None, first_row=1000)
    count = 0
    for i in range(0, 61, 7):
        part = slice(i, i + 7)
        one, one_sums, one_new = fitted(src[part], kind, Product(a, b[part]), None)
        out, out_sums = dithered(src[part], kind, headers[part], Product(a, b[part]), None, first_row=1000 + i)
        count += one_new
        assert np.array_equal(one, headers[part])
        assert np.array_equal(one_sums, sums[part])
        assert np.array_equal(out, whole[part])
        assert np.array_equal(out_sums, whole_sums[part])
    assert count == n_new


def test_many_rows_of_a_wide_matrix():
    """More weights than one group of rows in the cache, and more searched blocks than are gathered at once."""
    kind = type_named("Q4_K")
    src = rows_of(kind, 50, 4096, name="heavy-tailed")
    a, b = change_of(src, kind, 4096, 0.5)
    assert assert_equals_reference(src, kind, Product(a, b), None, product(a, b)) > 100


@by_name
def test_mean_over_keys_is_the_target(kind):
    """Where nothing clips: 400 keys, each weight's mean within five standard errors of its target."""
    n_in, n = width(kind, 1), 400
    src = rows_of(kind, 1, n_in, seed=3)
    a, b = change_of(src, kind, n_in, {"Q8_0": 0.002, "Q6_K": 0.01}.get(kind.name, 0.02))
    delta = product(a, b)
    rows = reference.Rows.of(src, kind)
    s, _, inverse = rows.scales()
    t = rows.levels() + rows.grouped(delta) * inverse
    total = np.zeros((1, n_in))
    for key in range(n):
        total += libggml.dequantize(dithered(src, kind, src, delta, None, key=key)[0], kind.id, n_in)
    _, gap, p = rows.codec.cell(rows.limited(t))
    step = rows.ungrouped(np.abs(s) * gap)
    spread = step * np.sqrt(rows.ungrouped(p * (1 - p)) / n)
    target = libggml.dequantize(src, kind.id, n_in) + delta
    inside = rows.ungrouped((t >= rows.codec.low) & (t <= rows.codec.high))
    off = np.abs(total / n - target)[inside]
    assert inside.mean() > 0.1
    assert (off <= 5 * spread[inside] + 1e-3 * step[inside] + 6 * step[inside] / n).all()
    assert abs((total / n - target)[inside].sum()) < 5 * np.sqrt((spread[inside] ** 2).sum())


@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_weak_changes_survive(name):
    """What nearest rounds away."""
    kind = type_named(name)
    src = rows_of(kind, 64, 1024)
    a, b = change_of(src, kind, 1024, 0.002 if name in {"Q6_K", "Q5_K", "Q5_0", "Q5_1"} else 0.01, rank=8)
    out = np.empty_like(src)
    sums = kernels.merge_rows(src, kind, out, kind, Product(a, b)).sum(axis=0)
    lost = sums[SUMS.index("moved")] / sums[SUMS.index("delta2")]
    headers, fit, _ = fitted(src, kind, Product(a, b), None)
    gain = 1 / np.clip(fit[:, 0].sum() / fit[:, 1].sum(), 0.5, 1)
    sums = dithered(src, kind, headers, Product(a, b), None, gain=gain)[1].sum(axis=0)
    assert lost < 0.3
    assert 0.85 < sums[SUMS.index("moved")] / sums[SUMS.index("delta2")] < 1.15


def test_random_bits_are_uniform_and_independent():
    u = reference.uniform(77, 5, 256, 4096).astype(float)
    counts = np.bincount((u * 256).astype(int).ravel(), minlength=256)
    expected = u.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 5 * np.sqrt(512)
    centred, n = u - 0.5, u.size
    for lag in (1, 2, 3, 16, 256):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean() * 12) < 5 / np.sqrt(n)
        assert abs((centred[lag % 255 :] * centred[: -(lag % 255)]).mean() * 12) < 6 / np.sqrt(n)
    other = reference.uniform(78, 5, 256, 4096).astype(float) - 0.5
    assert abs((centred * other).mean() * 12) < 5 / np.sqrt(n)
    assert np.abs(u.mean(axis=0) - 0.5).max() < 6 / np.sqrt(12 * 256)


@by_isa
@pytest.mark.parametrize("kind", [t for t in TYPES.values() if t.quantizes], ids=lambda kind: kind.name)
def test_sums_of_a_nearest_merge(kind, isa):
    n_in = max(width(kind), 37) if kind.block_weights == 1 else width(kind)
    src = rows_of(kind, 5, n_in)
    a, b = change_of(src, kind, n_in, 0.05)
    out = np.empty_like(src)
    sums = kernels.merge_rows(src, kind, out, kind, Product(a, b), isa=isa)
    before, after = (libggml.dequantize(rows, kind.id, n_in).astype(float) for rows in (src, out))
    delta = product(a, b)
    target = (before.astype(np.float32) + delta).astype(float)
    expected = [(before, before), (delta, delta), (after - before, delta), (after - target, after - target)]
    for column, (x, y) in enumerate(expected):
        close = np.allclose(
            sums[:, column], (x.astype(float) * y).sum(axis=1), rtol=1e-5, atol=1e-7 * (before**2).sum()
        )
        assert close, SUMS[column]
    if kind in DITHERED:
        rows = reference.Rows.of(out, kind)
        _, o, inverse = rows.scales()
        t = (rows.grouped(target.astype(np.float32)) + o) * inverse
        outside = (t < rows.codec.low) | (t > rows.codec.high)
        assert np.array_equal(sums[:, 4], rows.ungrouped(outside).sum(axis=1))
    else:
        assert not sums[:, 4].any()


@by_name
def test_bad_numbers_are_named(kind):
    n_in = width(kind)
    src = rows_of(kind, 9, n_in)
    out = src.copy()
    for bad in (np.nan, np.inf, -np.inf):
        delta = np.zeros((9, n_in), np.float32)
        delta[5, 17] = delta[6, 1] = bad
        for run in (
            lambda delta=delta: kernels.choose_scales(src, kind, out, delta),
            lambda delta=delta: kernels.round_stochastic(src, kind, out, delta, gain=1, key=1, first_row=0),
            lambda delta=delta: kernels.merge_rows(src, kind, out, kind, delta),
        ):
            with pytest.raises(NonFiniteError, match="row 5, column 17"):
                run()


@by_isa
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_headers_that_overflow_are_not_taken(name, isa):
    kind = type_named(name)
    src = rows_of(kind, 2, 512)
    delta = np.zeros((2, 512), np.float32)
    delta[0, 3], delta[1, 300] = 1e30, -3e38
    with np.errstate(all="ignore"):
        assert_equals_reference_of_huge(src, kind, delta, isa)


def assert_equals_reference_of_huge(src, kind, delta, isa):
    headers, _, _, n_new = reference.choose_scales(src, kind, delta)
    found, _, count = fitted(src, kind, delta, isa)
    assert np.array_equal(found, headers)
    assert count == n_new == 0
    out, _ = dithered(src, kind, found, delta, isa)
    assert np.isfinite(libggml.dequantize(out, kind.id, 512)).all()


def test_wrong_arguments_are_refused():
    kind, other = type_named("Q4_K"), type_named("BF16")
    src = rows_of(kind, 4, 512)
    delta = np.zeros((4, 512), np.float32)
    with pytest.raises(QuantizationError, match="BF16"):
        kernels.choose_scales(rows_of(other, 4, 512), other, rows_of(other, 4, 512), delta)
    with pytest.raises(QuantizationError, match="overlap"):
        kernels.choose_scales(src, kind, src, delta)
    with pytest.raises(QuantizationError, match="overlap"):
        kernels.round_stochastic(src, kind, src, delta, gain=1, key=0, first_row=0)
    with pytest.raises(QuantizationError):
        kernels.choose_scales(src, kind, src.copy(), delta[:3])
    with pytest.raises(QuantizationError, match="imatrix"):
        kernels.choose_scales(src, kind, src.copy(), delta, imatrix=np.ones(511, np.float32))
