"""Requirements that would let in a version with a known hole are found."""

import pytest

from tools import ROOT, floors

TEXT = (ROOT / "pyproject.toml").read_text()


def test_ours():
    assert floors.problems(TEXT) == []


@pytest.mark.parametrize(
    ("ours", "other", "said"),
    [
        ('"jinja2>=3.1.6"', '"jinja2>=3.1.5"', "CVE-2025-27516"),
        ('"jinja2>=3.1.6"', '"pyyaml"', "runtime: jinja2>=3.1.6 is missing"),
        ('"starlette>=0.49.1"', '"starlette"', "CVE-2025-62727"),
        ('torch = ["torch>=2.6"]', 'torch = ["torch>=2.5.1"]', "torch: torch>=2.5.1"),
        ('"h11>=0.16"', '"h11<1"', "h11<1 lets in"),
        ('"setuptools>=78.1.1"', '"setuptools>=77"', "build-system"),
    ],
)
def test_others(ours, other, said):
    assert ours in TEXT
    assert said in "\n".join(floors.problems(TEXT.replace(ours, other)))
