"""Every weight of a random model of each architecture, where llama.cpp's converter has put it; LoRAs on all of them."""

import json
import re
from functools import cache

import numpy as np
import pytest
import safetensors.torch

import gguflora
from gguflora.adapters.deltas import Replace
from gguflora.architectures import KNOWN
from gguflora.architectures.base_model import flat_shape, read_base
from gguflora.architectures.mapping import can_untie, slices_of
from gguflora.architectures.names import is_foreign
from gguflora.architectures.unruled import doubt_about
from gguflora.errors import ArchitectureError
from gguflora.placement.place import PlacedDelta
from support import zoo
from support.asserts import assert_close
from support.oracles.gguf_files import lora_changes
from support.oracles.llama_cpp import llama_decoder_logits, llama_embeddings, llama_logits

RUN = (
    "mistral", "mixtral", "qwen2moe", "qwen3next", "qwen35", "qwen35moe", "gemma", "gpt2", "gptneox", "phi2", "falcon",
    "bloom", "stablelm", "olmoe", "granite", "granitemoe_shared", "nemotron", "glm4", "exaone4", "cohere2", "gptoss",
    "llama4", "mamba", "jamba",
)  # fmt: skip
"""Those that are run in llama.cpp, which wants more of a model's sizes than the converter does."""

FROM_CONFIG = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi2", "phi3", "olmo", "olmo2", "granite", "smollm3",
    "stablelm", "starcoder2", "nemotron", "cohere", "cohere2", "exaone4", "glm4",
)  # fmt: skip

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""Parameters of transformers 5 that hold all experts of a layer."""

WITHOUT_GATE = ("experts.up_proj", "experts.down_proj")
"""Those of Nemotron-H's experts, which trainers have taken for gated ones (unslothai/unsloth#11014)."""

WITH_EXPERTS = (
    "mixtral", "qwen2moe", "qwen3moe", "qwen3next", "qwen35moe", "olmoe", "granitemoe", "deepseek2", "gptoss", "llama4",
    "jamba", "qwen3vlmoe", "kimi_linear", "minimax_m3", "hy_v4", "deepseek_v32", "granitemoe_swa", "step35",
)  # fmt: skip


def assert_pieces_equal(name, gguf, weights):
    """Each weight's pieces hold each of its values once, and are what the converter wrote; nothing is left over."""
    base, tensors = read_base(gguf), zoo.tensors(gguf)
    untouched = {tensor: np.ones(values.shape, bool) for tensor, values in tensors.items()}
    for path, matrix in zoo.as_matrices(name, weights):
        pieces = slices_of(base, path)
        refused = any(re.search(zoo.REFUSED.get(name, "^$"), piece.tensor) for piece in pieces)
        assert refused == any(doubt_about(base, path, piece.tensor) for piece in pieces), path
        if is_foreign(path) or refused:
            for piece in pieces:
                untouched.pop(piece.tensor, None)
            continue
        if path.endswith(zoo.ELSEWHERE) or (path == "lm_head.weight" and not can_untie(base)):
            assert not pieces, path
            continue
        assert pieces, f"{path} has no place"
        count = np.zeros(matrix.shape, int)
        if base.is_tied and pieces[0].tensor == "output.weight":
            continue
        for piece in pieces:
            placed = PlacedDelta(path, Replace(matrix), piece)
            rows = slice(piece.start, piece.start + placed.shape[0])
            stored = tensors[piece.tensor].reshape(flat_shape(tensors[piece.tensor].shape))
            np.testing.assert_allclose(stored[rows], placed.take(matrix) + piece.shift, atol=1e-6, err_msg=path)
            untouched[piece.tensor].reshape(stored.shape)[rows] = False
            back = np.zeros(matrix.shape)
            placed.put(stored[rows], back)
            count += back != 0
        assert count.max() == 1, path
        assert count.mean() > 0.99, path  # a few values may be 0
    left = {tensor for tensor, mask in untouched.items() if mask.any()}
    assert all(tensor.endswith("ssm_a") for tensor in left), f"no weight lies in {left}"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_checkpoints_weights_lie_where_the_converter_puts_them(name):
    assert_pieces_equal(name, zoo.gguf_model(name), zoo.saved_weights(name))


@pytest.mark.parametrize("name", zoo.HAS_CLASS)
def test_modules_weights_lie_where_the_converter_puts_them(name):
    """Under the names that PEFT sees, which are not always those of the checkpoint."""
    assert_pieces_equal(name, zoo.gguf_model(name), zoo.weights_in_memory(name))


def test_every_known_architecture_has_a_model():
    assert {read_base(zoo.gguf_model(name)).architecture for name in zoo.MODELS} == set(KNOWN)


@cache
def lora_of(name, *targets):
    """A random LoRA, by default on all linear layers: its directory, and PEFT's merged model by the converter."""
    path = zoo.checkpoint(name).parent / "-".join([name, "lora", *targets])
    options = {"target_modules": list(targets)} if targets else {}
    if targets in {EXPERTS, WITHOUT_GATE}:
        options = {"target_modules": [], "target_parameters": list(targets)}
    model = zoo.peft_model(name, **options)
    model.save_pretrained(path / "adapter")
    merged = zoo.save(name, model.merge_and_unload(), path / "merged")
    return path / "adapter", zoo.to_gguf(name, merged)


@pytest.mark.parametrize("name", zoo.HAS_CLASS)
def test_lora_on_every_linear_layer(name, tmp_path):
    assert_lora_equals_pefts_merge(name, *lora_of(name), tmp_path)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_lora_on_experts(name, tmp_path):
    """`target_parameters`: one pair of factors for all experts of a layer."""
    assert_lora_equals_pefts_merge(name, *lora_of(name, *EXPERTS), tmp_path)


def test_lora_on_experts_without_a_gate(tmp_path):
    assert_lora_equals_pefts_merge("nemotron_h_experts", *lora_of("nemotron_h_experts", *WITHOUT_GATE), tmp_path)


def assert_lora_equals_pefts_merge(name, adapter, merged, tmp_path):
    base, expected = zoo.tensors(zoo.gguf_model(name)), zoo.tensors(merged)
    changes = {key: expected[key] - values for key, values in base.items() if (expected[key] != values).any()}
    gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "merged.gguf")
    found = zoo.tensors(tmp_path / "merged.gguf")
    assert found.keys() == base.keys()
    for key, values in base.items():
        if key in changes:
            assert_close(found[key] - values, changes[key], 1e-4, key)
        else:
            np.testing.assert_array_equal(found[key], values, err_msg=key)
    gguflora.convert(adapter, zoo.gguf_model(name), tmp_path / "lora.gguf", outtype="f32")
    factors = lora_changes(tmp_path / "lora.gguf")
    assert factors.keys() == changes.keys()
    for key, change in changes.items():
        assert_close(factors[key], change, 1e-5, key)


@pytest.mark.parametrize("name", RUN)
def test_hot_logits_equal_those_of_the_merged_model(name, tmp_path):
    adapter, merged = lora_of(name)
    gguflora.convert(adapter, zoo.gguf_model(name), tmp_path / "lora.gguf", outtype="f32")
    expected = llama_logits(merged)
    assert np.abs(llama_logits(zoo.gguf_model(name)) - expected).max() > 0.5, "the adapter must matter"
    assert np.abs(llama_logits(zoo.gguf_model(name), tmp_path / "lora.gguf") - expected).max() < 5e-3


@pytest.mark.parametrize(("name", "run"), [("bert", llama_embeddings), ("t5", llama_decoder_logits)])
def test_hot_outputs_of_encoders_equal_those_of_the_merged_model(name, run, tmp_path):
    adapter, merged = lora_of(name)
    gguflora.convert(adapter, zoo.gguf_model(name), tmp_path / "lora.gguf", outtype="f32")
    gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "merged.gguf")
    expected = run(merged)
    assert np.abs(run(zoo.gguf_model(name)) - expected).max() > 0.5, "the adapter must matter"
    assert np.abs(run(zoo.gguf_model(name), tmp_path / "lora.gguf") - expected).max() < 5e-3
    assert np.abs(run(tmp_path / "merged.gguf") - expected).max() < 5e-3


def test_positions_that_gguf_leaves_out(tmp_path):
    """RoBERTa counts from one after its padding token; its converter cuts the rows before."""
    adapter, merged = lora_of("roberta", "position_embeddings", "query")
    base, expected = zoo.tensors(zoo.gguf_model("roberta")), zoo.tensors(merged)
    assert len(base["position_embd.weight"]) == 126
    gguflora.merge(zoo.gguf_model("roberta"), adapter, tmp_path / "merged.gguf")
    found = zoo.tensors(tmp_path / "merged.gguf")
    for key in ("position_embd.weight", "blk.1.attn_q.weight"):
        assert_close(found[key] - base[key], expected[key] - base[key], 1e-4, key)


@pytest.mark.parametrize(("name", "flag"), [("llama_biases", "--fuse-qkv"), ("qwen35moe", "--fuse-gate-up-exps")])
def test_weights_that_the_converter_has_fused(name, flag):
    fused = zoo.gguf_model(name, flag)
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"} <= zoo.tensors(fused).keys()
    assert_pieces_equal(name, fused, zoo.saved_weights(name))
    assert_pieces_equal(name, fused, zoo.weights_in_memory(name))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3", "qwen35", "llama4", "gptoss"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.text_model.", ""])
def test_language_models_of_multimodal_and_bare_models(name, prefix):
    base = read_base(zoo.gguf_model(name))
    for path, _ in zoo.as_matrices(name, zoo.weights_in_memory(name)):
        other = re.sub(r"^model\.", prefix, path)
        assert [vars_of(piece) for piece in slices_of(base, other)] == [
            vars_of(piece) for piece in slices_of(base, path)
        ]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "gptneox", "mamba", "phi2", "starcoder2"])
def test_bare_models(name):
    """``AutoModel`` has no head, and so no name for what is below it."""
    base = read_base(zoo.gguf_model(name))
    for path in zoo.weights_in_memory(name):
        bare = path.split(".", 1)[1]
        if not path.startswith(("lm_head", "embed_out")):
            assert [vars_of(piece) for piece in slices_of(base, bare)] == [
                vars_of(piece) for piece in slices_of(base, path)
            ]


def vars_of(piece):
    lists = [None if order is None else order.tolist() for order in (piece.rows, piece.columns)]
    return piece.tensor, piece.start, *lists, piece.transposed, piece.shift


def test_vision_towers_have_no_place():
    base = read_base(zoo.gguf_model("gemma3"))
    for weight in ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"):
        assert slices_of(base, f"model.{weight}") == []


def test_vocabulary_padding_is_left_out(tmp_path):
    """Gemma 3's converter writes no rows beyond the tokenizer's."""
    adapter, merged = lora_of("gemma3_padded", "embed_tokens")
    gguflora.merge(zoo.gguf_model("gemma3_padded"), adapter, tmp_path / "merged.gguf")
    found, expected = (zoo.tensors(path)["token_embd.weight"] for path in (tmp_path / "merged.gguf", merged))
    base = zoo.tensors(zoo.gguf_model("gemma3_padded"))["token_embd.weight"]
    assert len(found) < 320
    assert_close(found - base, expected - base, 1e-4, "token_embd.weight")


def test_rows_that_the_converter_adds_to_gemma_3n(tmp_path):
    """Its embedding for each layer has no rows for images and sounds; the converter adds zeros."""
    adapter, merged = lora_of("gemma3n_padded", "embed_tokens_per_layer", "o_proj")
    gguflora.merge(zoo.gguf_model("gemma3n_padded"), adapter, tmp_path / "merged.gguf")
    found, expected = zoo.tensors(tmp_path / "merged.gguf"), zoo.tensors(merged)
    assert len(found["per_layer_token_embd.weight"]) == 288
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["gemma2", "cohere2"])
def test_llama_cpp_cannot_untie_some(name, tmp_path):
    adapter, _ = lora_of(name, "embed_tokens")
    with pytest.raises(gguflora.GgufloraError, match="cannot have an output weight of its own"):
        gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "merged.gguf")


def test_encoders_embedding_is_not_tied(tmp_path):
    adapter, merged = lora_of("bert", "word_embeddings", "query")
    gguflora.merge(zoo.gguf_model("bert"), adapter, tmp_path / "merged.gguf")
    found, expected = zoo.tensors(tmp_path / "merged.gguf"), zoo.tensors(merged)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["token_embd.weight"], expected["token_embd.weight"], atol=1e-5)


def test_unknown_architecture_is_matched_by_name_with_a_warning(tmp_path):
    adapter, merged = lora_of("seed_oss")
    base = zoo.gguf_model("seed_oss")
    said = "architecture seed_oss is not known to gguflora: tensors were matched by name and shape only"
    assert said in gguflora.merge(base, adapter, tmp_path / "merged.gguf").warnings[0]
    found, expected = zoo.tensors(tmp_path / "merged.gguf"), zoo.tensors(merged)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-5, err_msg=key)
    assert said in gguflora.convert(adapter, base, tmp_path / "lora.gguf").warnings[0]
    with pytest.raises(gguflora.GgufloraError, match="is it the right base"):
        gguflora.merge(base, lora_of("mistral")[0], tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_llama_cpp_ignores_loras_of_latent_attention(name, tmp_path):
    """`convert` says so; what it says is what llama.cpp does."""
    adapter, merged = lora_of(name, "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa")
    base, out = zoo.gguf_model(name), tmp_path / "lora.gguf"
    report = gguflora.convert(adapter, base, out)
    assert "will be ignored at run time" in report.warnings[0]
    assert f"{report.tensors} of {report.tensors}" in report.warnings[0]
    before = llama_logits(base)
    np.testing.assert_array_equal(llama_logits(base, out), before)
    assert np.abs(llama_logits(merged) - before).max() > 0.1
    assert gguflora.convert(lora_of(name, "o_proj")[0], base, tmp_path / "o.gguf").warnings == ()


@pytest.mark.parametrize("name", FROM_CONFIG)
def test_configuration_alone_tells_the_shapes(name):
    found, expected = read_base(zoo.checkpoint(name)), read_base(zoo.gguf_model(name))
    assert found.architecture == expected.architecture
    assert (found.n_head, found.n_head_kv, found.is_tied) == (expected.n_head, expected.n_head_kv, expected.is_tied)
    matrices = {key: shape for key, shape in expected.shapes.items() if len(shape) == 2 and "norm" not in key}
    assert dict(found.shapes) == matrices


def renamed_adapter(name, out, rename):
    """The random LoRA of a model under other names of its weights."""
    adapter, merged = lora_of(name)
    out.mkdir()
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    safetensors.torch.save_file(
        {rename(key): value for key, value in weights.items()}, out / "adapter_model.safetensors"
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}}))
    return out, merged


NATIVE = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
"""Names of Meta's and Mistral's own checkpoints."""


def native(key):
    for theirs, own in NATIVE.items():
        key = key.replace(theirs, own)
    return key.replace("model.model.layers", "model.layers")


@pytest.mark.parametrize("name", ["llama", "mistral", "ministral3"])
def test_native_names_have_the_original_order_of_rows(name, tmp_path):
    """mistral-finetune's LoRA of q and k belongs to unpermuted weights, as a GGUF file holds them.

    The truth is what llama.cpp's converter makes of PEFT's merge: B of q and k is put into the order of the original
    weights first.
    """
    adapter, merged = renamed_adapter(name, tmp_path / "native", native)
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    heads = {"wq": zoo.MODELS[name].fields["num_attention_heads"], "wk": zoo.MODELS[name].fields["num_key_value_heads"]}
    for key, value in weights.items():
        count = next((count for module, count in heads.items() if f".{module}.lora_B" in key), None)
        if count:
            halves = value.reshape(count, 2, -1, value.shape[1])
            weights[key] = halves.swapaxes(1, 2).reshape(value.shape).contiguous()
    safetensors.torch.save_file(weights, adapter / "adapter_model.safetensors")
    assert_lora_equals_pefts_merge(name, adapter, merged, tmp_path)


def like_gpt_j(key):
    return re.sub(r"model\.layers\.(\d+)\.self_attn\.([qk])_proj", r"transformer.h.\1.attn.\2_proj", key)


@pytest.mark.parametrize(
    ("name", "rename", "said"),
    [("qwen2", native, "another order under these names"), ("llama", like_gpt_j, "not known under these names")],
)
def test_names_of_unknown_order_are_refused(name, rename, said, tmp_path):
    adapter, _ = renamed_adapter(name, tmp_path / "renamed", rename)
    with pytest.raises(ArchitectureError, match=said):
        gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "merged.gguf")


def test_layouts_without_a_rule_are_refused_unless_names_are_trusted(tmp_path):
    adapter, _ = lora_of("falcon_h1")
    base = zoo.gguf_model("falcon_h1")
    for call in (
        lambda **options: gguflora.convert(adapter, base, tmp_path / "lora.gguf", **options),
        lambda **options: gguflora.merge(base, adapter, tmp_path / "merged.gguf", **options),
        lambda **options: gguflora.inspect(adapter, base, **options),
    ):
        with pytest.raises(ArchitectureError, match=r"llama.cpp's converter .* \(--trust-names\)"):
            call()
        assert any("trust_names" in text for text in call(trust_names=True).warnings)
