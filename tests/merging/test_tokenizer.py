"""The tokenizer beside an adapter reaches merged files as llama.cpp's converter writes it for the merged model."""

import json
import shutil

import llama_cpp
import peft
import pytest
import torch
import transformers

import gguflora
from support import builders
from support.oracles.gguf_files import read_metadata
from support.oracles.llama_cpp import convert_model
from support.workspace import workspace

TEMPLATE = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def field(request):
    """A base with spare rows, an adapter whose tokenizer names some of them, and the converted merged model."""
    arch = request.param
    source, folder = builders.hf_model(arch), workspace() / f"tokenizer-{arch}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = convert_model(folder / "base", folder / "base.gguf")
    tokenizer.add_tokens(["gguf\u2581lora"])
    tokenizer.add_tokens(["<|turn|>"])
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return base, folder / "adapter", convert_model(folder / "merged", folder / "merged.gguf")


def tokenizer_of(path):
    return {key: value for key, value in read_metadata(path).items() if key.startswith("tokenizer.")}


def test_merged_file_has_the_tokenizer_that_the_converter_writes(field, tmp_path):
    base, adapter, expected = field
    assert tokenizer_of(base) != tokenizer_of(expected)
    report = gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert tokenizer_of(tmp_path / "merged.gguf") == tokenizer_of(expected)
    assert report.warnings == ()
    assert any("4 tokens" in text for text in report.tokenizer)
    assert "chat template" in report.tokenizer
    assert any(text.startswith("eos_token_id = ") for text in report.tokenizer)


def test_llama_cpp_reads_the_new_tokens(field, tmp_path):
    base, adapter, expected = field
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    mine, theirs = (
        llama_cpp.Llama(str(p), vocab_only=True, verbose=False) for p in (tmp_path / "merged.gguf", expected)
    )
    text = b"a<|turn|>gguf lora[END]"
    assert mine.tokenize(text, special=True) == theirs.tokenize(text, special=True)
    assert mine.token_eos() == theirs.token_eos()


def test_patch_carries_the_tokenizer(field, tmp_path):
    base, adapter, expected = field
    gguflora.merge(base, adapter, patch=tmp_path / "change.patch")
    gguflora.apply_patch(base, tmp_path / "change.patch", tmp_path / "patched.gguf")
    assert tokenizer_of(tmp_path / "patched.gguf") == tokenizer_of(expected)


def test_in_place_keeps_the_tokenizer_and_says_so(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copy(base, tmp_path / "model.gguf")
    report = gguflora.merge(copy, adapter, in_place=True)
    assert tokenizer_of(copy) == tokenizer_of(base)
    assert report.tokenizer == ()
    assert any("cannot change metadata" in text and "chat template" in text for text in report.warnings)


def test_convert_names_the_differences(field, tmp_path):
    base, adapter, _ = field
    report = gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    (warning,) = (text for text in report.warnings if "tokenizer differs" in text)
    assert "4 tokens" in warning
    assert "chat template" in warning
    assert "eos_token_id" in warning


def test_the_same_tokenizer_changes_nothing(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    for path in (base.parent / "base").glob("*token*"):
        shutil.copy(path, copy)
    report = gguflora.merge(base, copy, tmp_path / "merged.gguf")
    assert report.tokenizer == ()
    assert tokenizer_of(tmp_path / "merged.gguf") == tokenizer_of(base)
    assert gguflora.convert(copy, base, tmp_path / "lora.gguf").warnings == ()


def test_a_conversion_survives_a_damaged_tokenizer(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    (warning,) = gguflora.convert(copy, base, tmp_path / "lora.gguf").warnings
    assert "was not compared" in warning
    assert "fetch the file again" in warning


def test_a_token_that_is_not_listed_as_added_stays_special(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    content = json.loads((copy / "tokenizer.json").read_text())
    before = read_metadata(base)
    number = before["tokenizer.ggml.token_type"].index(3)  # a control token
    content["model"]["vocab"][before["tokenizer.ggml.tokens"][number]] = number
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != number]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    (copy / "tokenizer_config.json").unlink()
    gguflora.merge(base, copy, tmp_path / "merged.gguf")
    assert read_metadata(tmp_path / "merged.gguf")["tokenizer.ggml.token_type"][number] == 3


def test_tokens_without_a_row_are_named(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 5000, "content": "[FAR]"})
    (copy / "tokenizer.json").write_text(json.dumps(content))
    report = gguflora.merge(base, copy, tmp_path / "merged.gguf")
    assert any("[FAR]" in text for text in report.warnings)


def test_adapters_with_different_tokens_are_refused(field, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "other")
    content = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(content.replace("<|turn|>", "<|call|>"))
    with pytest.raises(gguflora.GgufloraError, match=r"tokenizer has another tokenizer\.ggml\.tokens"):
        gguflora.merge(base, [adapter, copy], tmp_path / "merged.gguf")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
)
@pytest.mark.parametrize(
    "content",
    [
        b"[",
        b"[]",
        b'{"added_tokens": [3], "chat_template": 5}',
        b"\xff",
        b'{"model": 3}',
        b'{"added_tokens": [{"id": -1, "content": "x"}]}',
        b'{"x": -1}',
    ],
)
def test_damaged_files_give_one_error(field, name, content, tmp_path):
    base, adapter, _ = field
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / name).write_bytes(content)
    try:
        gguflora.merge(base, copy, tmp_path / "merged.gguf")
    except gguflora.GgufloraError as error:
        assert str(copy) in str(error)
