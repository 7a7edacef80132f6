"""PEFT methods whose merged weight depends on the base's, against PEFT's own merge and llama.cpp's converter."""

import shutil

import gguf
import numpy as np
import peft
import pytest

import gguflora
from support.builders import Trained, edit_config, gguf_model, hf_model, trained_adapter
from support.oracles import libggml
from support.oracles.gguf_files import dequantized, lora_changes, read_tensors
from support.oracles.llama_cpp import llama_logits
from support.oracles.peft import merged_gguf, peft_logits

SOME = ("q_proj", "k_proj", "down_proj")


def lora(*targets, **options):
    return Trained(peft.LoraConfig, targets or SOME, {"r": 4, "lora_alpha": 8, **options})


METHODS = {
    "dora": lora(use_dora=True),
    "dora_rslora": lora(use_dora=True, use_rslora=True, rank_pattern={"k_proj": 6}),
    "dora_embedding": lora("embed_tokens", "v_proj", use_dora=True),
    "ia3": Trained(peft.IA3Config, ("k_proj", "v_proj", "down_proj"), {"feedforward_modules": ["down_proj"]}),
    "hra": Trained(peft.HRAConfig, SOME, {"r": 5}),
    "hra_gs": Trained(peft.HRAConfig, SOME, {"r": 4, "apply_GS": True}),
    "hira": Trained(peft.HiraConfig, SOME, {"r": 4, "rank_pattern": {"k_proj": 2}}),
    "hira_embedding": Trained(peft.HiraConfig, ("embed_tokens", "o_proj"), {"r": 4}),
    "oft": Trained(peft.OFTConfig, SOME, {"oft_block_size": 16, "use_cayley_neumann": False}, std=0.1),
    "oft_rank": Trained(peft.OFTConfig, SOME, {"r": 4, "oft_block_size": 0}, std=0.02),
    "oft_terms": Trained(peft.OFTConfig, SOME, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}, std=0.05),
    "oft_two_terms": Trained(peft.OFTConfig, SOME, {"oft_block_size": 8, "num_cayley_neumann_terms": 2}, std=0.05),
    "oft_shared": Trained(peft.OFTConfig, SOME, {"oft_block_size": 16, "block_share": True}, std=0.05),
    "oft_coft": Trained(peft.OFTConfig, SOME, {"oft_block_size": 16, "coft": True, "eps": 0.5}, std=0.1),
    "oft_embedding": Trained(peft.OFTConfig, ("embed_tokens", "o_proj"), {"oft_block_size": 16}, std=0.05),
    "boft": Trained(peft.BOFTConfig, SOME, {"boft_block_size": 8}),
    "boft_blocks": Trained(peft.BOFTConfig, SOME, {"boft_block_num": 4, "boft_block_size": 0}),
    "road_1": Trained(peft.RoadConfig, ("q_proj", "v_proj", "down_proj"), {"variant": "road_1", "group_size": 16}),
    "road_2": Trained(peft.RoadConfig, SOME, {"variant": "road_2", "group_size": 16}),
    "road_4": Trained(peft.RoadConfig, SOME, {"variant": "road_4", "group_size": 8}),
    "c3a": Trained(peft.C3AConfig, SOME, {"block_size": 32, "block_size_pattern": {"k_proj": 16}}, std=1.0),
    "shira": Trained(peft.ShiraConfig, SOME, {"r": 4, "mask_type": "random"}),
    "supertuning": Trained(peft.SupertuningConfig, SOME, {"sparsity": 0.9}),
    "supertuning_bottom": Trained(peft.SupertuningConfig, SOME, {"sparsity": 0.99, "select_top": False}),
    "supra": Trained(peft.SupertuningConfig, SOME, {"sparsity": 0.9, "r": 4, "lora_alpha": 6}),
    "supra_default_alpha": Trained(peft.SupertuningConfig, SOME, {"sparsity": 0.9, "r": 3}),
    "glora": Trained(peft.GloraConfig, SOME, {"r": 4}),
    "glora_vector": Trained(
        peft.GloraConfig, SOME, {"r": 4, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
    ),
    "glora_constant": Trained(
        peft.GloraConfig, SOME, {"r": 4, "config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}
    ),
    "glora_bias": Trained(peft.GloraConfig, SOME, {"r": 4, "config_A_B": "lora", "config_D_E": "none"}),
    "deft": Trained(peft.DeftConfig, SOME, {"r": 4}),
    "deft_qr": Trained(peft.DeftConfig, SOME, {"r": 4, "decomposition_method": "qr", "alpha": 12}),
    "deft_para": Trained(peft.DeftConfig, SOME, {"r": 4, "decomposition_method": "qr", "para": True}),
    "osf": Trained(peft.OSFConfig, SOME, {"effective_rank": 40}),
    "osf_fraction": Trained(peft.OSFConfig, SOME, {"effective_rank": 0.75, "rank_pattern": {"k_proj": 0.25}}),
    "fourierft": Trained(peft.FourierFTConfig, SOME, {"n_frequency": 200, "scaling": 100.0}, std=1.0),
    "fourierft_pattern": Trained(
        peft.FourierFTConfig, SOME, {"n_frequency": 90, "n_frequency_pattern": {"k_proj": 300}, "random_loc_seed": 5}
    ),
    "waveft": Trained(peft.WaveFTConfig, SOME, {"n_frequency": 500, "scaling": 5.0}),
    "waveft_sparse": Trained(peft.WaveFTConfig, SOME, {"n_frequency": 500, "use_idwt": False, "random_loc_seed": 1}),
    "waveft_db3": Trained(peft.WaveFTConfig, SOME, {"n_frequency": 300, "wavelet_family": "db3"}),
    "waveft_sym8": Trained(peft.WaveFTConfig, SOME, {"n_frequency": 300, "wavelet_family": "sym8"}),
    "waveft_coif2": Trained(peft.WaveFTConfig, SOME, {"n_frequency": 300, "wavelet_family": "coif2"}),
    "randlora": Trained(peft.RandLoraConfig, SOME, {"r": 10, "randlora_alpha": 40}, std=0.01),
    "randlora_seed": Trained(peft.RandLoraConfig, SOME, {"r": 8, "save_projection": False}, std=0.01),
    "randlora_sparse": Trained(
        peft.RandLoraConfig, SOME, {"r": 8, "save_projection": False, "sparse": True, "projection_prng_key": 3}, 0.01
    ),
    "randlora_very_sparse": Trained(
        peft.RandLoraConfig, SOME, {"r": 8, "save_projection": False, "very_sparse": True}, std=0.01
    ),
    "frod": Trained(peft.FrodConfig, SOME, {"sparse_rate": 0.05}),
    "peanut": Trained(peft.PeanutConfig, SOME, {"r": 4}),
    "peanut_deep": Trained(peft.PeanutConfig, SOME, {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5}, std=0.3),
    "peanut_gelu": Trained(peft.PeanutConfig, SOME, {"r": 4, "depth": 1, "act_fn": "gelu"}, std=0.3),
    "bat": Trained(peft.MissConfig, SOME, {"r": 16, "init_weights": "bat"}),
    "kasa": lora(kasa_config=peft.tuners.lora.config.KasaConfig()),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora", lora_alpha=4),
    "pissa_dora": lora(init_lora_weights="pissa", use_dora=True),
}  # fmt: skip
"""Adapters for any base with separate projections."""

BIASES = {
    "beft": Trained(peft.BeftConfig, ("q_proj", "k_proj", "v_proj"), {}),
    "bias_all": lora(bias="all"),
    "bias_lora_only": lora("q_proj", "o_proj", bias="lora_only"),
}
"""Adapters that need a base with biases."""

NORMS = ("input_layernorm", "post_attention_layernorm")
WHOLE = {
    "ln_tuning": Trained(peft.LNTuningConfig, NORMS, {}),
    "ln_tuning_final": Trained(peft.LNTuningConfig, ("norm",), {}),
    "norms_to_save": lora("q_proj", modules_to_save=list(NORMS)),
}


def assert_equals_peft(arch, spec, tmp_path):
    base, adapter = gguf_model(arch), trained_adapter(arch, spec)
    gguflora.merge(base, adapter, tmp_path / "out.gguf", threads=1)
    worst = assert_same_change(base, tmp_path / "out.gguf", merged_gguf(hf_model(arch), adapter))
    print(f"{arch} {worst:.1e}")


def assert_same_change(base, found_path, expected_path, tolerance=1e-4):
    """Every tensor's change is PEFT's; tensors PEFT leaves alone keep their bytes."""
    before, found, expected = (read_tensors(path) for path in (base, found_path, expected_path))
    assert found.keys() == expected.keys()
    errors = {}
    for name in before:
        change = expected[name].astype(np.float64) - before[name]
        size = np.linalg.norm(change) / np.linalg.norm(before[name])
        if size < 1e-5:  # PEFT's rounding of weights that a method multiplies with 1
            np.testing.assert_array_equal(found[name], before[name], err_msg=name)
            continue
        assert size > 1e-3, f"{name}: the change is {size:.1e} of the weight, too small to be seen"
        errors[name] = np.linalg.norm(found[name].astype(np.float64) - expected[name]) / np.linalg.norm(change)
    assert errors, "the adapter changes nothing"
    name = max(errors, key=errors.get)
    assert errors[name] <= tolerance, f"{name}: relative error of the change is {errors[name]:.1e}"
    return errors[name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_equals_pefts_merge(arch, method, tmp_path):
    assert_equals_peft(arch, METHODS[method], tmp_path)


@pytest.mark.parametrize("method", BIASES)
def test_biases_equal_pefts_merge(method, tmp_path):
    assert_equals_peft("qwen2", BIASES[method], tmp_path)


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_whole_weights_equal_pefts_merge(arch, method, tmp_path):
    assert_equals_peft(arch, WHOLE[method], tmp_path)


FUSED = {
    "dora": lora("qkv_proj", "gate_up_proj", use_dora=True),
    "ia3": Trained(peft.IA3Config, ("qkv_proj", "down_proj"), {"feedforward_modules": ["down_proj"]}),
    "oft": Trained(peft.OFTConfig, ("qkv_proj", "down_proj"), {"oft_block_size": 16}, std=0.05),
    "road": Trained(peft.RoadConfig, ("qkv_proj", "gate_up_proj"), {"group_size": 32}),
    "osf": Trained(peft.OSFConfig, ("qkv_proj", "o_proj"), {"effective_rank": 0.5}),
}


@pytest.mark.parametrize("method", FUSED)
def test_fused_projections_equal_pefts_merge(method, tmp_path):
    assert_equals_peft("phi3", FUSED[method], tmp_path)


QUANTIZED = ["dora", "ia3", "oft", "hra", "road_1", "c3a", "shira", "deft", "osf", "fourierft", "glora", "pissa"]


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_base_is_changed_by_its_dequantized_weights(method, tmp_path):
    """As the F32 file of the same values is, which equals PEFT's merge, and rounded once by ggml."""
    base, adapter = gguf_model("qwen2", outtype="Q8_0"), trained_adapter("qwen2", METHODS[method])
    report = gguflora.merge(base, adapter, tmp_path / "out.gguf", rounding="nearest")
    gguflora.merge(as_f32(base, tmp_path / "f32.gguf"), adapter, tmp_path / "exact.gguf")
    exact, found = read_tensors(tmp_path / "exact.gguf"), gguf.GGUFReader(tmp_path / "out.gguf").tensors
    same = []
    for before, after in zip(gguf.GGUFReader(base).tensors, found, strict=True):
        assert after.tensor_type == before.tensor_type
        if np.array_equal(exact[before.name], dequantized(before)):
            np.testing.assert_array_equal(after.data, before.data, err_msg=before.name)
        elif before.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            same.append(after.data == libggml.quantize(exact[before.name], int(before.tensor_type)))
        else:
            np.testing.assert_allclose(after.data, exact[before.name], rtol=1e-6, atol=1e-6, err_msg=before.name)
    assert np.concatenate([part.ravel() for part in same]).mean() > 0.9999
    assert bool(report.warnings) == (method in {"osf", "pissa"}), report.warnings


def as_f32(base, out):
    """The same GGUF file with every tensor as F32."""
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(dequantized(tensor), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("names", [("dora", "oft", "ia3"), ("osf", "pissa", "deft"), ("road_1", "norms_to_save")])
def test_several_adapters_add_their_changes(names, tmp_path):
    """``W + sum(scale * (W' - W))``, where PEFT knows no scale for most methods; the same bytes on any threads."""
    base, scales = gguf_model("llama"), (0.5, -1.0, 2.0)
    adapters = [trained_adapter("llama", (METHODS | WHOLE)[name]) for name in names]
    before = read_tensors(base)
    expected = {name: values.astype(np.float64) for name, values in before.items()}
    for adapter, scale in zip(adapters, scales, strict=False):
        for name, values in read_tensors(merged_gguf(hf_model("llama"), adapter)).items():
            expected[name] += scale * (values - before[name].astype(np.float64))
    for threads in (1, 2):
        pairs = list(zip(adapters, scales, strict=False))
        gguflora.merge(base, pairs, tmp_path / f"{threads}.gguf", threads=threads)
    for name, values in read_tensors(tmp_path / "1.gguf").items():
        error = np.linalg.norm(values - expected[name])
        assert error <= 1e-4 * max(np.linalg.norm(expected[name] - before[name]), 1e-2), name
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


@pytest.mark.parametrize("method", ["dora", "oft", "road_1", "fourierft", "osf"])
def test_convert_names_both_ways_out_or_approximates(method, tmp_path):
    base, adapter = gguf_model("llama"), trained_adapter("llama", METHODS[method])
    with pytest.raises(gguflora.GgufloraError, match=r"merge .*--rank N or --energy"):
        gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    report = gguflora.convert(adapter, base, tmp_path / "lora.gguf", rank=16)
    before, after = read_tensors(base), read_tensors(merged_gguf(hf_model("llama"), adapter))
    found = lora_changes(tmp_path / "lora.gguf")
    assert len(found) == len(report.errors) == 6
    for name, change in found.items():
        exact = after[name].astype(np.float64) - before[name]
        tail = np.linalg.svd(exact, compute_uv=False)[16:]
        assert np.linalg.norm(change - exact) == pytest.approx(np.linalg.norm(tail), rel=1e-3)
        assert report.errors[name] == pytest.approx(np.linalg.norm(tail) / np.linalg.norm(exact), rel=1e-3)


@pytest.mark.parametrize("method", ["ia3", "road_2", "glora"])
def test_convert_refuses_biases(method, tmp_path):
    adapter = trained_adapter("qwen2", METHODS[method])
    with pytest.raises(gguflora.GgufloraError, match=r"biases.*merge"):
        gguflora.convert(adapter, gguf_model("qwen2"), tmp_path / "lora.gguf", rank=8)


def test_beft_brings_a_bias_where_llama_cpp_reads_it(tmp_path):
    """PEFT's forward pass adds it to layers that have none, though it refuses to merge it."""
    adapter = trained_adapter("llama", BIASES["beft"])
    gguflora.merge(gguf_model("llama"), adapter, tmp_path / "out.gguf")
    expected = peft_logits(hf_model("llama"), adapter)
    assert np.abs(llama_logits(tmp_path / "out.gguf") - expected).max() < 1e-2


LOST = {"pissa_niter_4": "random numbers", "corda": "activations", "lora_ga": "gradients", "loftq": "quantization"}


@pytest.mark.parametrize("start", LOST)
def test_a_start_that_cannot_be_repeated_is_refused(start, tmp_path):
    """It says why, and the ways out that test_lora_options.py goes; LoftQ's base cannot be had back by PEFT."""
    adapter = shutil.copytree(trained_adapter("llama", lora()), tmp_path / "adapter")
    edit_config(adapter, init_lora_weights=start)
    with pytest.raises(gguflora.GgufloraError, match=LOST[start]) as caught:
        gguflora.merge(gguf_model("llama"), adapter, tmp_path / "out.gguf")
    assert ("path_initial_model_for_weight_conversion" in str(caught.value)) == (start != "loftq")
    assert "set init_lora_weights to true" in str(caught.value)


def test_supertuning_by_size_wants_the_trained_weights(tmp_path):
    """Without indices the base's order of sizes tells them, which quantization loses."""
    options = {"sparsity": 0.9, "save_precomputed_indices": False}
    adapter = trained_adapter("llama", Trained(peft.SupertuningConfig, SOME, options))
    for base in (gguf_model("llama", outtype="F32"), gguf_model("llama", outtype="BF16")):
        gguflora.merge(base, adapter, tmp_path / f"{base.stem}.gguf")
    with pytest.raises(gguflora.GgufloraError, match=r"quantized.*save_precomputed_indices"):
        gguflora.merge(gguf_model("llama", outtype="Q8_0"), adapter, tmp_path / "out.gguf")


@pytest.mark.parametrize("method", ["oft", "boft", "shira", "road_1", "frod", "glora"])
def test_another_base_is_refused(method, tmp_path):
    """Adapters of the smaller model, on one whose weights are larger or otherwise shaped."""
    with pytest.raises(gguflora.GgufloraError):
        gguflora.merge(gguf_model("gemma3", "wide"), trained_adapter("llama", METHODS[method]), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
