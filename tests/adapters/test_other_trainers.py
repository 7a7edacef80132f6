"""Directories of other trainers: read like the adapters they hold, or refused with what to do instead."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import AdapterError, FormatError
from support import builders
from support.asserts import assert_same_changes
from support.builders import Adapter
from support.oracles.gguf_files import lora_changes

V_PROJ = "model.layers.0.self_attn.v_proj"


def factors(first="lora_a", second="lora_b", prefix=""):
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((96, 4), (4, 64)))
    return {f"{prefix}{V_PROJ}.{first}": a, f"{prefix}{V_PROJ}.{second}": b}, {"blk.0.attn_v.weight": 2.5 * (a @ b).T}


def write(folder, tensors, config, suffix="safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if suffix == "npz":
        np.savez(folder / "adapters.npz", **tensors)
    else:
        safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
    return folder


MLX = {"lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0}}
KINDS = {
    "npz": (factors(), MLX, "npz"),
    "unsloth-mlx": (factors(), {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "fine_tune_type": "lora", **MLX}, ""),
    "unsloth-mlx-without": (factors(), {"peft_type": "LORA", "r": 4, "lora_alpha": 10}, ""),
    "mlx-vlm": (factors("A", "B", "language_model."), {"rank": 4, "alpha": 2.5, "dropout": 0.1}, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_directories_of_mlx(kind, tmp_path):
    (tensors, expected), config, suffix = KINDS[kind]
    adapter = write(tmp_path / "adapter", tensors, config, suffix)
    gguflora.convert(adapter, builders.gguf_model("llama"), tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)


def refused(folder, *words, error=AdapterError):
    with pytest.raises(error) as caught:
        gguflora.inspect(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def test_npz_is_never_unpickled_or_unpacked_without_bounds(tmp_path):
    folder = write(tmp_path / "adapter", factors()[0], MLX, "npz")
    np.savez(folder / "adapters.npz", a=np.array([{}], object))
    refused(folder, "adapters.npz", error=FormatError)
    np.savez_compressed(folder / "adapters.npz", a=np.zeros(1 << 20))
    refused(folder, "compressed", error=FormatError)
    with zipfile.ZipFile(folder / "adapters.npz", "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}".ljust(117) + b"\n"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refused(folder, "has 0 bytes", error=FormatError)
    (folder / "adapters.npz").write_bytes(b"PK\x03\x04 damaged")
    refused(folder, "not a readable .npz", error=FormatError)


def test_the_directory_above_names_the_newest_checkpoint(tmp_path):
    for name in ("checkpoint-90", "checkpoint-500"):
        shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "run" / name)
    refused(tmp_path / "run", f"give {tmp_path / 'run' / 'checkpoint-500'}")
    shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "named" / "default")
    refused(tmp_path / "named", f"give {tmp_path / 'named' / 'default'}")


@pytest.mark.parametrize(
    ("file", "words"),
    [("__0_0.distcp", "accelerate merge-weights"), ("pytorch_model_fsdp.bin", "accelerate merge-weights"),
     ("zero_to_fp32.py", "zero_to_fp32.py"), ("model.nemo", "NeMo"), ("adapters.npz", "scale"),
     ("adapter_0.pt", "torchtune"), ("model.safetensors", "gguflora extract")],
)  # fmt: skip
def test_other_checkpoints_are_named(tmp_path, file, words):
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path, words)


@pytest.mark.parametrize(
    "key",
    ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te1_text_model_encoder_layers_0.alpha",
     "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
     "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
)  # fmt: skip
def test_loras_of_image_models_are_named(tmp_path, key):
    safetensors.numpy.save_file({key: np.ones((4, 4), np.float32)}, tmp_path / "pytorch_lora_weights.safetensors")
    refused(tmp_path, "an image model's LoRA")
    refused(tmp_path / "pytorch_lora_weights.safetensors", "an image model's LoRA")
    shutil.copy(builders.adapter("llama", Adapter(seed=5)) / "adapter_config.json", tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "an image model's LoRA")


def test_git_lfs_pointers_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
    folder = shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(pointer)
    refused(folder, "git lfs pull", error=FormatError)
    (tmp_path / "base.gguf").write_bytes(pointer)
    with pytest.raises(FormatError, match="git lfs pull"):
        gguflora.convert(builders.adapter("llama", Adapter(seed=5)), tmp_path / "base.gguf", tmp_path / "out.gguf")


def test_what_alpha_of_mlx_vlm_means_depends_on_its_version(tmp_path):
    tensors, expected = factors("A", "B", "language_model.")
    folder = write(tmp_path / "adapter", tensors, {"rank": 4, "alpha": 2.5, "dropout": 0.1})
    report = gguflora.convert(folder, builders.gguf_model("llama"), tmp_path / "old.gguf")
    assert any("alpha / rank" in text for text in report.warnings)
    folder = write(tmp_path / "new", tensors, {"rank": 4, "alpha": 2.5, "lora_parameters": {"scale": 2.5 / 4}})
    report = gguflora.convert(folder, builders.gguf_model("llama"), tmp_path / "new.gguf")
    assert report.warnings == ()
    quarters = {tensor: change / 4 for tensor, change in expected.items()}
    assert_same_changes(lora_changes(tmp_path / "new.gguf"), quarters)


def test_the_names_of_megatron_are_told_with_the_way_out(tmp_path):
    at = "decoder.layers.0.self_attention.linear_qkv.adapter"
    weights = {
        f"{at}.linear_in.weight": np.ones((4, 96), np.float32),
        f"{at}.linear_out.weight": np.ones((256, 4), "f4"),
    }
    folder = write(tmp_path / "adapter", weights, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")
    refused(folder, "Megatron", "export_adapter_ckpt")


def test_weights_under_another_name_are_told_with_the_way_out(tmp_path):
    folder = write(tmp_path / "adapter", factors()[0], {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    next(folder.glob("*.safetensors")).rename(folder / "frame.safetensors")
    refused(folder, "if frame.safetensors holds its weights, rename it to adapter_model.safetensors", error=FormatError)
