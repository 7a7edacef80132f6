"""What PEFT saves beside a method's tensors, and in which files."""

import json

import gguf
import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import gguflora
from gguflora.errors import GgufloraError, MismatchError, SafetensorsError
from gguflora.files import safetensors as files
from support import builders
from support.asserts import assert_same_changes
from support.builders import Trained
from support.oracles import libggml
from support.oracles.gguf_files import lora_changes, read_tensors
from support.oracles.llama_cpp import convert_lora
from support.oracles.peft import merged_gguf

WEIGHTS = "adapter_model.safetensors"


def lora(*targets, **options):
    return Trained(peft.LoraConfig, targets or ("q_proj", "v_proj"), {"r": 4, "lora_alpha": 8, **options})


@pytest.fixture
def adapter(tmp_path):
    """A copy of an adapter, to be changed."""
    source, folder = builders.trained_adapter("llama", lora()), tmp_path / "adapter"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_module_that_was_trained_whole_is_no_copy_of_the_base(tmp_path):
    """A small change of it is less than what a quantized base loses, and still no copy."""
    spec = Trained(peft.LoraConfig, ("q_proj",), {"modules_to_save": ["mlp"]}, std=1e-3)
    adapter, base = builders.trained_adapter("llama", spec, "wide"), builders.gguf_model("llama", "wide", "Q4_0")
    gguflora.merge(base, adapter, tmp_path / "out.gguf", rounding="nearest")
    expected = libggml.quantize(read_tensors(merged(adapter))["blk.0.ffn_up.weight"], 2)
    found = next(t for t in gguflora_tensors(tmp_path / "out.gguf") if t.name == "blk.0.ffn_up.weight")
    assert (found.data == expected).mean() > 0.9999


def merged(adapter):
    return merged_gguf(builders.hf_model("llama", "wide"), adapter)


def gguflora_tensors(path):
    return gguf.GGUFReader(path).tensors


def test_shards_with_an_index(adapter, tmp_path):
    """As transformers writes large adapters."""
    tensors = safetensors.torch.load_file(adapter / WEIGHTS)
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key, place in places.items() if place == name}
        safetensors.torch.save_file(part, adapter / name)
    whole = gguflora.read_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    (adapter / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = gguflora.read_adapter(adapter)
    assert found.changes.keys() == whole.changes.keys()
    assert gguflora.inspect(adapter).size == sum((adapter / name).stat().st_size for name in names)
    base = builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    expected = lora_changes(convert_lora(*plain(tmp_path)))
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)
    (adapter / names[1]).unlink()
    with pytest.raises(SafetensorsError, match="00002-of-00002"):
        gguflora.read_adapter(adapter)


def plain(tmp_path):
    return builders.trained_adapter("llama", lora()), builders.hf_model("llama"), tmp_path / "theirs.gguf"


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(index, adapter):
    (adapter / WEIGHTS).unlink()
    (adapter / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(SafetensorsError, match="index"):
        gguflora.read_adapter(adapter)


def test_a_file_that_becomes_shorter_while_it_is_read(adapter, monkeypatch):
    """It costs an error, where a mapped file would end the process (SIGBUS)."""
    check = files._check_entries

    def cut(path, header, n_bytes):
        check(path, header, n_bytes)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - n_bytes // 2)

    monkeypatch.setattr(files, "_check_entries", cut)
    with pytest.raises(SafetensorsError, match="shorter"):
        gguflora.read_adapter(adapter)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_dtypes_of_the_file(dtype, tolerance, adapter, tmp_path):
    tensors = safetensors.torch.load_file(adapter / WEIGHTS)
    safetensors.torch.save_file({key: value.to(dtype) for key, value in tensors.items()}, adapter / WEIGHTS)
    gguflora.convert(adapter, builders.gguf_model("llama"), tmp_path / "lora.gguf", outtype="f32")
    expected = lora_changes(convert_lora(*plain(tmp_path)))
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected, tolerance)


def test_patterns_that_peft_has_sorted(tmp_path):
    """Of two that match, the file no longer says which came first: tensors tell the rank, nothing the alpha."""
    options = {"rank_pattern": {"q_proj": 6, r".*layers\.0.*": 3}, "alpha_pattern": {"v_proj": 5, r".*layers\.1.*": 3}}
    adapter, base = builders.trained_adapter("llama", lora(**options)), builders.gguf_model("llama")
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert list(saved["rank_pattern"]) == [r".*layers\.0.*", "q_proj"]
    read = gguflora.read_adapter(adapter)
    ranks = {name: change.rank for name, (change,) in read.changes.items()}
    assert [ranks[f"model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 1)] == [6, 6]
    assert [ranks[f"model.layers.{n}.self_attn.v_proj.weight"] for n in (0, 1)] == [3, 4]
    (said,) = gguflora.merge(base, adapter, tmp_path / "out.gguf").warnings
    assert "several patterns of alpha_pattern match model.layers.1.self_attn.v_proj" in said
    assert read.changes["model.layers.1.self_attn.v_proj.weight"][0].scaling == 3 / 4


# -- outputs --


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "README.md"])
def test_an_output_never_overwrites_a_file_of_the_adapter(name, adapter):
    base, before = builders.gguf_model("llama"), (adapter / name).read_bytes()
    for command in (gguflora.convert, lambda lora, model, out, **options: gguflora.merge(model, lora, out, **options)):
        with pytest.raises(GgufloraError, match="is also an input"):
            command(adapter, base, adapter / name, force=True)
    assert (adapter / name).read_bytes() == before
    gguflora.convert(adapter, base, adapter / "lora.gguf")
    gguflora.convert(adapter, base, adapter / "lora.gguf", force=True)  # an output, not a part of the adapter


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A llama in three files."""
    folder = tmp_path_factory.mktemp("split")
    source = builders.gguf_model("llama")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "llama.gguf", "llama", split_max_tensors=8)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("*.gguf"))


def test_any_file_of_a_split_base_stands_for_all(split, tmp_path):
    assert len(split) == 3
    adapter = builders.trained_adapter("llama", lora(use_dora=True))
    for number, base in enumerate((builders.gguf_model("llama"), *split)):
        gguflora.convert(adapter, base, tmp_path / f"{number}.gguf", rank=4)
    expected = lora_changes(tmp_path / "0.gguf")
    for number in (1, 2, 3):
        assert_same_changes(lora_changes(tmp_path / f"{number}.gguf"), expected, 1e-9)
    assert len(gguflora.inspect(adapter, split[1]).changes) == 4


@pytest.mark.parametrize("given", [0, 1])
def test_an_output_never_overwrites_a_file_of_a_split_base(given, split, adapter):
    before = [path.read_bytes() for path in split]
    for target in split:
        with pytest.raises(GgufloraError, match="is also an input"):
            gguflora.convert(adapter, split[given], target, force=True)
    assert [path.read_bytes() for path in split] == before


def test_a_stack_of_too_few_experts(tmp_path):
    """Ranks that do not divide as the experts do must not change some of them only."""
    from support import zoo

    model = zoo.peft_model("mixtral", target_modules=[], target_parameters=["experts.down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    builders.edit_config(tmp_path / "adapter", r=6)
    with pytest.raises(MismatchError, match="changes 2 experts"):
        gguflora.merge(zoo.gguf_model("mixtral"), tmp_path / "adapter", tmp_path / "out.gguf")
