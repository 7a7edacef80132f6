"""Methods that depend on the base's weight, where its rows are permuted, fused, split, transposed or shared out."""

import architecture_models as zoo
import numpy as np
import peft
import pytest
import torch

import gguflora

METHODS = {
    "dora": lambda **options: peft.LoraConfig(r=3, use_dora=True, **options),
    "ia3": lambda **options: peft.IA3Config(feedforward_modules=[], **options),
    "fourierft": lambda **options: peft.FourierFTConfig(n_frequency=100, scaling=50.0, **options),
    "deft": lambda **options: peft.DeftConfig(r=3, **options),
    "road": lambda **options: peft.RoadConfig(group_size=8, **options),
    "glora": lambda **options: peft.GloraConfig(r=3, **options),
    "osf": lambda **options: peft.OSFConfig(effective_rank=0.5, **options),
    "saved_whole": lambda **_: peft.LoraConfig(r=3, target_modules=["c_attn"], modules_to_save=["c_proj"]),
}
NO_DORA = {"deepseek2", "deepseek3", "qwen3next"}  # PEFT wraps their experts, too, and then refuses to
EVERYWHERE = [(name, "dora") for name in zoo.HAS_CLASS if name not in NO_DORA]
EVERYWHERE += [(name, "ia3") for name in zoo.HAS_CLASS]
SOME = [
    *(("gpt2", method) for method in ("fourierft", "deft", "saved_whole")),
    *((name, method) for name in ("gptneox", "bloom", "starcoder2") for method in ("road", "glora", "osf")),
    *((name, method) for name in ("falcon", "deepseek2") for method in ("road", "osf", "deft")),
]


def adapted(name, method, path):
    """PEFT's merge of a random adapter on all linear layers: its directory, and the merged model by the converter."""
    built = zoo.model(name)
    config = METHODS[method](target_modules=zoo.linear_modules(name, built))
    torch.manual_seed(3)
    model = peft.get_peft_model(built, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path / "adapter")
    return path / "adapter", zoo.to_gguf(name, zoo.save(name, model.merge_and_unload(), path / "merged"))


@pytest.mark.parametrize(("name", "method"), EVERYWHERE + SOME)
def test_equals_pefts_merge(name, method, tmp_path):
    adapter, merged = adapted(name, method, tmp_path)
    gguflora.merge(zoo.gguf_model(name), adapter, tmp_path / "out.gguf")
    base, expected, found = (zoo.tensors(path) for path in (zoo.gguf_model(name), merged, tmp_path / "out.gguf"))
    assert found.keys() == base.keys()
    for key, values in base.items():
        change = expected[key].astype(np.float64) - values
        if np.linalg.norm(change) <= 1e-5 * np.linalg.norm(values):
            np.testing.assert_array_equal(found[key], values, err_msg=key)
        else:
            error = np.linalg.norm(found[key].astype(np.float64) - expected[key]) / np.linalg.norm(change)
            assert error <= 1e-4, f"{key}: relative error of the change is {error:.1e}"
