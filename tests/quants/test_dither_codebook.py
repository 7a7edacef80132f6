"""Stochastic rounding of codebook types: its statistics, against scipy's linear programs over gguf's codebooks."""

import gguf
import numpy as np
import pytest
from scipy.optimize import linprog

from gguflora.errors import NonFiniteError
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.kernels import SUMS, Product
from gguflora.quants.types import TYPES, type_named
from support import weights
from support.oracles import libggml

NAMES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M")
KINDS = [type_named(name) for name in NAMES]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
N_IN, KEY = 768, 0x1234_5678_9ABC_DEF0
STAYING = {  # by type: bits of a block that a weak change leaves alone, scales and shifts
    "IQ3_S": [(slice(0, 2), 255), (slice(106, 110), 255)],
    "IQ3_XXS": [(slice(0, 2), 255), (slice(69, 98, 4), 0xF0)],
    "IQ2_S": [(slice(0, 2), 255), (slice(74, 82), 255)],
    "IQ2_XS": [(slice(0, 2), 255), (slice(66, 74), 255)],
    "IQ2_XXS": [(slice(0, 2), 255), (slice(9, 66, 8), 0xF0)],
    "IQ1_S": [(slice(0, 2), 255), (slice(35, 50, 2), 0xF0)],
    "IQ1_M": [(slice(32, 48), 0x88), (slice(48, 56), 255)],
}


def base_rows(kind, n_rows, n_in=N_IN, name="model-like", seed=0):
    imatrix = np.ones(n_in, np.float32) if kind.needs_imatrix else None
    return libggml.quantize(weights.rows(name, n_rows, n_in, seed), kind.id, imatrix)


def change_of(src, kind, relative, n_in=N_IN, rank=8, seed=5):
    """A change whose root mean square is `relative` times that of the weights."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in [(rank, n_in), (len(src), rank)])
    size = np.sqrt(np.mean(libggml.dequantize(src, kind.id, n_in) ** 2))
    return Product(a, b * np.float32(relative * size / np.sqrt(np.mean((b @ a) ** 2))))


def dense(delta):
    total = np.zeros((len(delta.b), delta.a.shape[1]), np.float32)
    for k in range(len(delta.a)):
        total = total + delta.b[:, k : k + 1] * delta.a[k]
    return total


def fitted(src, kind, delta, isa=None):
    out = np.full_like(src, 0xAA)
    sums, n_new = kernels.choose_scales(src, kind, out, delta, isa=isa)
    return out, sums, n_new


def dithered(src, kind, start, delta, isa=None, gain=1.0, key=KEY, first_row=0):
    out = start.copy()
    sums = kernels.round_stochastic(src, kind, out, delta, gain=gain, key=key, first_row=first_row, isa=isa)
    return out, sums


def nearest(src, kind, delta, n_in=N_IN):
    out = np.empty_like(src)
    imatrix = np.ones(n_in, np.float32) if kind.needs_imatrix else None
    return out, kernels.merge_rows(src, kind, out, kind, delta, imatrix=imatrix)


def gain_of(fit):
    reached, wanted = fit.sum(axis=0)
    return 1 / np.clip(reached / wanted, 0.5, 1)


def test_all_quantized_types_dither():
    assert {kind.name for kind in TYPES.values() if not kind.supports_stochastic} == {"F32", "F16", "BF16"}


@by_kind
@pytest.mark.parametrize("relative", [0.01, 0.3, 1.0, 5.0])
def test_bytes_do_not_depend_on_isa_or_grouping(kind, relative):
    for name in ("heavy-tailed", "sparse", "wide blocks"):
        src = base_rows(kind, 9, name=name)
        delta = change_of(src, kind, relative)
        start, fit, n_new = fitted(src, kind, delta, "scalar")
        out, sums = dithered(src, kind, start, delta, "scalar", 1.2, first_row=100)
        assert np.isfinite(libggml.dequantize(out, kind.id, N_IN)).all()
        for isa in isa_names()[1:]:
            same_start, same_fit, same_new = fitted(src, kind, delta, isa)
            same, same_sums = dithered(src, kind, start, delta, isa, 1.2, first_row=100)
            assert np.array_equal(start, same_start)
            assert np.array_equal(fit, same_fit)
            assert n_new == same_new
            assert np.array_equal(out, same)
            assert np.array_equal(sums, same_sums)
        for i in range(0, 9, 4):
            part = Product(delta.a, delta.b[i : i + 4])
            rows, one, _ = fitted(src[i : i + 4], kind, part)
            assert np.array_equal(rows, start[i : i + 4])
            assert np.array_equal(one, fit[i : i + 4])
            rows, one = dithered(src[i : i + 4], kind, start[i : i + 4], part, None, 1.2, first_row=100 + i)
            assert np.array_equal(rows, out[i : i + 4])
            assert np.array_equal(one, sums[i : i + 4])


@by_kind
def test_sums_are_those_of_the_written_rows(kind):
    src = base_rows(kind, 5)
    delta = change_of(src, kind, 0.05)
    out, sums = dithered(src, kind, src, delta)
    before, after = (libggml.dequantize(rows, kind.id, N_IN).astype(float) for rows in (src, out))
    wanted = dense(delta).astype(float)
    expected = [before**2, wanted**2, (after - before) * wanted, (after - before - wanted) ** 2]
    for column, terms in enumerate(expected):
        assert np.allclose(sums[:, column], terms.sum(axis=1), rtol=1e-4, atol=1e-4 * (wanted**2).sum()), SUMS[column]


@by_kind
def test_weak_changes_survive(kind):
    """What nearest rounding loses, or turns into its opposite."""
    src = base_rows(kind, 128)
    delta = change_of(src, kind, 0.015)
    lost = nearest(src, kind, delta)[1].sum(axis=0)
    start, fit, n_new = fitted(src, kind, delta)
    total = sum(dithered(src, kind, start, delta, gain=gain_of(fit), key=key)[1].sum(axis=0) for key in range(16))
    survival = total[SUMS.index("moved")] / total[SUMS.index("delta2")]
    chance = np.sqrt(total[SUMS.index("error2")] / total[SUMS.index("delta2")] / (16 * src.shape[0] * N_IN))
    assert n_new == 0
    assert np.array_equal(start, src)
    assert lost[SUMS.index("moved")] < 0.3 * lost[SUMS.index("delta2")]
    assert abs(survival - 1) < 0.03 + 3 * chance
    assert chance < 0.02


@by_kind
def test_scales_and_shifts_stay_where_the_change_is_weak(kind):
    src = base_rows(kind, 16, name="heavy-tailed")
    out, _ = dithered(src, kind, src, change_of(src, kind, 0.02))
    before, after = (rows.reshape(-1, kind.block_bytes) for rows in (src, out))
    assert (before != after).any()
    for part, bits in STAYING[kind.name]:
        assert np.array_equal(before[:, part] & bits, after[:, part] & bits)


@by_kind
def test_nothing_moves_without_a_change(kind):
    src = base_rows(kind, 4)
    delta = dense(change_of(src, kind, 0.1))
    delta[:, 256:512] = 0
    delta[2] = 0
    out = dithered(src, kind, fitted(src, kind, delta)[0], delta)[0].reshape(4, 3, -1)
    before = src.reshape(4, 3, -1)
    assert np.array_equal(out[:, 1], before[:, 1])
    assert np.array_equal(out[2], before[2])
    assert (out[0, 0] != before[0, 0]).any()
    zero = np.zeros_like(delta)
    start, fit, n_new = fitted(src, kind, zero)
    assert np.array_equal(start, src)
    assert not fit.any()
    assert n_new == 0
    assert np.array_equal(dithered(src, kind, base_rows(kind, 4, seed=7), zero)[0], src)


@by_kind
def test_strong_changes_are_rounded_to_nearest(kind):
    src = base_rows(kind, 6)
    delta = change_of(src, kind, 6.0)
    start, _, n_new = fitted(src, kind, delta)
    assert n_new == 6 * N_IN // 256
    expected, sums = nearest(src, kind, delta)
    out, own = dithered(src, kind, start, delta, gain=1.3)
    assert np.array_equal(out, expected)
    assert np.allclose(own[:, :4], sums[:, :4])


@by_kind
def test_blocks_of_zeros_get_scales(kind):
    src = np.zeros((3, N_IN // 256 * kind.block_bytes), np.uint8)
    x = weights.rows("model-like", 3, N_IN, 0)
    x[1] = 0
    start, fit, n_new = fitted(src, kind, x)
    out, _ = dithered(src, kind, start, x)
    imatrix = np.ones(N_IN, np.float32) if kind.needs_imatrix else None
    expected = libggml.quantize(x, kind.id, imatrix)
    assert n_new == 2 * N_IN // 256
    assert np.array_equal(out[[0, 2]], expected[[0, 2]])
    assert np.array_equal(out[1], src[1])
    assert fit[:, 0].sum() == pytest.approx((x.astype(float) ** 2).sum())


@by_kind
def test_any_bytes_as_base(kind):
    """Blocks that ggml would not write: any codes, scales of zero or below, denormal ones."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (6, N_IN // 256, kind.block_bytes), dtype=np.uint8)
    scales = np.array([0.0, -0.5, 6e-8, 2.0, -1e-6, 0.01], np.float16)
    if kind.name == "IQ1_M":
        for i in range(4):
            nibble = scales.view(np.uint16) >> 4 * i << 12 >> 8
            raw[:, :, 49 + 2 * i] = (raw[:, :, 49 + 2 * i] & 15) | (nibble & 0xF0).astype(np.uint8)[:, None]
    else:
        raw[:, :, :2] = scales[:, None].view(np.uint8).reshape(6, 1, 2)
    src = raw.reshape(6, -1)
    values = libggml.dequantize(src, kind.id, N_IN)
    assert np.isfinite(values).all()
    delta = (rng.standard_normal(values.shape) * (0.1 * np.abs(values).mean(axis=1, keepdims=True) + 1e-9)).astype(
        np.float32
    )
    found = []
    for isa in isa_names():
        start, fit, _ = fitted(src, kind, delta, isa)
        out, sums = dithered(src, kind, start, delta, isa)
        assert np.isfinite(libggml.dequantize(out, kind.id, N_IN)).all()
        found.append((start, fit, out, sums))
    for other in found[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))


@by_kind
def test_bad_and_huge_numbers(kind):
    src = base_rows(kind, 9)
    out = src.copy()
    for bad in (np.nan, np.inf, -np.inf):
        delta = np.zeros((9, N_IN), np.float32)
        delta[5, 317] = delta[6, 1] = bad
        with pytest.raises(NonFiniteError, match="row 5, column 317"):
            fitted(src, kind, delta)
        with pytest.raises(NonFiniteError, match="row 5, column 317"):
            kernels.round_stochastic(src, kind, out, delta, gain=1, key=1, first_row=0)
    delta = np.zeros((9, N_IN), np.float32)
    delta[0, 3], delta[1, 300] = 1e30, -3e38
    start, fit, _ = fitted(src, kind, delta)
    assert fit[:, 0].sum() < 0.01 * fit[:, 1].sum()  # which `rounding` refuses
    assert np.isfinite(libggml.dequantize(dithered(src, kind, start, delta)[0], kind.id, N_IN)).all()


# -- against scipy --

MEAN_STEP = {"IQ3_S": 2, "IQ3_XXS": 8, "IQ1_S": 8, "IQ1_M": 8, "IQ2_S": 17, "IQ2_XS": 17, "IQ2_XXS": 17}
DEAR = 8  # a loss costs as much as going this many steps too far


def places(kind):
    """All that eight (four) weights can be, in levels: points with every allowed choice of signs."""
    quant = getattr(gguf.quants, "IQ1_S" if kind.name == "IQ1_M" else kind.name)
    quant.init_grid()
    points = np.asarray(quant.grid, float).reshape(-1, np.asarray(quant.grid).shape[-1])
    if kind.name.startswith("IQ1"):
        return points * 8
    signs = 1 - 2 * (np.arange(2 ** points.shape[1])[:, None] >> np.arange(points.shape[1]) & 1)
    if not kind.name.endswith("_S"):
        signs = signs[signs.prod(axis=1) > 0]
    return (points[:, None] * signs).reshape(-1, points.shape[1])


def units(kind, block):
    """What a level is worth, by weight, and the shifts of IQ1 in levels."""

    def halves(part):
        return part.copy().view(np.uint16)

    d, shift = float(block[:2].copy().view(np.float16)[0]), np.zeros(1)
    if kind.name == "IQ3_S":
        units = d * (1 + 2 * nibbles(block[106:110]))
    elif kind.name == "IQ3_XXS":
        units = d * (0.5 + (block[69:98:4] >> 4)) / 2
    elif kind.name == "IQ2_XXS":
        units = d * (0.5 + (block[9:66:8] >> 4)) / 4
    elif kind.name in {"IQ2_S", "IQ2_XS"}:
        units = d * (0.5 + nibbles(block[-8:])) / 4
    elif kind.name == "IQ1_S":
        high = halves(block[34:50])
        units, shift = d * (2 * (high >> 12 & 7) + 1.0) / 8, np.where(high & 0x8000, -1, 1)
    else:
        scales, high = halves(block[48:56]), block[32:48]
        bits = np.bitwise_or.reduce((scales >> 12) << 4 * np.arange(4)).astype(np.uint16)
        units = bits.reshape(1).view(np.float16).astype(float)[0] / 8
        units = units * (2 * (scales[:, None] >> 3 * np.arange(4) & 7).reshape(-1) + 1.0)
        shift = np.where(np.stack([high & 8, high & 128], axis=1).reshape(-1), -1, 1)
    return np.repeat(units, 256 // len(units)), np.repeat(shift, 256 // len(shift))


def nibbles(part):
    return np.stack([part & 15, part >> 4], axis=1).reshape(-1)


@by_kind
def test_mean_and_variance_against_linear_programs(kind):
    """Where a program over all places meets the target at a fair price, the mean over 500 keys does, at little more."""
    n_keys, src = 500, base_rows(kind, 1, 256, seed=3)
    delta = dense(change_of(src, kind, 0.03, 256))
    before = libggml.dequantize(src, kind.id, 256).astype(float)
    rows = np.concatenate([dithered(src, kind, src, delta, key=key)[0] for key in range(n_keys)])
    moves = libggml.dequantize(rows, kind.id, 256) - before
    unit, shift = units(kind, src[0])
    here = np.rint(before[0] / unit)
    assert np.allclose(here * unit, before[0], rtol=1e-5)
    every = places(kind)
    dims = every.shape[1]
    least, found, wanted, off, spread = 0.0, 0.0, [], [], []
    for j in range(0, 256, dims):
        part = slice(j, j + dims)
        v = every - (here - shift)[part]
        v = v[np.argsort((v**2).sum(axis=1), kind="stable")[1:600]]
        sums = np.ones((1, len(v)))
        program = linprog((v**2).sum(axis=1), sums, [1], v.T, delta[0, part] / unit[part], method="highs-ds")
        if program.status or np.abs(program.eqlin.marginals).max() > 0.9 * DEAR * MEAN_STEP[kind.name]:
            continue
        least += program.fun * unit[j] ** 2
        found += (moves[:, part] ** 2).sum() / n_keys
        wanted.append(delta[0, part])
        off.append(moves[:, part].mean(axis=0) - delta[0, part])
        spread.append(moves[:, part].std(axis=0) / np.sqrt(n_keys))
    assert len(off) * dims >= 256 * (0.05 if kind.name.startswith("IQ1") else 0.35)
    bias = np.square(off).sum() - np.square(spread).sum()

    assert bias < 0.15 * np.square(wanted).sum()
    assert 0.85 * least < found < 1.15 * least
