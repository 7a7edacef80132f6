"""Every method where the base's rows are permuted, fused, split, transposed or shared out, against PEFT's own merge.

PEFT's merged weights are laid to the places at which `test_architectures` finds each of the base's, or, in
`test_equals_the_converted_merge`, by llama.cpp's converter.
"""

import re

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

import gguflora
from gguflora.adapters.deltas import Replace
from gguflora.architectures.base_model import flat_shape, read_base
from gguflora.architectures.mapping import slices_of
from gguflora.placement.place import PlacedDelta
from support import zoo
from support.asserts import assert_close
from support.oracles.gguf_files import lora_changes

BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj", "dense"], target_modules_bd_b=["q_proj", "up_proj", "query"],
    nblocks=2, match_strict=False,
)  # fmt: skip
PATTERNS = {
    "rank_pattern": {r"layers\.1\..*": 5, r"(k|v)_proj": 2, "query_key_value": 2},
    "alpha_pattern": {r".*\.(0|1)\..*(o_proj|dense)": 11, "q_proj": 2.5},
}
LORA = {
    "lora": ({"use_rslora": True, "lora_alpha": 7}, "llama_biases qwen2moe gptoss"),
    "lora_patterns": (PATTERNS, "qwen2 nemotron deepseek2"),
    "bdlora": ({"use_bdlora": BLOCKS, "r": 4}, "qwen35moe ministral3 falcon"),
    "velora": ({"velora_config": VeloraConfig(num_groups=8)}, "phi2 stablelm_norms t5"),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, "qwen2moe qwen35moe gptneox"),
    "bias_all": ({"bias": "all"}, "qwen35moe falcon bert mamba"),
    "bias_only": ({"bias": "lora_only"}, "bloom bert qwen3moe"),
    "lora_bias": ({"lora_bias": True}, "bloom gptneox gptoss"),
    "kasa": ({"kasa_config": KasaConfig()}, "jamba mamba llama_biases"),
    "pissa": ({"init_lora_weights": "pissa"}, "mamba qwen35moe gemma"),
    "olora": ({"init_lora_weights": "olora"}, "qwen3moe olmo2 qwen35moe"),
}
OTHERS = {
    "adalora": (peft.AdaLoraConfig, {"init_r": 6, "target_r": 4, "total_step": 9}, 0.5, "mixtral gemma gptneox"),
    "bat": (peft.MissConfig, {"r": 4, "init_weights": "bat"}, 0.1, "jamba deepseek3 bloom"),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}, 0.1, "gemma mistral ministral3"),
    "c3a": (peft.C3AConfig, {"block_size": 4}, 1.0, "gptneox phi3 qwen35"),
    "deft_qr": (peft.DeftConfig, {"r": 4, "decomposition_method": "qr", "alpha": 12}, 0.1, "phi3 falcon cohere2"),
    "delora": (peft.DeloraConfig, {"r": 5}, 5.0, "qwen3 jamba deepseek3"),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 200, "scaling": 100.0}, 1.0, "mixtral cohere bloom"),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.05}, 0.1, "gemma2 qwen3next bert"),
    "glora": (peft.GloraConfig, {"r": 4}, 0.1, "qwen3next olmo qwen3 t5"),
    "gralora": (peft.GraloraConfig, {"r": 4, "gralora_k": 2, "hybrid_r": 2}, 0.5, "gpt2 olmo gptoss"),
    "hira": (peft.HiraConfig, {"r": 4}, 0.1, "olmo stablelm bloom gpt2"),
    "hra": (peft.HRAConfig, {"r": 5}, 0.1, "t5 phi2 mamba"),
    "hra_gs": (peft.HRAConfig, {"r": 4, "apply_GS": True}, 0.1, "olmoe gemma2 granite"),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 12}, 0.5, "deepseek2 falcon_7b llama_biases"),
    "lokr": (peft.LoKrConfig, {"r": 2, "decompose_both": True}, 0.5, "mixtral gemma3 falcon"),
    "miss": (peft.MissConfig, {"r": 7}, 0.5, "gptoss cohere2 qwen3next"),
    "miss_mini": (peft.MissConfig, {"r": 8, "mini_r": 4, "init_weights": "mini"}, 0.5, "granite starcoder2 gemma"),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}, 0.05, "gemma3 qwen35moe deepseek2 gptneox"),
    "osf": (peft.OSFConfig, {"effective_rank": 0.5}, 0.1, "exaone4 phi2 falcon"),
    "para": (peft.DeftConfig, {"r": 4, "decomposition_method": "qr", "para": True}, 0.1, "llama4 stablelm_norms"),
    "peanut": (peft.PeanutConfig, {"r": 4, "depth": 1}, 0.1, "falcon olmoe deepseek2"),
    "pvera": (peft.PveraConfig, {"r": 16, "save_projection": False}, 0.5, "granitemoe_shared smollm3 llama4"),
    "randlora": (peft.RandLoraConfig, {"r": 8, "save_projection": False}, 0.01, "granite olmo2 gptneox"),
    "road_1": (peft.RoadConfig, {"group_size": 4}, 0.1, "falcon_7b llama smollm3"),
    "road_4": (peft.RoadConfig, {"variant": "road_4", "group_size": 8}, 0.1, "t5 gemma3 mixtral"),
    "shira": (peft.ShiraConfig, {"r": 4, "mask_type": "random"}, 0.1, "phi3 falcon deepseek2"),
    "supra": (peft.SupertuningConfig, {"sparsity": 0.9, "r": 4}, 0.1, "phi3 granitemoe glm4"),
    "by_size": (peft.SupertuningConfig, {"sparsity": 0.9, "save_precomputed_indices": False}, 0.1, "gptneox jamba"),
    "tinylora": (peft.TinyLoraConfig, {"r": 2, "u": 5, "weight_tying": 0.4}, 0.5, "t5 bert qwen2 granite"),
    "tinylora_seed": (peft.TinyLoraConfig, {"r": 3, "u": 5, "save_projection": False}, 0.5, "mistral qwen35 jamba"),
    "unilora": (peft.UniLoraConfig, {"r": 4, "theta_d_length": 99}, 0.5, "gpt2 qwen35 qwen3next granitemoe t5 bert"),
    "unilora_saved": (peft.UniLoraConfig, {"r": 4, "save_indices": True}, 0.5, "deepseek3 nemotron cohere2"),
    "vblora": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 30, "vector_length": 4}, 0.5, "gpt2 t5 nemotron"),
    "vera": (peft.VeraConfig, {"r": 16, "save_projection": False}, 0.5, "gemma2 qwen35moe gpt2"),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 100, "wavelet_family": "db3"}, 0.1, "gpt2 llama4 stablelm"),
}
METHODS = {
    **{name: (peft.LoraConfig, {"r": 3, **options}, 0.1) for name, (options, _) in LORA.items()},
    **{name: case[:3] for name, case in OTHERS.items()},
    "dora": (peft.LoraConfig, {"r": 3, "use_dora": True}, 0.1),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}, 0.1),
}
NO_DORA = {
    "deepseek2",
    "deepseek3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_dsa",
    "qwen3next",
}  # PEFT wraps their experts, too, and then refuses to
PAIRS = [(name, method) for method, (*_, names) in (LORA | OTHERS).items() for name in names.split()]
PAIRS += [(name, "dora") for name in zoo.HAS_CLASS if name not in NO_DORA]
PAIRS += [(name, "ia3") for name in zoo.HAS_CLASS]
EXACT = {
    *(
        "lora",
        "lora_patterns",
        "bdlora",
        "velora",
        "monteclora",
        "adalora",
        "delora",
        "gralora",
        "loha",
        "lokr",
        "miss",
    ),
    *("miss_mini", "pvera", "tinylora", "tinylora_seed", "unilora", "unilora_saved", "vblora", "vera"),
}


def laid_out(name, model):
    """The tensors of the base's GGUF file, with a model's weights at their places."""
    base, tensors = read_base(zoo.gguf_model(name)), zoo.tensors(zoo.gguf_model(name))
    weights = {key: value.detach().numpy() for key, value in model.state_dict(keep_vars=True).items()}
    for path, matrix in zoo.as_matrices(name, weights):
        if path.endswith(zoo.ELSEWHERE):
            continue
        for piece in slices_of(base, path):
            if piece.tensor in tensors and not re.search(zoo.REFUSED.get(name, "^$"), piece.tensor):
                placed = PlacedDelta(path, Replace(matrix), piece)
                stored = tensors[piece.tensor].reshape(flat_shape(tensors[piece.tensor].shape))
                stored[piece.start : piece.start + placed.shape[0]] = placed.take(matrix) + piece.shift
    return tensors


def assert_merged(name, adapter, expected, tmp_path, *, exact=False):
    """The merge changes what is expected, the rest keeps its bytes; the conversion holds the same changes."""
    gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "out.gguf")
    base, found = zoo.tensors(zoo.gguf_model(name)), zoo.tensors(tmp_path / "out.gguf")
    assert found.keys() == base.keys()
    changes = {}
    for key, values in base.items():
        change = expected[key].astype(np.float64) - values
        if np.linalg.norm(change) <= 1e-5 * np.linalg.norm(values):
            np.testing.assert_array_equal(found[key], values, err_msg=key)
        else:
            changes[key] = change
            assert_close(found[key].astype(np.float64) - values, change, 1e-4, key)
    assert changes, "the adapter must matter"
    if exact:
        gguflora.convert(adapter, zoo.gguf_model(name), tmp_path / "lora.gguf", outtype="f32")
        factors = lora_changes(tmp_path / "lora.gguf")
        assert factors.keys() == changes.keys()
        for key, change in changes.items():
            assert_close(factors[key], change, 1e-5, key)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_equals_pefts_merge(name, method, tmp_path):
    merged = zoo.adapted(name, *METHODS[method], tmp_path / "adapter")
    assert_merged(name, tmp_path / "adapter", laid_out(name, merged), tmp_path, exact=method in EXACT)


WHOLE = [  # modules that are saved whole, with parameters of all shapes below them
    ("jamba", "lm_head", ["mamba", "feed_forward"]),  # A_log, D, conv1d, dt_proj; stacks of experts
    ("gptoss", "lm_head", ["experts", "router", "self_attn"]),  # experts (n_in, n_out) with biases; sinks
    ("qwen35moe", "lm_head", ["linear_attn", "mlp"]),  # A_log and dt_bias by turns; experts with gate and up in one
    ("gpt2", "c_attn", ["mlp", "ln_1"]),  # Conv1D
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"target_modules": [target], "modules_to_save": modules}) for name, target, modules in WHOLE),
        ("bert", {"target_modules": "all-linear"}),  # its pooler is in no GGUF file
    ],
)
def test_equals_the_converted_merge(name, options, tmp_path):
    merged = zoo.adapted(name, peft.LoraConfig, {"r": 3, **options}, 0.1, tmp_path / "adapter")
    expected = zoo.tensors(zoo.to_gguf(name, zoo.save(name, merged, tmp_path / "merged")))
    assert_merged(name, tmp_path / "adapter", expected, tmp_path)
    said = gguflora.read_adapter(tmp_path / "adapter").warnings
    assert bool(said) == (name == "bert"), said


CONVOLUTIONS = {
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 6}),
    "loha_core": (peft.LoHaConfig, {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "lokr": (peft.LoKrConfig, {"r": 2}),
    "lokr_core": (peft.LoKrConfig, {"r": 2, "use_effective_conv2d": True, "decompose_factor": 4}),
    "lokr_both": (peft.LoKrConfig, {"r": 2, "use_effective_conv2d": True, "decompose_both": True}),
    "lokr_whole": (peft.LoKrConfig, {"r": 64}),
}


@pytest.mark.parametrize("method", CONVOLUTIONS)
@pytest.mark.parametrize("name", ["mamba", "qwen35"])
def test_convolutions_equal_pefts_merge(name, method, tmp_path):
    kind, options = CONVOLUTIONS[method]
    targets = {"target_modules": ["conv1d", "in_proj", "o_proj"]}
    merged = zoo.adapted(name, kind, options | targets, 0.5, tmp_path / "adapter")
    assert_merged(name, tmp_path / "adapter", laid_out(name, merged), tmp_path, exact=True)


def test_lora_of_a_convolution_in_groups_is_refused(tmp_path):
    """It mixes the channels, which such a convolution does not: PEFT cannot merge it either."""
    model = peft.get_peft_model(zoo.model("jamba"), peft.LoraConfig(r=128, target_modules=["conv1d"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
    with pytest.raises(gguflora.GgufloraError, match="grouped convolution"):
        gguflora.merge(zoo.gguf_model("jamba"), tmp_path / "adapter", tmp_path / "out.gguf")


class _BlockDiagonal:
    """What PEFT's CUDA extension computes: (n, d, b, b) to block-diagonal (n, d b, d b)."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 4},
        {"boft_block_num": 8, "boft_block_size": 0, "boft_n_butterfly_factor": 3},
    ],
)
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_butterflies_equal_pefts_merge(name, options, tmp_path, monkeypatch):
    """Without the extension PEFT takes one factor, whatever is asked for; with it the rest of its code runs."""
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", _BlockDiagonal)
    merged = zoo.adapted(name, peft.BOFTConfig, options, 0.1, tmp_path / "adapter")
    tensors = gguflora.files.safetensors.read_safetensors(tmp_path / "adapter/adapter_model.safetensors")
    assert {len(values) for key, values in tensors.items() if "boft_R" in key} == {options["boft_n_butterfly_factor"]}
    assert_merged(name, tmp_path / "adapter", laid_out(name, merged), tmp_path)
