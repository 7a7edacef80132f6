"""Two keys for one weight: the trained one counts, whatever the order of the file, or the adapter is refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import AdapterError

HEAD = "base_model.model.lm_head"
TRAINED, UNTRAINED = np.full((4, 2), 2, np.float32), np.ones((4, 2), np.float32)


def read(tmp_path, keys):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": ["lm_head"], "target_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(keys, tmp_path / "adapter_model.safetensors")
    return gguflora.read_adapter(tmp_path).deltas


@pytest.mark.parametrize("trained", ["modules_to_save.default.weight", "modules_to_save.weight", "weight"])
def test_trained_weight_replaces_the_original_module(trained, tmp_path):
    """Raw dumps of FSDP and DeepSpeed hold both; PEFT computes with the trained one."""
    keys = {f"{HEAD}.{trained}": TRAINED, f"{HEAD}.original_module.weight": UNTRAINED}
    (delta,) = read(tmp_path, keys)["lm_head.weight"]
    np.testing.assert_array_equal(delta.values, TRAINED)
    assert not delta.is_base_copy


@pytest.mark.parametrize("other", ["modules_to_save.second.weight", "base_layer.weight", "weight"])
def test_other_keys_for_one_weight_are_refused(other, tmp_path):
    keys = {f"{HEAD}.modules_to_save.default.weight": TRAINED, f"{HEAD}.{other}": UNTRAINED}
    with pytest.raises(AdapterError, match=r"both hold 'lm_head\.weight'"):
        read(tmp_path, keys)
