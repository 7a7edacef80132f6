"""Public reports of adapters that other tools got wrong, re-created small. Each test names the report.

The truth is the base's weights plus scaling * B @ A, computed here in NumPy.
"""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import AdapterError, MismatchError, UnsupportedAdapterError
from support import builders
from support.oracles.gguf_files import read_tensors

PREFIX = "base_model.model."
O_PROJ = "model.layers.0.self_attn.o_proj"
O_TENSOR = "blk.0.attn_output.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}


def factors(module, n_in, n_out):
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, n_in), (n_out, 2)))
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}, 2 * (b @ a)


def write(folder, tensors, **fields):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    return folder


@pytest.fixture
def base():
    return builders.gguf_model("llama")


@pytest.fixture
def weights(base):
    return read_tensors(base)


def assert_changes_only(base, adapter, changes, tmp_path):
    report = gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    before, after = read_tensors(base), read_tensors(tmp_path / "merged.gguf")
    assert after.keys() == before.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values + changes.get(name, 0), atol=1e-4, err_msg=name)
    return report


@pytest.mark.parametrize(
    ("report", "module", "also"),
    [
        ("ggml-org/llama.cpp#5602: the head's own weight beside its factors", "lm_head", "lm_head.base_layer.weight"),
        ("ggml-org/llama.cpp#3651: factors of the head", "lm_head", None),
        ("thinking-machines-lab/tinker-cookbook#928: the head below model", "model.lm_head", None),
    ],
)
def test_heads(base, weights, report, module, also, tmp_path):
    n_out, n_in = weights["output.weight"].shape
    tensors, change = factors(module, n_in, n_out)
    copy = {f"{PREFIX}{also}": weights["output.weight"]} if also else {}
    adapter = write(tmp_path / "adapter", tensors | copy)
    assert_changes_only(base, adapter, {"output.weight": change}, tmp_path)


def test_a_head_of_a_larger_vocabulary(base, weights, tmp_path):
    """hiyouga/LLaMA-Factory#2888: InternLM2's output was resized by the trainer, and only its LoRA was saved."""
    n_out, n_in = weights["output.weight"].shape
    adapter = write(tmp_path / "adapter", factors("lm_head", n_in, n_out + 64)[0])
    with pytest.raises(MismatchError, match=rf"vocabulary of {n_out + 64} tokens, .* has {n_out}; .*save_embedding"):
        gguflora.merge(base, adapter, tmp_path / "merged.gguf")


@pytest.mark.parametrize("name", ["default", "default_0", "lora", "my-adapter_v1", "0"])
def test_names_of_adapters(base, weights, name, tmp_path):
    """huggingface/peft#2699 and huggingface/diffusers#9622: adapters named "lora" or "default_0" keep the name."""
    tensors, change = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    named = {key.replace(".weight", f".{name}.weight"): values for key, values in tensors.items()}
    assert_changes_only(base, write(tmp_path / "adapter", named), {O_TENSOR: change}, tmp_path)


def test_fan_in_fan_out_of_a_linear_layer(base, weights, tmp_path):
    """PEFT corrects the option for torch's Linear (a warning only), as adapters of alpaca-lora have it."""
    tensors, change = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    adapter = write(tmp_path / "adapter", tensors, fan_in_fan_out=True, merge_weights=False, enable_lora=None)
    assert_changes_only(base, adapter, {O_TENSOR: change}, tmp_path)


def test_parts_of_fused_weights_of_peft_0_2(base, weights, tmp_path):
    """tloen/alpaca-lora#272 shows the field; a list names the parts of a fused weight that have factors."""
    tensors, _ = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    adapter = write(tmp_path / "adapter", tensors, enable_lora=[True, False, True])
    with pytest.raises(UnsupportedAdapterError, match=r"enable_lora is set: .*PEFT 0\.2"):
        gguflora.merge(base, adapter, tmp_path / "merged.gguf")


def test_a_rank_that_the_configuration_does_not_have(base, weights, tmp_path):
    """huggingface/peft#2071: tensors of rank 8 under a configuration of rank 16."""
    tensors, _ = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    with pytest.raises(AdapterError, match=r"expected rank 16 as adapter_config\.json says"):
        gguflora.merge(base, write(tmp_path / "adapter", tensors, r=16), tmp_path / "merged.gguf")


FROZEN = {
    "buffers": {f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
    "packed": {
        f"{PREFIX}{O_PROJ}.base_layer.weight": np.zeros((32, 1), np.uint8),
        f"{PREFIX}{O_PROJ}.base_layer.weight.absmax": np.zeros(4, np.uint8),
        f"{PREFIX}{O_PROJ}.base_layer.weight.quant_map": np.zeros(16, np.float32),
        f"{PREFIX}{O_PROJ}.base_layer.weight.quant_state.bitsandbytes__nf4": np.zeros(64, np.uint8),
    },
}


@pytest.mark.parametrize("kind", FROZEN)
def test_dumps_of_a_whole_quantized_model(base, weights, kind, tmp_path):
    """huggingface/transformers#27874: consolidated dumps hold what is frozen too, QLoRA's packed base included."""
    tensors, change = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    adapter = write(tmp_path / "adapter", tensors | FROZEN[kind])
    report = assert_changes_only(base, adapter, {O_TENSOR: change}, tmp_path)
    assert any("left out" in text and next(iter(FROZEN[kind])) in text for text in report.warnings)


def test_a_dump_with_copies_of_all_weights(base, weights, tmp_path):
    """ggml-org/llama.cpp#4896: an adapter file of the size of the model."""
    tensors, change = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    copies = {
        f"{PREFIX}{O_PROJ}.base_layer.weight": weights[O_TENSOR],
        f"{PREFIX}model.layers.0.mlp.up_proj.weight": weights["blk.0.ffn_up.weight"],
        f"{PREFIX}model.layers.1.self_attn.v_proj.weight": weights["blk.1.attn_v.weight"],
        f"{PREFIX}model.norm.weight": weights["output_norm.weight"],
    }
    adapter = write(tmp_path / "adapter", tensors | copies)
    report = assert_changes_only(base, adapter, {O_TENSOR: change}, tmp_path)
    assert any("left out saved copies" in text for text in report.warnings)


def test_a_value_head(base, weights, tmp_path):
    """huggingface/trl: PPO's value head in the same file."""
    tensors, _ = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    adapter = write(tmp_path / "adapter", tensors | {"v_head.summary.weight": np.ones((1, 96), np.float32)})
    with pytest.raises(UnsupportedAdapterError, match="v_head is the value head"):
        gguflora.merge(base, adapter, tmp_path / "merged.gguf")


def test_placeholders_of_experts_that_have_no_gate(base, weights, tmp_path):
    """thinking-machines-lab/tinker-cookbook#547: Nemotron's adapters hold empty tensors."""
    tensors, _ = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    at = f"{PREFIX}model.layers.0.mixer.experts.up_proj"
    empty = {f"{at}.lora_{side}.weight": np.zeros(0, np.float32) for side in "AB"}
    with pytest.raises(gguflora.GgufloraError, match=r"2 of 4 tensors hold no values .*Tinker"):
        gguflora.merge(base, write(tmp_path / "adapter", tensors | empty), tmp_path / "merged.gguf")


def test_frequencies_in_a_gguf_lora(base, weights, tmp_path):
    """ggml-org/llama.cpp#9114: its converter wrote Llama 3's rope_freqs into the adapter."""
    tensors, change = factors(O_PROJ, *reversed(weights[O_TENSOR].shape))
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for side, values in zip("ab", tensors.values(), strict=True):
        writer.add_tensor(f"{O_TENSOR}.lora_{side}", values)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = assert_changes_only(base, tmp_path / "lora.gguf", {O_TENSOR: change}, tmp_path)
    assert any("left out rope_freqs.weight" in text for text in report.warnings)
