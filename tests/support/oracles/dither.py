"""Stochastic rounding in numpy, operation by operation in float32: what the kernels must write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gguflora.quants.types import GgmlType
from support.oracles import libggml

F = np.float32
CLIPPED_SHARE = 0.1


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(F)


def fields(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(n, count * bytes): first the lowest fields of all bytes, then the next."""
    return np.concatenate([data >> bits * i & (1 << bits) - 1 for i in range(count)], axis=1)


def join(codes: np.ndarray, bits: int, count: int) -> np.ndarray:
    parts = np.split(codes & (1 << bits) - 1, count, axis=1)
    return np.bitwise_or.reduce([part << bits * i for i, part in enumerate(parts)]).astype(np.uint8)


def by_halves(function: Callable[..., np.ndarray], data: np.ndarray, bits: int, count: int) -> np.ndarray:
    return np.concatenate([function(part, bits, count) for part in np.split(data, 2, axis=1)], axis=1)


def by_quarters(function: Callable[..., np.ndarray], data: np.ndarray) -> np.ndarray:
    return np.concatenate([function(part, 4, 2) for part in np.split(data, 4, axis=1)], axis=1)


def bytes_to_bits(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(data, axis=1, bitorder="little")


def bits_to_bytes(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")


@dataclass(frozen=True)
class Codec:
    """How one type stores w = s * q - o: all functions on blocks (n, bytes). With levels, codes are their places."""

    group: int
    low: int
    high: int
    header: list[slice]
    scales: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    codes: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray, np.ndarray], None]
    levels: np.ndarray | None = None

    @property
    def step(self) -> np.float32:
        return F(1) if self.levels is None else (F(self.high) - F(self.low)) / F(len(self.levels) - 1)

    def cell(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the levels around t: place of the lower one, distance, and t's share of it."""
        if self.levels is None:
            return np.floor(t).astype(int), np.ones_like(t), t - np.floor(t)
        place = np.searchsorted(self.levels[1:-1], t, side="right")
        gap = self.levels[place + 1] - self.levels[place]
        return place, gap, (t - self.levels[place]) / gap


def only_d(at: int, groups: int = 1):
    def scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = np.repeat(half(blocks, at), groups, axis=1)
        return d, np.zeros_like(d)

    return scales


def plain(low: int, high: int, size: int, with_min: bool, fifth: bool) -> Codec:
    qs, qh = slice(size - 16, size), slice(size - 20, size - 16)

    def codes(blocks: np.ndarray) -> np.ndarray:
        q = fields(blocks[:, qs], 4, 2).astype(int)
        return (q | (bytes_to_bits(blocks[:, qh]).astype(int) << 4 if fifth else 0)) + low

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, qs] = join(q - low, 4, 2)
        if fifth:
            blocks[:, qh] = bits_to_bytes(q - low >> 4)

    scales = (lambda blocks: (half(blocks, 0), -half(blocks, 2))) if with_min else only_d(0)
    return Codec(32, low, high, [slice(0, 4 if with_min else 2)], scales, codes, store)


def eight_bits() -> Codec:
    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, 2:] = q.astype(np.int8).view(np.uint8)

    return Codec(32, -127, 127, [slice(0, 2)], only_d(0), lambda b: b[:, 2:].copy().view(np.int8).astype(int), store)


def scales_2(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = blocks[:, :16]
    return half(blocks, 80) * (codes & 15).astype(F), half(blocks, 82) * (codes >> 4).astype(F)


def scales_3(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = fields(blocks[:, 96:104], 4, 2).astype(int), fields(blocks[:, 104:108], 2, 4).astype(int)
    s = half(blocks, 108) * ((low | high << 4) - 32).astype(F)
    return s, np.zeros_like(s)


def scales_45(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = (blocks[:, 4 + 4 * i : 8 + 4 * i].astype(int) for i in range(3))
    s = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    m = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return half(blocks, 0) * s.astype(F), half(blocks, 2) * m.astype(F)


def scales_6(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = half(blocks, 208) * blocks[:, 192:208].copy().view(np.int8).astype(F)
    return s, np.zeros_like(s)


def pairs(at: int, low: int, high: int, group: int, header: list[slice], scales) -> Codec:
    where = slice(at, at + 64)

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, where] = by_halves(join, q - low, 2, 4)

    return Codec(
        group, low, high, header, scales, lambda b: by_halves(fields, b[:, where], 2, 4).astype(int) + low, store
    )


def columns_of_bits(data: np.ndarray) -> np.ndarray:
    """Bit i of byte j belongs to weight 32 i + j."""
    return fields(data, 1, 8).astype(int)


def q3_k() -> Codec:
    two = pairs(32, 0, 3, 16, [], scales_3)

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        two.store(blocks, q + 4 & 3)
        blocks[:, :32] = join(q + 4 >> 2, 1, 8)

    def codes(blocks: np.ndarray) -> np.ndarray:
        return (two.codes(blocks) | columns_of_bits(blocks[:, :32]) << 2) - 4

    return Codec(16, -4, 3, [slice(96, 110)], scales_3, codes, store)


def q45_k(at: int, fifth: bool) -> Codec:
    def codes(blocks: np.ndarray) -> np.ndarray:
        q = by_quarters(fields, blocks[:, at:]).astype(int)
        return q | columns_of_bits(blocks[:, 16:48]) << 4 if fifth else q

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, at:] = by_quarters(join, q)
        if fifth:
            blocks[:, 16:48] = join(q >> 4, 1, 8)

    return Codec(32, 0, 31 if fifth else 15, [slice(0, 16)], scales_45, codes, store)


def q6_k() -> Codec:
    def codes(blocks: np.ndarray) -> np.ndarray:
        low = by_halves(fields, blocks[:, :128], 4, 2).astype(int)
        return (low | by_halves(fields, blocks[:, 128:192], 2, 4).astype(int) << 4) - 32

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, :128] = by_halves(join, q + 32, 4, 2)
        blocks[:, 128:192] = by_halves(join, q + 32 >> 4, 2, 4)

    return Codec(16, -32, 31, [slice(192, 210)], scales_6, codes, store)


def trits() -> Codec:
    parts = [(0, 32, 5), (32, 48, 5), (48, 52, 4)]

    def codes(blocks: np.ndarray) -> np.ndarray:
        out = []
        for start, stop, digits in parts:
            v = blocks[:, start:stop].astype(int)
            for _ in range(digits):
                out.append((v * 3 >> 8) - 1)
                v = v * 3 & 255
        return np.concatenate(out, axis=1)

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        at = 0
        for start, stop, digits in parts:
            rows = (q[:, at : at + digits * (stop - start)] + 1).reshape(len(q), digits, stop - start)
            value = sum(rows[:, k] * 3 ** (4 - k) for k in range(digits))
            blocks[:, start:stop] = (value * 256 + 242) // 243
            at += digits * (stop - start)

    return Codec(32, -1, 1, [slice(52, 54)], only_d(52, 8), codes, store)


def q2_0() -> Codec:
    def codes(blocks: np.ndarray) -> np.ndarray:
        return np.stack([blocks[:, 2:] >> 2 * i & 3 for i in range(4)], axis=2).reshape(len(blocks), 64).astype(int) - 1

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        fours = (q + 1).reshape(len(q), 16, 4)
        blocks[:, 2:] = sum(fours[:, :, i] << 2 * i for i in range(4))

    return Codec(32, -1, 2, [slice(0, 2)], only_d(0, 2), codes, store)


def q1_0() -> Codec:
    def scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = np.repeat(half(blocks, 0), 4, axis=1)
        return d + d, d

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        blocks[:, 2:] = bits_to_bytes(q)

    return Codec(32, 0, 1, [slice(0, 2)], scales, lambda blocks: bytes_to_bits(blocks[:, 2:]).astype(int), store)


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)
FP4 = np.array([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], F)  # doubled, as ggml has them
TO_FP4 = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7])
FROM_FP4 = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])


def codebook(levels: np.ndarray, group: int, header: int, scales) -> Codec:
    """Nibbles after the header, groups' halves side by side."""

    def codes(blocks: np.ndarray) -> np.ndarray:
        groups = np.split(blocks[:, header:], (blocks.shape[1] - header) * 2 // group, axis=1)
        q = np.concatenate([fields(part, 4, 2) for part in groups], axis=1).astype(int)
        return q if len(levels) == 16 else FROM_FP4[q]

    def store(blocks: np.ndarray, q: np.ndarray) -> None:
        q = q if len(levels) == 16 else TO_FP4[q]
        groups = np.split(q, q.shape[1] // group, axis=1)
        blocks[:, header:] = np.concatenate([join(part, 4, 2) for part in groups], axis=1)

    return Codec(group, int(levels[0]), int(levels[-1]), [slice(0, header)], scales, codes, store, levels)


def scales_iq4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(len(blocks), 8).astype(int)
    high = np.stack([blocks[:, 2 + i // 4].astype(int) >> 2 * (i % 4) & 3 for i in range(8)], axis=1)
    s = half(blocks, 0) * ((low | high << 4) - 32).astype(F)
    return s, np.zeros_like(s)


def scales_mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = np.ldexp(F(1), blocks[:, :1].astype(int) - 128).astype(F)
    return s, np.zeros_like(s)


def scales_nvfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = blocks[:, :4].astype(int) & 127
    s = np.where(d < 8, d * 2.0**-10, (8 + d % 8) * 2.0 ** (d // 8 - 11)).astype(F)
    return np.where(blocks[:, :4] == 127, F(0), s), np.zeros_like(s)


CODECS: dict[str, Codec] = {
    "Q4_0": plain(-8, 7, 18, False, False),
    "Q4_1": plain(0, 15, 20, True, False),
    "Q5_0": plain(-16, 15, 22, False, True),
    "Q5_1": plain(0, 31, 24, True, True),
    "Q8_0": eight_bits(),
    "Q2_K": pairs(16, 0, 3, 16, [slice(0, 16), slice(80, 84)], scales_2),
    "Q3_K": q3_k(),
    "Q4_K": q45_k(16, False),
    "Q5_K": q45_k(48, True),
    "Q6_K": q6_k(),
    "TQ1_0": trits(),
    "TQ2_0": pairs(0, -1, 1, 32, [slice(64, 66)], only_d(64, 8)),
    "Q2_0": q2_0(),
    "Q1_0": q1_0(),
    "IQ4_NL": codebook(IQ4, 32, 2, only_d(0)),
    "IQ4_XS": codebook(IQ4, 32, 8, scales_iq4),
    "MXFP4": codebook(FP4, 32, 1, scales_mxfp4),
    "NVFP4": codebook(FP4, 16, 4, scales_nvfp4),
}


def sum_of_groups(x: np.ndarray) -> np.ndarray:
    """Sums over the last axis (a group): 16 lanes, then lanes 8, 4, 2, 1 apart."""
    lanes = x[..., :16] if x.shape[-1] == 16 else x[..., :16] + x[..., 16:]
    for n in (8, 4, 2, 1):
        lanes = lanes[..., :n] + lanes[..., n : 2 * n]
    return lanes[..., 0]


def in_turn(x: np.ndarray) -> np.ndarray:
    """Sums over the last axis in double, one after the other."""
    return np.cumsum(x.astype(np.float64), axis=-1)[..., -1]


@dataclass
class Rows:
    """Rows of one type, by blocks and groups."""

    codec: Codec
    blocks: np.ndarray
    per_row: int

    @classmethod
    def of(cls, data: np.ndarray, kind: GgmlType) -> Rows:
        return cls(CODECS[kind.name], data.reshape(-1, kind.block_bytes).copy(), data.shape[1] // kind.block_bytes)

    def scales(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """S, o and 1 / s per group, with a last axis of one: (blocks, groups, 1)."""
        s, o = (array[..., None] for array in self.codec.scales(self.blocks))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse = np.where(np.abs(s) >= np.finfo(F).tiny, F(1) / s, F(0))
        return s, o, inverse

    def codes(self) -> np.ndarray:
        return self.grouped(self.codec.codes(self.blocks))

    def levels(self) -> np.ndarray:
        return self.codes().astype(F) if self.codec.levels is None else self.codec.levels[self.codes()]

    def grouped(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(self.blocks), -1, self.codec.group)

    def ungrouped(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(self.blocks) // self.per_row, -1)

    def values(self) -> np.ndarray:
        s, o, _ = self.scales()
        return s * self.levels() - o

    def limited(self, t: np.ndarray) -> np.ndarray:
        return np.maximum(np.minimum(t, F(self.codec.high)), F(self.codec.low))

    def to_nearest(self, x: np.ndarray) -> np.ndarray:
        """Per group, whether it is rounded to nearest: (blocks, groups, 1)."""
        s, step = self.scales()[0], self.codec.step
        with np.errstate(over="ignore"):
            return sum_of_groups(x * x)[..., None] >= F(0.1225) * F(self.codec.group) * (s * step * (s * step))

    def row_sums(self, of_groups: np.ndarray) -> np.ndarray:
        """Sums over the groups of chunks of 256 weights, then over the chunks of a row."""
        wide, size = of_groups.reshape(len(self.blocks) // self.per_row, -1), 256 // self.codec.group
        return in_turn(np.stack([in_turn(wide[:, i : i + size]) for i in range(0, wide.shape[1], size)], axis=1))

    def has_header_of(self, other: Rows) -> np.ndarray:
        same = [(self.blocks[:, part] == other.blocks[:, part]).all(axis=1) for part in self.codec.header]
        return np.logical_and.reduce(same)


def costs(rows: Rows, t: np.ndarray, above: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of blocks the expected cost and the part of it beyond the range; of groups delta times what lies beyond."""
    s, _, inverse = rows.scales()
    inside = rows.limited(t)
    _, gap, p = rows.codec.cell(inside)
    rest = F(1) - p
    least = np.minimum(p, rest)
    rounding = gap * gap * np.where(rows.to_nearest(x), least * least, p * rest)
    outside = np.where(inverse != 0, t - inside, above)
    s, inverse = s[..., 0], inverse[..., 0]
    unit = np.where(inverse != 0, s, F(1))
    clip = unit * unit * sum_of_groups(outside * outside)
    cost = np.where(inverse != 0, s * s * sum_of_groups(rounding), F(0)) + clip
    return in_turn(cost), in_turn(clip), unit * sum_of_groups(outside * x)


def choose_scales(src: np.ndarray, kind: GgmlType, delta: np.ndarray, imatrix: np.ndarray | None = None):
    """New scales; of rows <delta, X - W> and |delta|**2; number of blocks with new scales."""
    base, best = Rows.of(src, kind), Rows.of(src, kind)
    _, o, inverse = base.scales()
    q, x = base.levels(), base.grouped(delta)
    target = base.values() + x
    with np.errstate(over="ignore", invalid="ignore"):
        cost, clip, lost = costs(base, q + x * inverse, target + o, x)
        squares = sum_of_groups(x * x)
    small = (~base.to_nearest(x)[..., 0] | (squares == 0)).all(axis=1)
    wanted = (cost > 0) & (~small | (clip > CLIPPED_SHARE * cost))
    found = Rows(base.codec, requantized(target, wanted, kind, base.per_row, imatrix, base.blocks), base.per_row)
    with np.errstate(all="ignore"):
        _, o1, inverse1 = found.scales()
        new_cost, _, new_lost = costs(found, (target + o1) * inverse1, target + o1, x)
        new = wanted & (new_cost < cost) & ~found.has_header_of(base)
    best.blocks[new] = found.blocks[new]
    lost = np.where(new[:, None], new_lost, lost)
    moved = base.row_sums(squares.astype(np.float64) - lost)
    return best.blocks.reshape(src.shape), moved, base.row_sums(squares), int(new.sum())


def requantized(target, wanted, kind, per_row, imatrix, blocks):
    """ggml's blocks of the wanted ones; an imatrix row goes with the wanted blocks of each row by themselves."""
    found = blocks.copy()
    wide = target.reshape(len(blocks), -1)
    if imatrix is None:
        if wanted.any():
            x = np.ascontiguousarray(wide[wanted].reshape(1, -1))
            found[wanted] = libggml.quantize(x, kind.id).reshape(-1, kind.block_bytes)
        return found
    for row in range(0, len(blocks), per_row):
        some = wanted[row : row + per_row]
        if some.any():
            x = np.ascontiguousarray(wide[row : row + per_row][some].reshape(1, -1))
            w = np.ascontiguousarray(imatrix.reshape(per_row, -1)[some].reshape(-1))
            found[row : row + per_row][some] = libggml.quantize(x, kind.id, w).reshape(-1, kind.block_bytes)
    return found


def splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def uniform(key: int, first_row: int, n_rows: int, n_in: int) -> np.ndarray:
    """float32 (n_rows, n_in) in [0, 1)."""
    with np.errstate(over="ignore"):
        rows = np.arange(first_row, first_row + n_rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys = splitmix64(np.uint64(key) + rows)[:, None]
    low, high = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    x = np.arange(n_in, dtype=np.uint32) ^ low
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15) ^ high) * np.uint32(0x846CA68B)
    return (x >> np.uint32(8)).astype(F) * F(2.0**-24)


def round_stochastic(src, kind, headers, delta, gain, key, first_row):
    """Written rows, and the sums of each row."""
    base, new = Rows.of(src, kind), Rows.of(headers, kind)
    x = base.grouped(delta)
    unchanged = (delta.reshape(len(base.blocks), -1) == 0).all(axis=1)
    new.blocks[unchanged] = base.blocks[unchanged]
    keeps_scales = new.has_header_of(base)[:, None, None]
    s, o, inverse = new.scales()
    q, dq, target = base.levels(), base.values(), base.values() + x
    change = F(gain) * x
    above = dq + change + o
    with np.errstate(over="ignore"):
        t = np.where(keeps_scales, q + x * (F(gain) * inverse), above * inverse)
        inside = new.limited(t)
        place, _, p = new.codec.cell(inside)
        u = base.grouped(uniform(key, first_row, len(src), delta.shape[1]))
        nearest = np.rint(inside).astype(int) if new.codec.levels is None else place + (p > F(0.5))
        code = np.where(new.to_nearest(x), nearest, place + (u < p))
    level = code.astype(F) if new.codec.levels is None else new.codec.levels[code]
    new.codec.store(new.blocks, code.reshape(len(new.blocks), -1))
    new.blocks[unchanged] = base.blocks[unchanged]
    outside = np.where(inverse != 0, t != inside, np.where(keeps_scales, change, above) != 0)
    dq, target, written = (base.ungrouped(array).astype(float) for array in (dq, target, s * level - o))
    sums = [dq**2, delta.astype(float) ** 2, (written - dq) * delta, (written - target) ** 2]
    sums = [array.sum(axis=1) for array in [*sums, base.ungrouped(outside)]]
    return new.blocks.reshape(src.shape), np.stack(sums, axis=1)
