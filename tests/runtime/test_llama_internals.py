"""What gguflora needs of llama-cpp-python's insides is probed, and what is missing is named."""

from types import SimpleNamespace

import llama_cpp
import pytest

import gguflora
from gguflora.diagnostics import demo
from gguflora.errors import HotSwapError
from gguflora.runtime.llama_internals import check_internals, kv_bytes_of, reset_asked


class FakeLlama:
    """A Llama as it is known to be; a test takes one thing away."""

    def __init__(self):
        method = lambda *_: None  # noqa: E731
        self._ctx = SimpleNamespace(ctx=1, decode=method, kv_cache_seq_rm=method)
        self._model = SimpleNamespace(model=1)
        self._stack = SimpleNamespace(callback=method)
        self._lora_adapter = None
        self._n_ctx = 64
        self._requires_eval = False

    def _create_completion(self): ...
    def generate(self, tokens, reset=True): ...
    def eval(self, tokens): ...
    def reset(self): ...
    def save_state(self): ...
    def load_state(self, state): ...


def test_a_fake_as_it_should_be_passes():
    check_internals(FakeLlama())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("", "_ctx"),
        ("", "_model"),
        ("", "_stack"),
        ("", "_lora_adapter"),
        ("", "_n_ctx"),
        ("", "_requires_eval"),
        ("_ctx", "ctx"),
        ("_ctx", "decode"),
        ("_ctx", "kv_cache_seq_rm"),
        ("_model", "model"),
        ("_stack", "callback"),
    ],
)
def test_what_is_missing_is_named(owner, name):
    llm = FakeLlama()
    delattr(getattr(llm, owner) if owner else llm, name)
    with pytest.raises(HotSwapError, match=rf"{name}\b.*0\.3\.36 is known to work"):
        check_internals(llm)


def test_a_method_that_has_gone_is_named():
    class Other(FakeLlama):
        _create_completion = None

        def generate(self, tokens, keep=False): ...

    with pytest.raises(HotSwapError, match=r"Llama\._create_completion"):
        check_internals(Other())

    class WithoutReset(FakeLlama):
        def generate(self, tokens, keep=False): ...

    with pytest.raises(HotSwapError, match=r"generate\(reset=\)"):
        check_internals(WithoutReset())


def test_the_installed_one_has_everything():
    llm = llama_cpp.Llama(str(demo.BASE), n_ctx=64, verbose=False)
    check_internals(llm)
    with gguflora.attach(llm):
        check_internals(llm)
    assert reset_asked(type(llm), (), {}) and not reset_asked(type(llm), (), {"reset": False})
    assert not reset_asked(llama_cpp.Llama, (40, 0.9, 0.05, 1.0, 0.8, 1.0, False), {})


def test_the_size_of_a_cache_is_read_from_the_log():
    log = (
        "llama_kv_cache: size =   12.00 MiB (   256 cells,  24 layers,  4/1 seqs), K (f16):    6.00 MiB\n"
        "llama_memory_recurrent: size =    0.50 MiB (     4 cells,  24 layers,  4 seqs)\n"
    )
    assert kv_bytes_of(log) == (12 << 20) + (1 << 19)
    assert kv_bytes_of("the cache is of 12 MiB") is None
