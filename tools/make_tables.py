"""Write csrc/codebooks/codebook_points.h, the points of the IQ1, IQ2 and IQ3 codebooks, as the `gguf` package has them.

``python -m tools.make_tables`` writes the file, with ``--check`` it fails if it is not what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf.quants
import numpy as np

TARGET = Path(__file__).resolve().parent.parent / "csrc" / "codebooks" / "codebook_points.h"
TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ3_XXS", "IQ3_S")
LINE = 14

HEAD = """/* Written by `python -m tools.make_tables` from gguf.quants; do not edit.
 *
 * The points of the codebooks: eight levels of two bits each (IQ1, IQ2) or four of three (IQ3), the first one lowest.
 * They are ggml's, whose license is:
 *
 * MIT License
 *
 * Copyright (c) 2023-2026 The ggml authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy
 * of this software and associated documentation files (the "Software"), to deal
 * in the Software without restriction, including without limitation the rights
 * to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
 * copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE. */
#ifndef GFL_CODEBOOK_POINTS_H
#define GFL_CODEBOOK_POINTS_H
#include <stdint.h>
"""


def points(name: str) -> np.ndarray:
    """The levels of every point of a type's codebook packed into one number, (n_points,)."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    values = quant.grid.reshape(quant.grid_shape)
    levels = np.searchsorted(np.asarray(quant.grid_map), values)
    if not np.array_equal(np.asarray(quant.grid_map)[levels], values):
        raise SystemExit(f"{name}: a value of the codebook is none of its levels")
    bits = 16 // quant.grid_shape[1] if len(quant.grid_map) <= 4 else 3
    packed: np.ndarray = (levels << bits * np.arange(quant.grid_shape[1])).sum(axis=1)
    return packed


def header() -> str:
    """The text of the header."""
    parts = [HEAD]
    for name in TYPES:
        numbers = [f"0x{point:04x}" for point in points(name)]
        lines = [", ".join(numbers[start : start + LINE]) for start in range(0, len(numbers), LINE)]
        level_values = ", ".join(str(value) for value in getattr(gguf.quants, name).grid_map)
        parts.append(f"static const int8_t {name.lower()}_levels[] = {{{level_values}}};")
        body = ",\n    ".join(lines)
        parts.append(f"static const uint16_t {name.lower()}_points[{len(numbers)}] = {{\n    {body}}};\n")
    return "\n".join([*parts, "#endif\n"])


def main() -> None:
    """Write or check."""
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(header(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != header():
        raise SystemExit(f"{TARGET.name} is not what `python -m tools.make_tables` writes with this gguf")


if __name__ == "__main__":
    main()
