"""The numbers of torch's CPU generator, without torch: some PEFT methods save a seed in place of a matrix.

``torch.Generator`` is the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), seeded like numpy's legacy
generators, so their streams of 32-bit numbers are the same. What torch makes of the stream is restated here from the
documentation of its distributions: `uniform` and `randperm` are equal bit for bit, `normal` but for the last bits of
logarithm and cosine.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.quants.arrays import Float32Array, Indices

_LARGE_PERMUTATION: Final = (2**32 - 1) // 20
"""From this length on, torch's `randperm` shuffles in another way, with 64-bit numbers."""
_CHUNK: Final = 1 << 22


class TorchGenerator:
    """A ``torch.Generator(device="cpu").manual_seed(seed)``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # as RandomState(seed) does
        self._spare: float | None = None

    def random(self, n: int) -> NDArray[np.uint64]:
        """The next ``n`` numbers of 32 bits."""
        return self._bits.random_raw(n)

    def random64(self, n: int) -> NDArray[np.uint64]:
        """The next ``n`` numbers of 64 bits, the high half drawn first."""
        high, low = self.random(2 * n).reshape(n, 2).T
        return (high << np.uint64(32)) | low

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Float32Array:
        """``torch.empty(shape).uniform_(low, high)``: 24 random bits a number."""
        unit = (self.random(math.prod(shape)) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
        start, width = np.float32(low), np.float32(high) - np.float32(low)
        # torch multiplies and adds with one rounding; in float64 the product is exact
        return (unit * np.float64(width) + np.float64(start)).astype(np.float32).reshape(shape)

    def kaiming_uniform(self, shape: tuple[int, int]) -> Float32Array:
        """``torch.nn.init.kaiming_uniform_``: within ``sqrt(6 / n_in)`` (https://arxiv.org/abs/1502.01852)."""
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return self.uniform(shape, -bound, bound)

    def normal(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Float32Array:
        """``torch.normal(mean, std, shape)`` by the method of Box and Muller, in groups of 8 pairs if there are any."""
        size = math.prod(shape)
        if size < 16:
            return np.array([self._one_normal() * std + mean for _ in range(size)], np.float32).reshape(shape)
        values = self.uniform((size,))
        whole = size - size % 16
        values[:whole] = _box_muller(values[:whole])
        if whole < size:
            # the last 16 numbers are drawn again, whatever they were
            values[-16:] = _box_muller(self.uniform((16,)))
        return (values * np.float32(std) + np.float32(mean)).reshape(shape)

    def _one_normal(self) -> float:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        u, v = ((self.random64(2) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53).tolist()
        radius, angle = math.sqrt(-2.0 * math.log1p(-v)), 2.0 * math.pi * u
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def randperm(self, n: int, first: int | None = None) -> Indices:
        """The first numbers of ``torch.randperm(n)``.

        Args:
            n: length of the permutation.
            first: how many of it are wanted; by default all. The generator is left as if all had been drawn only if
                they are.
        """
        wanted = n if first is None else min(first, n)
        return self._shuffled(n, wanted) if n < _LARGE_PERMUTATION else self._shuffled_inside_out(n, wanted)

    def _shuffled(self, n: int, wanted: int) -> Indices:
        """Fisher and Yates: number i changes places with a random later one, and is final."""
        left = np.arange(n, n - wanted, -1, dtype=np.uint64)
        partners = (np.arange(wanted, dtype=np.uint64) + self.random(wanted) % left).astype(np.intp).tolist()
        moved: dict[int, int] = {}
        result = np.empty(wanted, np.intp)
        for index, partner in enumerate(partners):
            result[index] = moved.get(partner, partner)
            moved[partner] = moved.pop(index, index)
        return result

    def _shuffled_inside_out(self, n: int, wanted: int) -> Indices:
        """Durstenfeld's inside-out form: number i comes in, and changes places with itself or an earlier one."""
        result = np.empty(wanted, np.intp)
        for index, place in enumerate((self.random64(wanted) % np.arange(1, wanted + 1, dtype=np.uint64)).tolist()):
            result[index] = result[place]
            result[place] = index
        for start in range(wanted, n, _CHUNK):
            numbers = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
            places = self.random64(len(numbers)) % (numbers + np.uint64(1))
            hits = places < wanted
            result[places[hits].astype(np.intp)] = numbers[hits].astype(np.intp)  # of repeated places the last counts
        return result


def _box_muller(uniform: Float32Array) -> Float32Array:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - pairs[:, 0]))
    angle = np.float32(2 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
