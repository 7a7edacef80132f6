"""The points and candidates of the codebooks, built anew in numpy from what gguf publishes."""

import itertools
import re
import subprocess
import sys
import tomllib

import gguf.quants
import numpy as np
import pytest

from support import ROOT

# How many of the smallest distances make candidates.
DISTANCES = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ1_S": 3, "IQ3_XXS": 2, "IQ3_S": 3}
RUN = 16


def test_points_are_those_of_gguf():
    subprocess.run([sys.executable, "-m", "tools.make_tables", "--check"], cwd=ROOT, check=True)


def test_points_carry_the_license_of_ggml():
    """With the source, and with every wheel."""
    head = (ROOT / "csrc/codebooks/codebook_points.h").read_text(encoding="utf-8").partition("*/")[0]
    license_text = " ".join(re.sub(r"^ \*", "", head[head.index("MIT License") :], flags=re.M).split())
    assert license_text.startswith("MIT License Copyright (c) 2023-2026 The ggml authors Permission is hereby granted")
    assert license_text in " ".join((ROOT / "NOTICE").read_text(encoding="utf-8").split())
    assert "NOTICE" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]


@pytest.mark.parametrize("name", DISTANCES)
def test_runs_of_candidates_fit_their_tables(name):
    """The C source reserves room for exactly the runs there are."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    points = np.searchsorted(np.asarray(quant.grid_map), quant.grid.reshape(quant.grid_shape)).astype(np.int64)
    levels, dims = len(quant.grid_map), quant.grid_shape[1]
    every, short = 0, 0
    for combinations in np.array_split(np.array(list(itertools.product(range(levels), repeat=dims))), 32):
        distances = ((combinations**2).sum(1)[:, None] + (points**2).sum(1)) - 2 * combinations @ points.T
        for combination, row in zip(combinations, distances, strict=True):
            if row.min() == 0:
                continue
            listed = points[row <= np.unique(row)[: DISTANCES[name]][-1]]
            left = unbeaten(listed - combination)
            every += -(-len(listed) // RUN)
            short += -(-left // RUN) if left < len(listed) and name != "IQ1_S" else 0
    text = (ROOT / "csrc" / "codebooks" / "codebooks.c").read_text(encoding="utf-8")
    reserved = re.search(rf"RUNS_{name.replace('IQ1_S', 'IQ1')} = (\d+)(?: \+ (\d+))?", text)
    assert reserved is not None and (int(reserved[1]), int(reserved[2] or 0)) == (every, short)


def unbeaten(away: np.ndarray) -> int:
    """How many of the points, given by their distances (n, dims) from a combination, no other one beats."""
    one, other = away[:, None], away[None]
    nearer = (one == other) | (one == 0) | ((np.sign(one) == np.sign(other)) & (abs(one) < abs(other)))
    beats = nearer.all(axis=2)
    np.fill_diagonal(beats, False)
    return int((~beats.any(axis=0)).sum())
