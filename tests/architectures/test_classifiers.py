"""Classification heads: PEFT trains them wholly, and llama.cpp keeps them in ``cls`` and ``cls.output``."""

import numpy as np
import peft
import pytest
import torch

import gguflora
from gguflora.errors import ArchitectureError, UnsupportedAdapterError
from support import builders, zoo
from support.asserts import assert_close

MODELS = {
    "bert_labels": ("query", {"cls.output.weight", "cls.output.bias"}),
    "roberta_labels": ("query", {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"}),
    "distilbert_labels": ("q_lin", {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"}),
    "modernbert_labels": ("Wo", {"cls.weight", "cls.norm.weight", "cls.output.weight", "cls.output.bias"}),
}
"""Modules with a LoRA, and the tensors of the head."""
HEADS = ["classifier", "pre_classifier", "head", "score"]


def classifier(name, tmp_path):
    """An adapter of a classifier as PEFT saves it, and PEFT's merged model by llama.cpp's converter."""
    config = {"task_type": "SEQ_CLS", "modules_to_save": HEADS, "target_modules": [MODELS[name][0]]}
    model = peft.get_peft_model(zoo.model(name), peft.LoraConfig(r=3, **config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", zoo.to_gguf(name, zoo.save(name, model.merge_and_unload(), tmp_path / "merged"))


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_merged(name, tmp_path):
    adapter, merged = classifier(name, tmp_path)
    base = zoo.gguf_model(name)
    report = gguflora.merge(base, adapter, tmp_path / "out.gguf")
    found, expected, before = (zoo.tensors(path) for path in (tmp_path / "out.gguf", merged, base))
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        assert_close(found[tensor], values, 1e-5, tensor)
    changed = {tensor for tensor, values in expected.items() if not np.array_equal(values, before[tensor])}
    assert {tensor.name for tensor in report.tensors} == changed
    assert {tensor for tensor in changed if tensor.startswith("cls")} == MODELS[name][1]


def test_a_lora_cannot_hold_a_head(tmp_path):
    adapter, _ = classifier("bert_labels", tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="merge the adapter"):
        gguflora.convert(adapter, zoo.gguf_model("bert_labels"), tmp_path / "lora.gguf")


def test_a_model_without_a_head_says_so(tmp_path):
    model = peft.get_peft_model(
        zoo_llama_classifier(), peft.LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArchitectureError, match=r"score\.weight is a classification head, and the file holds none"):
        gguflora.merge(builders.gguf_model("llama"), tmp_path / "adapter", tmp_path / "out.gguf")


def zoo_llama_classifier():
    import transformers

    config = transformers.AutoConfig.from_pretrained(builders.hf_model("llama"))
    config.num_labels = 3
    return transformers.AutoModelForSequenceClassification.from_config(config)
