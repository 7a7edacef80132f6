"""No text can overflow the stack: long runs give llama.cpp's own tokens, or an error; each case in its own process."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.vocabularies import PRE_TOKENIZERS, vocabulary

RUNS = {"letters": "a", "digits": "1", "spaces": " ", "punctuation": ".", "cjk": "\u4e2d", "mixed": "aB1-"}
# In one process, each run of a pre-tokenizer: the tokens of 30 000 characters, by a stack of 1 GiB and by gguflora,
# and of 2 MB, by gguflora.
ATTACK = """
import ast, os, sys, threading
import llama_cpp
from gguflora.errors import RequestError
from gguflora.runtime.llama_internals import silence
from gguflora.runtime.tokenizing import _tokens, pre_tokenizer, tokenize
silence(verbose=False)
parameters = llama_cpp.llama_model_default_params()
parameters.vocab_only = True
model = llama_cpp.llama_model_load_from_file(os.fsencode(sys.argv[1]), parameters)
vocab, pre = llama_cpp.llama_model_get_vocab(model), pre_tokenizer(model)
options = {"add_bos": False, "special": True}
def on_big_stack(text):
    found = []
    threading.stack_size(1 << 30)
    thread = threading.Thread(target=lambda: found.append(_tokens(vocab, text.encode(), False, True)))
    thread.start()
    thread.join()
    threading.stack_size(0)
    return found[0]
for unit in ast.literal_eval(sys.argv[2]):
    text = unit * (30_000 // len(unit))
    if pre == "superbpe" and unit == "1":  # llama.cpp needs half a minute for 30 000 digits
        text = unit * 1500
    assert tokenize(vocab, text, pre=pre, **options) == on_big_stack(text), unit
    try:
        assert tokenize(vocab, unit * ((2 << 20) // len(unit.encode())), pre=pre, **options)
    except RequestError as error:
        assert "in a row" in str(error)
print("survived", pre)
"""


def attack(tmp_path: Path, pre: str, units: list[str]) -> None:
    file = vocabulary(tmp_path / "vocabulary.gguf", pre)
    result = subprocess.run(
        [sys.executable, "-P", "-c", ATTACK, str(file), repr(units)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"survived {pre}\n"), result.stderr[-1000:]


@pytest.mark.parametrize("pre", ["tekken", "bloom", "qwen2"])
def test_a_long_run_does_not_end_the_process(tmp_path, pre):
    attack(tmp_path, pre, [RUNS["letters"], RUNS["spaces"]])


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_survives_every_run(tmp_path, pre):
    attack(tmp_path, pre, list(RUNS.values()))
