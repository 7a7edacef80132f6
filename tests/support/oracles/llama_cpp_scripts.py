"""Run llama.cpp's converter scripts in one process of their own, which imports torch once.

Not a test: `llama_cpp.py` starts `python llama_cpp_scripts.py DIRECTORY_OF_LLAMA_CPP` and speaks JSON lines with it
(a list of the script's name and arguments in, null or the error's text out). The scripts use the gguf-py beside them.

The vocabulary is patched: the tests' byte-level tokenizers have no known pre-tokenizer hash and no sentencepiece model,
so every model's vocabulary is written by llama.cpp's own `_set_vocab_gpt2`, but for directories with a SentencePiece
tokenizer, where the class's own way is taken. Weights, names and hyperparameters are not
touched. BaichuanModel.modify_tensors calls itself without end for all but W_pack; the others are mapped by its parent.
StableLMModel.modify_tensors, a generator, returns the stacked norms of the heads where it should yield them.
"""

import contextlib
import io
import json
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Serve requests until stdin is closed."""
    llama_cpp = Path(sys.argv[1])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import conversion
    import torch

    torch.set_num_threads(1)
    find_model_class = conversion.get_model_class

    own_ways = {}

    def set_vocab(self):
        if _has_sentencepiece(self.dir_model):
            own_ways[type(self)](self)
            return
        conversion.TextModel._set_vocab_gpt2(self)
        if "type_vocab_size" in self.hparams:  # BERT's own way would write it, too
            self.gguf_writer.add_token_type_count(self.hparams["type_vocab_size"])

    def get_model_class(*args, **kwargs):
        model_class = find_model_class(*args, **kwargs)
        own_ways.setdefault(model_class, getattr(model_class, "set_vocab", None))  # those of mmproj files have none
        model_class.set_vocab = set_vocab
        return model_class

    conversion.get_model_class = get_model_class
    own_ways[_llama_model()] = _llama_model().set_vocab
    _llama_model().set_vocab = set_vocab  # which Mistral3Model makes one of, unasked
    _mend_baichuan()
    _mend_stablelm()
    conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"

    for line in sys.stdin:
        script, *arguments = json.loads(line)
        sys.argv = [script, *arguments]
        log = io.StringIO()
        logging.root.handlers = [logging.StreamHandler(log)]
        error = None
        try:
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
                runpy.run_path(str(llama_cpp / script), run_name="__main__")
        except (Exception, SystemExit) as failure:
            if not (isinstance(failure, SystemExit) and not failure.code):
                error = log.getvalue() + traceback.format_exc()
        print(json.dumps(error), file=replies, flush=True)


def _has_sentencepiece(folder):
    if any((folder / name).is_file() for name in ("tokenizer.model", "spiece.model")):
        return True
    file = folder / "tokenizer.json"
    return file.is_file() and bool(json.loads(file.read_text())["model"].get("byte_fallback"))


def _llama_model() -> type:
    from conversion.llama import LlamaModel

    return LlamaModel


def _mend_baichuan() -> None:
    from conversion.baichuan import BaichuanModel, TextModel

    unpack = BaichuanModel.modify_tensors

    def modify_tensors(self, data, name, bid):
        return unpack(self, data, name, bid) if "W_pack" in name else TextModel.modify_tensors(self, data, name, bid)

    BaichuanModel.modify_tensors = modify_tensors


def _mend_stablelm() -> None:
    from conversion.stablelm import StableLMModel

    stack_norms = StableLMModel.modify_tensors

    def modify_tensors(self, data, name, bid):
        stacked = yield from stack_norms(self, data, name, bid)
        if stacked is not None:
            yield from stacked

    StableLMModel.modify_tensors = modify_tensors


if __name__ == "__main__":
    main()
