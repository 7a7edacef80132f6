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


DUMPS = {
    "fsdp": ("_fsdp_wrapped_module.{}.modules_to_save.default._fsdp_wrapped_module.weight",
             "_fsdp_wrapped_module.{}.original_module._fsdp_wrapped_module.weight"),
    "deepspeed": ("module.{}.modules_to_save.default.weight", "module.{}.original_module.weight"),
    "named": ("{}.modules_to_save.my-adapter_v1.weight", "{}.original_module.weight"),
    "wrapped_twice": ("{}.modules_to_save.default.modules_to_save.default.weight",
                      "{}.modules_to_save.default.original_module.weight"),
    "original_twice": ("{}.modules_to_save.default.weight", "{}.original_module.original_module.weight"),
    "original_wrapped": ("{}.modules_to_save.default.weight", "{}.original_module.modules_to_save.default.weight"),
}  # fmt: skip


@pytest.mark.parametrize("trained_last", [False, True])
@pytest.mark.parametrize("dump", DUMPS)
def test_raw_dumps_of_any_spelling(dump, trained_last, tmp_path):
    trained, untrained = (name.format(HEAD) for name in DUMPS[dump])
    keys = {trained: TRAINED, untrained: UNTRAINED}
    deltas = read(tmp_path, dict(reversed(keys.items())) if trained_last else keys)
    assert list(deltas) == ["lm_head.weight"]
    np.testing.assert_array_equal(deltas["lm_head.weight"][0].values, TRAINED)


A, B = np.ones((1, 2), np.float32), np.ones((4, 1), np.float32)


def test_factors_that_are_saved_twice(tmp_path):
    """Under PEFT's name and with the name of the adapter: equal ones are one; different ones are two adapters."""
    keys = {f"{HEAD}.lora_A.weight": A, f"{HEAD}.lora_A.default.weight": A, f"{HEAD}.lora_B.weight": B}
    assert list(read(tmp_path, keys)) == ["lm_head.weight"]
    with pytest.raises(AdapterError, match="more than one lora_A"):
        read(tmp_path, {**keys, f"{HEAD}.lora_A.default.weight": 2 * A})


def sharded(tmp_path, *shards, also=()):
    read_config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(read_config))
    names = [f"adapter_model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        safetensors.numpy.save_file(tensors, tmp_path / name)
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = tmp_path / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(also, names[0])}))
    return index


def test_shards_that_hold_one_key_twice(tmp_path):
    pair = {f"{HEAD}.lora_A.weight": A, f"{HEAD}.lora_B.weight": B}
    sharded(tmp_path, pair, {f"{HEAD}.lora_B.weight": B})
    assert list(gguflora.read_adapter(tmp_path).deltas) == ["lm_head.weight"]
    sharded(tmp_path, pair, {f"{HEAD}.lora_B.weight": 2 * B})
    with pytest.raises(gguflora.GgufloraError, match=r"00001-of-00002.* and .*00002-of-00002.* both hold"):
        gguflora.read_adapter(tmp_path)


def test_shards_that_do_not_hold_all_of_the_index(tmp_path):
    index = sharded(tmp_path, {f"{HEAD}.lora_A.weight": A, f"{HEAD}.lora_B.weight": B}, also=["a.lora_A.weight"])
    with pytest.raises(gguflora.GgufloraError, match=r"1 tensors that it names are in no shard: .*a\.lora_A\.weight"):
        gguflora.read_adapter(tmp_path)
    index.unlink()
    with pytest.raises(
        gguflora.GgufloraError, match=r"shards need their index, adapter_model\.safetensors\.index\.json"
    ):
        gguflora.read_adapter(tmp_path)
