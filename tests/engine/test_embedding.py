"""Embeddings and scores: those of llama-cpp-python in the same pooling, and of PEFT in torch under adapters."""

from functools import cache

import llama_cpp
import numpy as np
import pytest
import torch
import transformers as hf

import gguflora
from gguflora.engine import Engine, Request
from gguflora.errors import PromptTooLongError, RequestError
from support import builders, zoo
from support.engines import OPTIONS, files
from support.oracles.llama_cpp import quiet_llama_cpp
from support.soft_prompts import trained
from support.workspace import workspace

TOKENS = [5, 100, 7, 8, 9, 200, 120, 5, 5, 30]
TEXTS = [TOKENS, [42], list(range(40, 80))]


def llama_cpps(path, texts, pooling, lora=None):
    """What llama-cpp-python computes for these tokens."""
    with quiet_llama_cpp():
        llm = llama_cpp.Llama(
            str(path), embedding=True, n_ctx=256, n_batch=256, n_threads=1, pooling_type=pooling, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, lora_path=lora and str(lora),
        )  # fmt: skip
    found = []
    for tokens in texts:
        llm.tokenize = lambda *_, tokens=tokens, **__: tokens
        found.append(llm.embed(""))
    llm.close()
    return found


def test_causal_models_give_the_mean():
    path = builders.gguf_model("llama")
    with Engine(path, adapters=files(), **OPTIONS | {"n_batch": 16}) as engine:
        plain = engine.embed(TEXTS)
        np.testing.assert_allclose(plain, llama_cpps(path, TEXTS, llama_cpp.LLAMA_POOLING_TYPE_MEAN), atol=1e-5)
        adapted = engine.embed(TEXTS, engine.adapter_set("a"))
        wanted = llama_cpps(path, TEXTS, llama_cpp.LLAMA_POOLING_TYPE_MEAN, files()["a"])
        np.testing.assert_allclose(adapted, wanted, atol=1e-5)
        assert np.abs(adapted - plain).max() > 0.01
        np.testing.assert_array_equal(engine.embed(TEXTS), plain)  # the adapter is off again
        engine.unload("a")
        np.testing.assert_array_equal(engine.embed(TEXTS), plain)
        assert engine.submit(Request(TOKENS, max_tokens=3)).text() is not None


@cache
def pooled_model(kind):
    """The same model with a pooling named in its file."""
    import gguf

    source, target = builders.gguf_model("llama"), workspace() / f"pooled-{kind}.gguf"
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    writer.add_pooling_type(gguf.PoolingType(kind))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("kind", [llama_cpp.LLAMA_POOLING_TYPE_CLS, llama_cpp.LLAMA_POOLING_TYPE_LAST])
def test_the_pooling_of_the_file(kind):
    with Engine(pooled_model(kind), **OPTIONS | {"n_batch": 16}) as engine:
        found = engine.embed(TEXTS)
    np.testing.assert_allclose(found, llama_cpps(pooled_model(kind), TEXTS, -1), atol=1e-5)


@cache
def bert_adapter():
    """A LoRA of PEFT on BERT, and its hidden states with and without it."""
    model = zoo.peft_model("bert")
    folder = workspace() / "bert-lora"
    model.save_pretrained(folder)
    with torch.inference_mode():
        states = [model(torch.tensor([tokens])).last_hidden_state[0].mean(0).numpy() for tokens in TEXTS]
        with model.disable_adapter():
            plain = [model(torch.tensor([tokens])).last_hidden_state[0].mean(0).numpy() for tokens in TEXTS]
    return folder, np.stack(states), np.stack(plain)


def test_an_encoder_under_adapters_is_pefts():
    path = zoo.gguf_model("bert")
    folder, wanted, plain = bert_adapter()
    gguflora.convert(folder, path, workspace() / "bert-lora.gguf")
    adapters = {"tuned": workspace() / "bert-lora.gguf"}
    with Engine(path, adapters=adapters, **OPTIONS | {"n_ctx": 128}) as engine:
        np.testing.assert_allclose(engine.embed(TEXTS), plain, atol=2e-3)
        np.testing.assert_allclose(engine.embed(TEXTS, engine.adapter_set("tuned")), wanted, atol=2e-3)
        assert np.abs(wanted - plain).max() > 0.05
        assert not engine.can_generate
        with pytest.raises(RequestError, match="embeds texts and cannot generate"):
            engine.submit(Request(TOKENS))
        with pytest.raises(PromptTooLongError, match="129 tokens, but at most 128"):
            engine.embed([[5] * 129])
        assert engine.embed([[5] * 128]).shape == (1, 64)


@cache
def ranking_model():
    """A BERT with a head of one score, its GGUF file by llama.cpp's converter, and the head's own scores."""
    torch.manual_seed(3)
    config = hf.BertConfig(**zoo.MODELS["bert"].fields, num_labels=1)
    model = hf.BertForSequenceClassification(config).float().eval()
    path = zoo.save("bert", model, workspace() / "ranking")
    return model, zoo.to_gguf("bert", path)


def test_scores_are_those_of_the_head():
    model, path = ranking_model()
    with Engine(path, **OPTIONS | {"n_ctx": 128}) as engine:
        assert engine.can_rank
        documents = ["the ant and the hound", "a", "thin things on the other tower"]
        scores, n_tokens = engine.rank("the hunter", documents)
        pairs = [engine._model.pair("the hunter", document) for document in documents]
        with torch.inference_mode():
            states = [model.bert(torch.tensor([pair])).last_hidden_state[0, 0] for pair in pairs]
            wanted = [model.classifier(state).item() for state in states]  # llama.cpp's converter drops the pooler
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
        assert np.ptp(wanted) > 1e-3
        assert n_tokens == sum(map(len, pairs))
        with pytest.raises(RequestError, match="ranks documents and does not embed"):
            engine.embed(TEXTS)


def test_what_cannot_be_embedded():
    soft = trained("llama", "PROMPT_TUNING")[0]
    with Engine(builders.gguf_model("llama"), adapters={"soft": soft}, **OPTIONS) as engine:
        with pytest.raises(RequestError, match="soft prompt"):
            engine.embed(TEXTS, engine.adapter_set("soft"))
        with pytest.raises(RequestError, match="has no tokens"):
            engine.embed([[]])
        with pytest.raises(RequestError, match="token of the prompt is 9999"):
            engine.embed([[9999]])
        with pytest.raises(PromptTooLongError, match="300 tokens"):
            engine.embed([[5] * 300])
        with pytest.raises(RequestError, match="no head that ranks"):
            engine.rank("a", ["b"])
        assert engine.submit(Request(TOKENS, max_tokens=1)).text() is not None
