"""A Llama, and adapters a and b loaded on it."""

import pytest

from gguflora.runtime import attached
from support.hotswap import A, B, gguf_lora, open_llama


@pytest.fixture
def llm():
    llm = open_llama()
    yield llm
    llm.close()


@pytest.fixture
def adapters(llm):
    adapters = attached.attach(llm)
    adapters.load("a", gguf_lora(A))
    adapters.load("b", gguf_lora(B))
    return adapters
