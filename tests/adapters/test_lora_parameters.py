"""LORA on parameters (`target_parameters`): the stacked experts of a layer, against PEFT's merge."""

import json

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import GgufloraError, UnsupportedAdapterError
from support import zoo
from support.asserts import assert_same_changes, changes
from support.oracles.gguf_files import lora_changes

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "mixtral": {"target_parameters": BOTH},
    "mixtral_gate_up": {"target_parameters": BOTH[:1]},
    "mixtral_down": {"target_parameters": BOTH[1:], "use_rslora": True},
    "qwen3moe": {
        "target_parameters": [*BOTH, "mlp.gate.weight"],
        "rank_pattern": {r"layers.0.*experts\.down_proj": 5},
        "alpha_pattern": {r"experts\.gate_up_proj": 9},
    },
    "qwen2moe": {"target_parameters": BOTH, "target_modules": ["q_proj", "v_proj"]},
    "olmoe": {"target_parameters": BOTH},
    "llama4": {"target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]},
    "gptoss": {"target_parameters": BOTH},
    "gptoss_merge-only": {"target_parameters": ["mlp.experts.gate_up_proj_bias", *BOTH, "experts.down_proj_bias"]},
    "granitemoe": {"target_parameters": [*BOTH, "router.weight"]},
    "qwen3moe_all-linear": {"target_modules": "all-linear"},  # PEFT names parameters without their modules
    "deepseek2_all-linear": {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 5}},
    "qwen3next_short": {"target_parameters": ["down_proj"]},
}


def made(case):
    return case.split("_")[0]


def saved(case):
    """The adapter, and the merged model by the converter."""
    path = zoo.checkpoint(made(case)).parent / f"{case}-parameters"
    if not (path / "merged").exists():
        model = zoo.peft_model(made(case), **{"target_modules": [], **CASES[case]})
        model.save_pretrained(path / "adapter")
        zoo.save(made(case), model.merge_and_unload(), path / "merged")
        zoo.to_gguf(made(case), path / "merged")
    return path / "adapter", path / "merged/model.gguf"


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(case, tmp_path):
    adapter, merged = saved(case)
    base = zoo.gguf_model(made(case))
    expected = changes(base, merged)
    assert any("_exps" in name for name in expected)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)
    if case.endswith("merge-only"):
        with pytest.raises(UnsupportedAdapterError, match="bias"):
            gguflora.convert(adapter, base, tmp_path / "lora.gguf")
        return
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)


@pytest.mark.parametrize("case", ["mixtral", "qwen3moe"])
def test_expert_stacks_of_a_gguf_lora(case, tmp_path):
    """A GGUF LoRA with stacks of factors is merged, and stored again, like the adapter that it was made from."""
    adapter, merged = saved(case)
    base = zoo.gguf_model(made(case))
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    gguflora.merge(base, tmp_path / "lora.gguf", tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), changes(base, merged), 1e-4)
    gguflora.convert(tmp_path / "lora.gguf", base, tmp_path / "again.gguf")
    assert_same_changes(lora_changes(tmp_path / "again.gguf"), lora_changes(tmp_path / "lora.gguf"), 1e-6)


def test_layout_before_peft_0_18(tmp_path):
    """A and B used to lie on each other's dimension of a parameter (n_experts, n_out, n_in)."""
    adapter, merged = saved("mixtral")
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    old = {}
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        key_b = key.replace(".lora_A.", ".lora_B.")
        b, rank = tensors[key_b], 3
        of_a, of_b = a.reshape(-1, rank, a.shape[1]), b.reshape(b.shape[0], rank, -1)
        old[key] = np.ascontiguousarray(of_b.transpose(2, 1, 0)).reshape(-1, b.shape[0])
        old[key_b] = np.ascontiguousarray(of_a.transpose(2, 1, 0)).reshape(a.shape[1], -1)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    safetensors.numpy.save_file(old, folder / "adapter_model.safetensors")
    base = zoo.gguf_model("mixtral")
    gguflora.merge(base, folder, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), changes(base, merged), 1e-4)


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], [*BOTH, "experts.up_proj"], ["experts.x", "experts.y"]])
def test_targets_that_do_not_match_the_tensors(targets, tmp_path):
    adapter, _ = saved("mixtral")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_parameters": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(GgufloraError, match="target_parameters"):
        gguflora.convert(folder, zoo.gguf_model("mixtral"), tmp_path / "lora.gguf")
