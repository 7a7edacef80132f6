"""torch's CPU random number generator, reimplemented without torch: some PEFT methods save a seed instead of a matrix.

``torch.Generator`` is the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), seeded like numpy's legacy
generators, so both have the same stream of 32-bit numbers. The distributions are reimplemented here: `uniform` and
`randperm` are bit-identical to torch's, `normal` can differ in the last bits of logarithm and cosine.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.quants.arrays import Float32Array, Indices

_LARGE_PERMUTATION: Final = (2**32 - 1) // 20
"""From this length on, torch's `randperm` uses another algorithm, with 64-bit numbers."""
_CHUNK: Final = 1 << 22


class TorchGenerator:
    """The equivalent of ``torch.Generator(device="cpu").manual_seed(seed)``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # as RandomState(seed) does
        self._spare: float | None = None

    def random(self, n: int) -> NDArray[np.uint64]:
        """Return the next ``n`` 32-bit numbers."""
        return self._bits.random_raw(n)

    def random64(self, n: int) -> NDArray[np.uint64]:
        """Return the next ``n`` 64-bit numbers; the high half of each is drawn first."""
        high, low = self.random(2 * n).reshape(n, 2).T
        return (high << np.uint64(32)) | low

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Float32Array:
        """Return the same as ``torch.empty(shape).uniform_(low, high)``, which uses 24 random bits per number."""
        unit = (self.random(math.prod(shape)) & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
        start, width = np.float32(low), np.float32(high) - np.float32(low)
        # torch rounds once after multiplying and adding; in float64 the product is exact
        return (unit * np.float64(width) + np.float64(start)).astype(np.float32).reshape(shape)

    def kaiming_uniform(self, shape: tuple[int, int]) -> Float32Array:
        """Return the same as ``torch.nn.init.kaiming_uniform_``: uniform between -b and b with ``b = sqrt(6 / n_in)``.

        Source: https://arxiv.org/abs/1502.01852.
        """
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return self.uniform(shape, -bound, bound)

    def normal(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Float32Array:
        """Return the same as ``torch.normal(mean, std, shape)``: Box-Muller, for 16 or more numbers in groups of 16."""
        size = math.prod(shape)
        if size < 16:
            return np.array([self._one_normal() * std + mean for _ in range(size)], np.float32).reshape(shape)
        values = self.uniform((size,))
        whole = size - size % 16
        values[:whole] = _box_muller(values[:whole])
        if whole < size:
            # torch draws the last 16 numbers again, including those that are complete
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
        """Return the first numbers of ``torch.randperm(n)``.

        Args:
            n: length of the permutation.
            first: how many numbers to return; by default all. If fewer are requested, the state of the generator
                afterwards may differ from torch's.
        """
        count = n if first is None else min(first, n)
        return self._shuffle(n, count) if n < _LARGE_PERMUTATION else self._shuffle_inside_out(n, count)

    def _shuffle(self, n: int, count: int) -> Indices:
        """Fisher-Yates: exchange number i with a random one at i or later; it is then final."""
        remaining = np.arange(n, n - count, -1, dtype=np.uint64)
        partners = (np.arange(count, dtype=np.uint64) + self.random(count) % remaining).astype(np.intp).tolist()
        moved: dict[int, int] = {}
        result = np.empty(count, np.intp)
        for index, partner in enumerate(partners):
            result[index] = moved.get(partner, partner)
            moved[partner] = moved.pop(index, index)
        return result

    def _shuffle_inside_out(self, n: int, count: int) -> Indices:
        """Durstenfeld's inside-out variant: append number i, and exchange it with itself or an earlier one."""
        result = np.empty(count, np.intp)
        for index, target in enumerate((self.random64(count) % np.arange(1, count + 1, dtype=np.uint64)).tolist()):
            result[index] = result[target]
            result[target] = index
        for start in range(count, n, _CHUNK):
            numbers = np.arange(start, min(start + _CHUNK, n), dtype=np.uint64)
            targets = self.random64(len(numbers)) % (numbers + np.uint64(1))
            hits = targets < count
            result[targets[hits].astype(np.intp)] = numbers[hits].astype(np.intp)  # the last of equal targets wins
        return result


def _box_muller(uniform: Float32Array) -> Float32Array:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - pairs[:, 0]))
    angle = np.float32(2 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
