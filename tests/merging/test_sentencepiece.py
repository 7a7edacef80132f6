"""SentencePiece tokenizers beside an adapter reach merged files as llama.cpp's converter writes them."""

import json
import random
import re
import shutil
from functools import cache

import llama_cpp
import numpy as np
import peft
import pytest
import sentencepiece
import torch
import transformers as hf

import gguflora
from gguflora.adapters.sentencepiece_model import read_pieces
from gguflora.diagnostics.compare import BUILT_IN_TEXT
from support.oracles.gguf_files import read_metadata
from support.oracles.llama_cpp import convert_model, run_script
from support.workspace import workspace

WORDS = re.findall("[a-z]+", BUILT_IN_TEXT)
ROWS = 340
"""Rows of the embeddings; the tokenizers have fewer tokens."""

SIZES = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
BASES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, "bpe"),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, "bpe"),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, "bpe"),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, "bpe"),
}
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
ADDED = {"<|im_start|>": True, "<|im_end|>": True, "gguf\u2581lora": False, "two words": False}
"""Added tokens, and whether they are special."""


@cache
def pieces(kind):
    """A SentencePiece model, as Llama 2 has one: unk, bos, eos, 256 bytes, pieces."""
    folder = workspace() / "sentencepiece"
    folder.mkdir(exist_ok=True)
    dice = random.Random(0)
    lines = [" ".join(dice.choice(WORDS) for _ in range(12)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / kind), vocab_size=320, model_type=kind,
        byte_fallback=kind == "bpe", hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols="" if kind == "bpe" else "<sep>",
    )  # fmt: skip
    return folder / f"{kind}.model"


def tokens_of_the_base():
    return {"0": ("<unk>", True), "1": ("<s>", True), "2": ("</s>", True)}


def config(added=None, **more):
    """tokenizer_config.json of transformers 4, with the added tokens if they are given."""
    content = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, **more}
    if added is not None:
        content["added_tokens_decoder"] = {
            number: {"content": text, "special": special, "normalized": False}
            for number, (text, special) in added.items()
        }
    return content


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@cache
def base(name):
    """The checkpoint with a tokenizer.model, and its GGUF file."""
    folder = workspace() / f"pieces-{name}"
    config_class, model_class, kind = BASES[name]
    torch.manual_seed(0)
    model_class(config_class(**SIZES)).float().save_pretrained(folder / "base")
    shutil.copy(pieces(kind), folder / "base" / "tokenizer.model")
    write(folder / "base", {"tokenizer_config.json": config(tokens_of_the_base())})
    return folder / "base", convert_model(folder / "base", folder / "base.gguf")


def added_tokens():
    return {str(320 + number): (text, special) for number, (text, special) in enumerate(ADDED.items())}


def transformers_4(folder):
    """What a slow tokenizer of transformers 4 saves."""
    shutil.copy(pieces("bpe"), folder / "tokenizer.model")
    write(folder, {
        "tokenizer_config.json": config(
            {**tokens_of_the_base(), **added_tokens()}, eos_token="<|im_end|>", chat_template=TEMPLATE
        ),
        "added_tokens.json": {text: int(number) for number, (text, _) in added_tokens().items()},
    })  # fmt: skip


def early_transformers_4(folder):
    """Before added_tokens_decoder: added_tokens.json alone has the new tokens."""
    shutil.copy(pieces("bpe"), folder / "tokenizer.model")
    write(folder, {
        "tokenizer_config.json": config(eos_token="<|im_end|>"),
        "added_tokens.json": {text: int(number) for number, (text, _) in added_tokens().items()},
    })  # fmt: skip


def fast_transformers_4(folder):
    """A fast tokenizer of transformers 4: everything of the slow one, and tokenizer.json."""
    transformers_5(folder)
    transformers_4(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())  # the decoder has all that are added there
    decoder = {str(token["id"]): (token["content"], token["special"]) for token in saved["added_tokens"]}
    write(folder, {"tokenizer_config.json": config(decoder, eos_token="<|im_end|>", chat_template=TEMPLATE)})


def transformers_5(folder):
    """tokenizer.json, and no tokenizer.model."""
    source = workspace() / "sentencepiece" / "source"
    source.mkdir(exist_ok=True)
    shutil.copy(pieces("bpe"), source / "tokenizer.model")
    write(source, {"tokenizer_config.json": config(tokenizer_class="LlamaTokenizer")})
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    for text, special in ADDED.items():
        tokenizer.add_tokens([text], special_tokens=special)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()


SAVED = [transformers_4, early_transformers_4, fast_transformers_4, transformers_5]


def lora_of(name, save, folder):
    """A LoRA with a tokenizer."""
    source, _ = base(name)
    model = BASES[name][1].from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save(folder / "adapter")
    return folder / "adapter"


def adapter(name, save, folder):
    """A LoRA with a tokenizer, and the vocabulary that the converter writes for the merged model."""
    lora, source = lora_of(name, save, folder), base(name)[0]
    merged = shutil.copytree(source, folder / "merged", ignore=shutil.ignore_patterns("*token*"))
    save(merged)
    out = folder / "expected.gguf"
    run_script("convert_hf_to_gguf.py", merged, "--outfile", out, "--vocab-only")
    return lora, out


def tokenizer_of(path):
    return {key: value for key, value in read_metadata(path).items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_are_those_that_sentencepiece_reads(kind):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces(kind)))
    found = read_pieces(pieces(kind))
    assert len(found) == processor.vocab_size()
    for number, piece in enumerate(found):
        assert piece.text == processor.id_to_piece(number)
        assert piece.score == processor.get_score(number)
        assert (piece.kind == 2) == processor.is_unknown(number)
        assert (piece.kind == 3) == processor.is_control(number)
        assert (piece.kind == 6) == processor.is_byte(number)


CASES = [(name, save) for save in SAVED for name in BASES if save is not transformers_5 or "gemma" not in name]
"""The converter wants a tokenizer.model for Gemma 2, and makes a BPE of bytes of Gemma 3 without one."""


@pytest.mark.parametrize(("name", "save"), CASES)
def test_merged_file_has_the_tokenizer_that_the_converter_writes(name, save, tmp_path):
    lora, expected = adapter(name, save, tmp_path)
    gguflora.merge(base(name)[1], lora, tmp_path / "merged.gguf")
    found, wanted = tokenizer_of(tmp_path / "merged.gguf"), tokenizer_of(expected)
    assert wanted.pop("tokenizer.ggml.add_sep_token", None) in {None, False}  # says what is so without it
    if save is transformers_5:  # the converter has no scores and no padding then: the base's are right
        count, before = len(wanted["tokenizer.ggml.tokens"]), tokenizer_of(base(name)[1])
        scores = found.pop("tokenizer.ggml.scores")
        assert scores[:320] == before["tokenizer.ggml.scores"][:320]
        assert set(scores[320:count]) == set(wanted.pop("tokenizer.ggml.scores")) == {-1000.0}
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            found[key] = found[key][:count]
    assert found == wanted


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_tokens_of_gemma_without_tokenizer_model(name, tmp_path):
    gguflora.merge(base(name)[1], lora_of(name, transformers_5, tmp_path), tmp_path / "merged.gguf")
    found, before = tokenizer_of(tmp_path / "merged.gguf"), tokenizer_of(base(name)[1])
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[320:324] == list(ADDED)
    assert tokens[:320] + tokens[324:] == before["tokenizer.ggml.tokens"][:320] + before["tokenizer.ggml.tokens"][324:]
    assert found["tokenizer.ggml.token_type"][320:324] == [4, 3, 4, 4]  # tokenizer_config.json names the second
    assert found["tokenizer.ggml.eos_token_id"] == 321


@pytest.mark.parametrize("save", [transformers_4, transformers_5], ids=lambda save: save.__name__)
def test_llama_cpp_reads_the_new_tokens(save, tmp_path):
    lora, expected = adapter("llama", save, tmp_path)
    gguflora.merge(base("llama")[1], lora, tmp_path / "merged.gguf")
    mine, theirs = (
        llama_cpp.Llama(str(path), vocab_only=True, verbose=False) for path in (tmp_path / "merged.gguf", expected)
    )
    text = b"the quick fox<|im_start|>two words under a tree<|im_end|>"
    assert 320 in mine.tokenize(text, special=True)
    assert mine.token_eos() == theirs.token_eos()
    if save is transformers_4:
        assert mine.tokenize(text, special=True) == theirs.tokenize(text, special=True)


def test_the_same_tokenizer_changes_nothing(tmp_path):
    source, file = base("llama")
    lora, _ = adapter("llama", transformers_4, tmp_path)
    for path in source.glob("*token*"):
        shutil.copy(path, lora)
    (lora / "added_tokens.json").unlink()
    report = gguflora.merge(file, lora, tmp_path / "merged.gguf")
    assert report.tokenizer == ()
    assert tokenizer_of(tmp_path / "merged.gguf") == tokenizer_of(file)
    assert gguflora.convert(lora, file, tmp_path / "lora.gguf").warnings == ()


def test_a_grown_vocabulary(tmp_path):
    """New tokens past the rows of the base, with trained rows, and rows of padding behind them."""
    source, file = base("llama")
    model = hf.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + 8, mean_resizing=False)
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    new = {**tokens_of_the_base(), str(ROWS + 2): ("<|im_start|>", True), str(ROWS + 3): ("two words", False)}
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        shutil.copy(pieces("bpe"), folder / "tokenizer.model")
        write(folder, {"tokenizer_config.json": config(new)})
    gguflora.merge(file, tmp_path / "adapter", tmp_path / "out.gguf")
    convert_model(tmp_path / "merged", tmp_path / "expected.gguf")
    assert tokenizer_of(tmp_path / "out.gguf") == tokenizer_of(tmp_path / "expected.gguf")
    assert read_metadata(tmp_path / "out.gguf")["llama.vocab_size"] == ROWS + 8


def test_another_sentencepiece_model_replaces_all_pieces(tmp_path):
    """The converter takes every piece, with its score, from the adapter's tokenizer.model."""

    def save(folder):
        transformers_4(folder)
        content = (folder / "tokenizer.model").read_bytes()
        old = sentencepiece.SentencePieceProcessor(model_file=str(pieces("bpe")))
        text = max((old.id_to_piece(number) for number in range(260, 320)), key=len)
        assert content.count(text.encode()) == 1
        other = text[:-1] + ("x" if text[-1] != "x" else "y")
        (folder / "tokenizer.model").write_bytes(content.replace(text.encode(), other.encode()))

    lora, expected = adapter("llama", save, tmp_path)
    gguflora.merge(base("llama")[1], lora, tmp_path / "merged.gguf")
    assert tokenizer_of(tmp_path / "merged.gguf") == tokenizer_of(expected)


def test_a_tokenizer_of_another_kind_is_named_and_left_out(tmp_path):
    lora, _ = adapter("llama", transformers_5, tmp_path)
    file = json.loads((lora / "tokenizer.json").read_text())
    file["model"]["byte_fallback"] = False
    (lora / "tokenizer.json").write_text(json.dumps(file))
    report = gguflora.merge(base("llama")[1], lora, tmp_path / "merged.gguf")
    assert any("BPE of bytes" in text and "tokens are kept" in text for text in report.warnings)
    found, before = tokenizer_of(tmp_path / "merged.gguf"), tokenizer_of(base("llama")[1])
    assert found == before | {"tokenizer.chat_template": TEMPLATE}
    assert any(
        "BPE of bytes" in text for text in gguflora.convert(lora, base("llama")[1], tmp_path / "l.gguf").warnings
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"IQ== 0\nIg== 1\n", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff"],
)
def test_damaged_models_give_one_error(content, tmp_path):
    lora, _ = adapter("llama", transformers_4, tmp_path)
    (lora / "tokenizer.model").write_bytes(content)
    with pytest.raises(gguflora.GgufloraError, match="SentencePiece"):
        gguflora.merge(base("llama")[1], lora, tmp_path / "merged.gguf")
    (warning,) = gguflora.convert(lora, base("llama")[1], tmp_path / "lora.gguf").warnings
    assert "was not compared" in warning


def test_flags_that_begin_and_end_texts(tmp_path):
    def save(folder):
        transformers_4(folder)
        content = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, {"tokenizer_config.json": content | {"add_bos_token": False}})

    lora, expected = adapter("llama", save, tmp_path)
    report = gguflora.merge(base("llama")[1], lora, tmp_path / "merged.gguf")
    assert tokenizer_of(tmp_path / "merged.gguf") == tokenizer_of(expected)
    assert "add_bos_token = False (base: True)" in report.tokenizer


def test_scores_are_float32():
    assert all(piece.score == float(np.float32(piece.score)) for piece in read_pieces(pieces("unigram")))
