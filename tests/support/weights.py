"""Rows of weights that bring out what is special about a quantizer."""

from collections.abc import Callable

import numpy as np

from support.oracles import libggml


def _on_levels(type_id: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    def make(rng: np.random.Generator, n: int) -> np.ndarray:
        x = rng.standard_normal((1, n)).astype(np.float32)
        return libggml.dequantize(libggml.quantize(x, type_id), type_id, n)[0]

    return make


def _blocks(rng: np.random.Generator, n: int, size: int, values: np.ndarray) -> np.ndarray:
    return np.repeat(rng.choice(values, n // size), size)


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "model-like": lambda rng, n: rng.standard_normal(n) * 0.02,
    "heavy-tailed": lambda rng, n: rng.standard_t(2, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "zero": lambda rng, n: np.zeros(n),
    "negative zero": lambda rng, n: np.full(n, -0.0),
    "mixed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "constant": lambda rng, n: np.full(n, 0.37),
    "negative constant": lambda rng, n: np.full(n, -1.5),
    "constant blocks": lambda rng, n: _blocks(rng, n, 16, rng.standard_normal(9)),
    "almost constant": lambda rng, n: -1 + rng.standard_normal(n) * 1e-6,
    "steps": lambda rng, n: _blocks(rng, n, 32, rng.standard_normal(9)) * (1 + rng.standard_normal(n) * 1e-7),
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.03),
    "two signs": lambda rng, n: rng.choice([-1.0, 1.0], n),
    "ternary": lambda rng, n: rng.choice([-0.04, 0.0, 0.04], n),
    "positive": lambda rng, n: np.abs(rng.standard_normal(n)),
    "negative": lambda rng, n: -np.abs(rng.standard_normal(n)),
    "rectified": lambda rng, n: np.minimum(rng.standard_normal(n), 0),
    "offset": lambda rng, n: rng.standard_normal(n) * 0.01 + 3,
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-7,
    "vanishing": lambda rng, n: rng.standard_normal(n) * 1e-15,
    "denormal": lambda rng, n: rng.standard_normal(n) * 1e-40,
    "smallest": lambda rng, n: rng.choice([0.0, 1e-45, -1e-45, 3e-45], n),
    "large": lambda rng, n: rng.standard_normal(n) * 1e4,
    "outliers": lambda rng, n: np.where(rng.random(n) < 0.01, 100.0, 1.0) * rng.standard_normal(n),
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 3, 50.0, rng.standard_normal(n) * 0.02),
    "wide": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-12, 3, n),
    "wide blocks": lambda rng, n: rng.standard_normal(n) * _blocks(rng, n, 16, 10.0 ** rng.uniform(-12, 3, 40)),
    "integers": lambda rng, n: rng.integers(-20, 21, n),
    "ramp": lambda rng, n: np.linspace(-1, 1, n),
    "half steps": lambda rng, n: rng.integers(-31, 32, n) / 2,
    "Q8_0 levels": _on_levels(8),
    "Q4_0 levels": _on_levels(2),
    "Q4_1 levels": _on_levels(3),
    "Q2_K levels": _on_levels(10),
    "Q3_K levels": _on_levels(11),
    "Q4_K levels": _on_levels(12),
    "Q6_K levels": _on_levels(14),
}


def rows(kind: str, n_rows: int, n_in: int, seed: int = 0) -> np.ndarray:
    """float32 (n_rows, n_in) of one kind."""
    rng = np.random.default_rng([seed, *kind.encode()])
    return np.stack([KINDS[kind](rng, n_in) for _ in range(n_rows)]).astype(np.float32)


def importance(kind: str, n_in: int, seed: int = 0) -> np.ndarray:
    """An imatrix row, (n_in,): "measured" (chi-squared over decades), "flat", "sparse" or "zero"."""
    rng = np.random.default_rng([seed, *kind.encode()])
    values = {
        "measured": rng.standard_normal(n_in) ** 2 * 10.0 ** rng.uniform(-3, 1, n_in) + 1e-6,
        "flat": np.ones(n_in),
        "sparse": rng.random(n_in) * (rng.random(n_in) < 0.3),
        "zero": np.zeros(n_in),
    }
    return values[kind].astype(np.float32)
