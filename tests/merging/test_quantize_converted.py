"""`quantize` against llama.cpp on models by llama.cpp's converter, with all their metadata."""

import pytest

from support import zoo
from support.llama_quantize import is_same

ORDINARY = {"llama", "t5"}
"""The others take long together. In T5's names llama-quantize sees no layers."""


@pytest.mark.parametrize(
    "name", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.full) for name in zoo.MODELS]
)
def test_converted_models(name, tmp_path):
    """Small columns, so that types fall back."""
    source = zoo.gguf_model(name)
    for preset in ("Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0"):
        assert is_same(source, tmp_path, preset)
