"""The demo's model and adapters as shipped: loaded by llama.cpp, transformers and PEFT, and compared there."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

import gguflora

DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"
BASE = DEMO / "base.gguf"
ADAPTERS = ("shout", "verse")
PROMPT = "Q: Where does the otter live?\nA:"
TEXTS = [
    PROMPT,
    " THE OWL HUNTS FOR MICE AT NIGHT,\nBY SILVER STARS AND PALE MOONLIGHT.",
    "It's   odd  spacing,\n\n\ttabs, don't we'll 12345 and (punctuation)!?  ",
    "Käse, 漢字 and 🦦 are not in the training text",
]


@pytest.fixture(scope="module")
def llama():
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(BASE), n_ctx=256, n_threads=2, logits_all=True, verbose=False, seed=1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DEMO, gguf_file=BASE.name)


@pytest.fixture
def torch_model():
    """The model as transformers reads it from the GGUF file, dequantized to F32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, gguf_file=BASE.name, dtype=torch.float32).eval()


def llama_logits(llm, tokens):
    llm.reset()
    llm.eval(tokens)
    return np.array(llm.scores[: len(tokens)])


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def greedy(llm, prompt):
    llm.reset()
    return llm.create_completion(prompt, max_tokens=110, temperature=0.0)["choices"][0]["text"]


def test_files_are_small_and_complete():
    assert 2_000_000 < BASE.stat().st_size < 5_000_000
    for name in ADAPTERS:
        assert sorted(p.name for p in (DEMO / name).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert 100_000 < (DEMO / name / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_base_is_untied_llama_in_q8_0():
    reader = GGUFReader(BASE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.license"] == "mit"
    assert fields["llama.embedding_length"] % 256 == 0
    assert fields["llama.feed_forward_length"] % 256 == 0
    assert fields["llama.attention.head_count"] > fields["llama.attention.head_count_kv"] > 1
    types = {t.name: t.tensor_type for t in reader.tensors}
    assert "output.weight" in types
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        assert tensor.tensor_type == (GGMLQuantizationType.Q8_0 if matrix else GGMLQuantizationType.F32), tensor.name


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers_and_turn_back_into_the_text(llama, tokenizer, text):
    tokens = llama.tokenize(text.encode(), add_bos=False, special=False)
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.detokenize(tokens).decode() == text
    assert llama.tokenize(text.encode()) == [llama.token_bos(), *tokens]


def write_dequantized(path):
    """Write the base with all tensors in F32."""
    reader, writer = GGUFReader(BASE), GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            item = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_logits_of_llama_cpp_are_those_of_torch(llama, torch_model):
    tokens = llama.tokenize((PROMPT + " It lives by the river. It eats fish.").encode())
    found, expected = llama_logits(llama, tokens), torch_logits(torch_model, tokens)
    # Measured: up to 0.19 on logits up to 23; llama.cpp rounds the activations to Q8_0 where the weights are Q8_0.
    assert np.abs(found - expected).max() < 0.4
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_logits_of_dequantized_base_are_those_of_torch(torch_model, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    write_dequantized(tmp_path / "f32.gguf")
    llm = llama_cpp.Llama(str(tmp_path / "f32.gguf"), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    tokens = llm.tokenize((PROMPT + " It lives by the river. It eats fish.").encode())
    found, expected = llama_logits(llm, tokens), torch_logits(torch_model, tokens)
    llm.close()
    assert np.abs(found - expected).max() < 0.01  # the KV cache is F16


def test_base_answers_in_plain_words(llama):
    text = greedy(llama, PROMPT)
    assert "by the river" in text
    assert "fish" in text
    assert text != text.upper()
    assert "\n" not in text.strip()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_real_peft_and_changes_the_style(name, llama, torch_model):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model = peft.PeftModel.from_pretrained(torch_model, DEMO / name).float().eval()
    ids = torch.tensor([llama.tokenize(PROMPT.encode())])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=110, do_sample=False, pad_token_id=1
    )
    text = llama.detokenize([t for t in output[0, ids.shape[1] :].tolist() if t != llama.token_eos()]).decode()
    if name == "shout":
        assert text == text.upper()
        assert "RIVER" in text
    else:
        assert text.count("\n") == 3
        assert "stream,\n" in text
        assert text != text.upper()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_covers_every_linear_module(name):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    tensors = safetensors_numpy.load_file(DEMO / name / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.model.layers.").rsplit(".", 2)[0] for key in tensors}
    assert len(modules) == 4 * 7
    assert len(tensors) == 2 * len(modules)
    for key, value in tensors.items():
        assert np.isfinite(value).all(), key
        assert np.abs(value).max() > 0, key
