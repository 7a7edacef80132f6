"""The figure of docs/rounding.md shows what the kernels do today, and what the page says of it."""

import html
import json
import re
import runpy
from dataclasses import asdict

import numpy as np
import pytest

from support import ROOT

FIGURE = ROOT / "docs/figures/rounding.svg"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(FIGURE.with_suffix(".py")))


@pytest.fixture(scope="module")
def numbers(script):
    return asdict(script["measure"]())


def test_the_figure_is_up_to_date(numbers):
    """Else run docs/figures/rounding.py."""
    shown = re.search(r"<dc:description>(.*?)</dc:description>", FIGURE.read_text(), flags=re.S)[1]
    drawn = json.loads(html.unescape(shown))
    assert drawn.keys() == numbers.keys()
    for name, values in numbers.items():
        for one, other in zip(drawn[name], values, strict=True):
            assert one == pytest.approx(other, abs=0.005), name


def test_it_shows_what_the_page_says(script, numbers):
    np.testing.assert_array_equal(np.rint(numbers["nearest"]), numbers["base"])
    np.testing.assert_allclose(numbers["mean"], numbers["wanted"], atol=0.06)
    assert all(len(shares) <= 2 for shares in numbers["shares"])
    np.testing.assert_allclose(numbers["kept_stochastic"], 1, atol=0.01)
    kept, share = (
        dict(zip(script["SIZES"], numbers[key], strict=True)) for key in ("kept_nearest", "share_of_weights")
    )
    assert kept[0.05] < 0.03
    assert kept[0.1] < 0.1
    page = (ROOT / "docs/rounding.md").read_text()
    said = re.search(r"a change of ([\d.]+) % is a tenth of a step, one of ([\d.]+) % a fifth", page).groups()
    assert [float(number) for number in said] == pytest.approx([100 * share[0.1], 100 * share[0.2]], abs=0.05)


def test_it_can_be_drawn(script, numbers, tmp_path):
    script["draw"](script["Numbers"](**numbers), tmp_path / "rounding.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "rounding.svg").read_text())
    assert {"rounded to nearest", "rounded stochastically", "77%"} <= set(texts)
