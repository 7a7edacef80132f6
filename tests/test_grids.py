"""The points and neighbours of the grids, built anew in numpy from what gguf publishes."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import gguf.quants
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GRIDS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ1_S": 3, "IQ3_XXS": 2, "IQ3_S": 3}  # distances that make neighbours
RUN = 16


def test_points_are_those_of_gguf():
    subprocess.run([sys.executable, ROOT / "tools" / "make_tables", "--check"], check=True)


@pytest.mark.parametrize("name", GRIDS)
def test_runs_of_neighbours_fit_their_tables(name):
    """The C source reserves room for exactly the runs there are."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    points = np.searchsorted(np.asarray(quant.grid_map), quant.grid.reshape(quant.grid_shape)).astype(np.int64)
    levels, dims = len(quant.grid_map), quant.grid_shape[1]
    runs = 0
    for combinations in np.array_split(np.array(list(itertools.product(range(levels), repeat=dims))), 32):
        distances = ((combinations**2).sum(1)[:, None] + (points**2).sum(1)) - 2 * combinations @ points.T
        for row in distances:
            if row.min() > 0:
                runs += -(-int((row <= np.unique(row)[: GRIDS[name]][-1]).sum()) // RUN)
    text = (ROOT / "csrc" / "grids.c").read_text(encoding="utf-8")
    reserved = re.search(rf"RUNS_{name.replace('IQ1_S', 'IQ1')} = (\d+)", text)
    assert reserved is not None and int(reserved[1]) == runs
