"""Weights by layer and by pattern in `gguflora.combine`, against mergekit's formula on PEFT's deltas."""

import fnmatch
import json
import re

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

import gguflora
from gguflora.errors import AdapterError
from support import builders, zoo
from support.adapters import deltas_by_peft
from support.builders import Adapter, Trained
from support.cli import run
from support.oracles.gguf_files import lora_changes, read_metadata

ATTENTION = ("q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head")
SPECS = (
    Adapter(targets=ATTENTION, rank=4, alpha=8, seed=1),
    Adapter(targets=ATTENTION, rank=3, alpha=3, seed=2),
)


def by_mergekit(setting, place):
    """``evaluate_setting`` of mergekit 0.1.5 for a list of numbers at a place from 0 to 1."""
    scaled = place * (len(setting) - 1)
    first = int(scaled)
    rest = scaled - first
    return (1 - rest) * setting[first] + rest * setting[min(len(setting) - 1, first + 1)]


def weight_of(setting, name, n_layers):
    if isinstance(setting, dict):
        setting = next((given for pattern, given in setting.items() if fnmatch.fnmatch(name, pattern)), 1.0)
    if not isinstance(setting, list):
        return setting
    layer = re.search(r"(?:layers|blk)\.(\d+)\.", name)
    before = "embed" in name or "embd" in name
    return by_mergekit(setting, int(layer[1]) / (n_layers - 1) if layer else 0.0 if before else 1.0)


WEIGHTS = {
    "gradient": ([0.2, 1.0], 0.5),
    "steep": ([1, 0, 0.5], [-1, 2]),
    "pattern": ({"*mlp*": 0.25, "*": [0, 1]}, {"*self_attn.q_proj*": -0.5}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_peft_directories(kind, method, tmp_path):
    adapters, weights = [builders.adapter("llama", spec) for spec in SPECS], WEIGHTS[kind]
    options = {"cat": {}, "svd": {"rank": 7}, "ties_svd": {"rank": 288, "density": 1.0}}[method]
    gguflora.combine(list(zip(adapters, weights, strict=True)), tmp_path / "out", method=method, **options)
    one, two = (deltas_by_peft(adapter) for adapter in adapters)
    for name, found in deltas_by_peft(tmp_path / "out").items():
        first, second = (weight_of(weight, f"{name}.weight", 2) for weight in weights)
        wanted = first * one[name] + second * two[name]
        if method == "ties_svd":
            elected = np.where(one[name] + two[name] >= 0, 1, -1)
            agree = [np.sign(delta[name]) == elected for delta in (one, two)]
            wanted = (first * one[name] * agree[0] + second * two[name] * agree[1]) / np.maximum(sum(agree), 1)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(one[name]).max(), err_msg=name)


@pytest.mark.parametrize("base", [False, True])
def test_layers_that_no_adapter_changes_count_if_the_base_is_given(base, tmp_path):
    """Llama 4's zoo model has four layers; without the base the last adapted one is the end of the gradient."""
    name = "llama4"
    adapted = zoo.peft_model(name, target_modules=r".*layers\.[012]\.self_attn\.q_proj")
    adapted.save_pretrained(tmp_path / "one")
    options = {"base": zoo.gguf_model(name)} if base else {}
    gguflora.combine([(tmp_path / "one", [0, 3])], tmp_path / "out", **options)
    before, after = (deltas_in(name, tmp_path / folder) for folder in ("one", "out"))
    assert len(before) == 3
    for key, delta in before.items():
        layer = int(re.search(r"layers\.(\d+)", key)[1])
        np.testing.assert_allclose(after[key], delta * layer * (1.0 if base else 1.5), atol=1e-6)


def deltas_in(name, folder):
    model = peft.PeftModel.from_pretrained(zoo.model(name), folder)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {key: layer.get_delta_weight("default").detach().double().numpy() for key, layer in layers.items()}


def test_gguf_names(tmp_path):
    """Patterns match the names of the output; the file says how it was made."""
    base = builders.gguf_model("llama")
    spec = Adapter(targets=("q_proj", "down_proj"), rank=4)
    adapter = builders.adapter("llama", spec)
    gguflora.convert(adapter, base, tmp_path / "one.gguf", outtype="f32")
    weight = {"*ffn_down*": 0.5, "*": [1, 0.5]}
    report = gguflora.combine([(adapter, weight)], tmp_path / "out.gguf", base=base, outtype="f32")
    before, after = lora_changes(tmp_path / "one.gguf"), lora_changes(tmp_path / "out.gguf")
    for name, delta in before.items():
        np.testing.assert_allclose(after[name], delta * weight_of(weight, name, 2), atol=1e-6)
    assert report.adapters[0][2] == {"*ffn_down*": 0.5, "*": (1.0, 0.5)}
    assert "x *ffn_down*=0.5;*=1,0.5" in str(read_metadata(tmp_path / "out.gguf").values())


def test_whole_weights_have_weights_by_name_too(tmp_path):
    saved = builders.trained_adapter(
        "llama", Trained(peft.LoraConfig, ("q_proj",), {"modules_to_save": ["lm_head", "norm"]})
    )
    base = builders.hf_model("llama")
    gguflora.combine([(saved, {"lm_head*": 0.5, "*norm*": [1, 0]})], tmp_path / "out", base=base)
    before, old, new = (load_file(path) for path in weights_in(base, saved, tmp_path / "out"))
    head = "base_model.model.lm_head.weight"
    expected = (old[head] + before["lm_head.weight"]) / 2
    np.testing.assert_allclose(new[head], expected, atol=1e-6)
    norms = [key for key in new if "norm" in key and "layers" not in key]
    assert norms
    for key in norms:
        np.testing.assert_allclose(new[key], before[key.removeprefix("base_model.model.")], atol=1e-6)


def weights_in(base, *folders):
    return [base / "model.safetensors", *(folder / "adapter_model.safetensors" for folder in folders)]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"*mpl*": 0.5}, r"the pattern '\*mpl\*' matches none of the 8 weights"),
        ([], "its weight is"),
        ({}, "its weight is empty"),
        ([0.5, float("nan")], "expected a finite number"),
        ([1e39], "expected a finite number"),
        ({"*": "x"}, "expected a finite number"),
        ("x", "expected a finite number"),
    ],
)
def test_impossible_weights(weight, message, tmp_path):
    adapter = builders.adapter("llama", SPECS[0])
    with pytest.raises(AdapterError, match=message):
        gguflora.combine([(adapter, weight)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    one, two = (builders.adapter("llama", spec) for spec in SPECS)
    result = run("combine", f"{one}:0,1", f"{two}:*mlp*=0.5;*=0,0.5,1", "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    given = [weight for _, _, weight in json.loads(result.stdout)["adapters"]]
    assert given == [[0, 1], {"*mlp*": 0.5, "*": [0, 0.5, 1]}]
    first, second, found = (deltas_by_peft(path) for path in (one, two, tmp_path / "out"))
    for name, delta in found.items():
        late = 1.0 if "layers.1" in name or "lm_head" in name else 0.0
        wanted = late * first[name] + (0.5 if "mlp" in name else late) * second[name]
        np.testing.assert_allclose(delta, wanted, atol=1e-6)
    told = run("combine", f"{one}:0,1", "-o", tmp_path / "out", "--force")
    assert " x 0,1; " in told.stdout
