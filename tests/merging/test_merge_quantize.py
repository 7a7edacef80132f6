"""`merge --quantize` against llama.cpp's own quantizer on the merged model in F32: the same bytes of whole files."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import gguflora
from gguflora.errors import GgufloraError, QuantizationError, UsageError
from support import builders, zoo
from support.cli import run
from support.llama_quantize import imatrix_of, llama_quantize

pytestmark = pytest.mark.llama
SIZES = {"llama": "wide", "gemma2": "wide", "qwen2": "small"}


def models(arch):
    """A model in F32 and an adapter for it."""
    if arch in SIZES:
        size = SIZES[arch]
        return builders.gguf_model(arch, size), builders.adapter(arch, builders.Adapter(seed=1), size)
    return zoo.gguf_model(arch), None


def assert_same_file(base, adapters, folder, preset, *, imatrix=None, types=(), **options):
    merged, expected, found = (folder / f"{name}.gguf" for name in ("merged", "expected", "found"))
    gguflora.merge(base, adapters, merged, outtype="f32", force=True)
    status = llama_quantize(merged, expected, preset, imatrix=imatrix, types=types, **options)
    arguments = {"quantize": preset, "imatrix": imatrix, "tensor_types": types or None, **options}
    if status:
        with pytest.raises(GgufloraError, match=r"importance matrix|cannot be stored as"):
            gguflora.merge(base, adapters, found, **arguments)
        return None
    report = gguflora.merge(base, adapters, found, force=True, **arguments)
    if found.read_bytes() != expected.read_bytes():
        assert fields_of(found) == fields_of(expected)
        assert types_of(found) == types_of(expected)
        pytest.fail("fields and types are equal, the bytes are not")
    return report


def types_of(path):
    return [(tensor.name, tensor.tensor_type.name) for tensor in gguf.GGUFReader(path).tensors]


def fields_of(path):
    return [(name, field.contents()) for name, field in gguf.GGUFReader(path).fields.items()]


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ3_M", "Q8_0", "F16"])
@pytest.mark.parametrize("arch", SIZES)
def test_same_bytes(arch, preset, with_imatrix, tmp_path):
    base, adapter = models(arch)
    imatrix = imatrix_of(base, tmp_path / "imatrix.gguf") if with_imatrix else None
    report = assert_same_file(base, adapter, tmp_path, preset, imatrix=imatrix)
    if report is not None:
        assert (report.preset, report.total.weights > 0) == (preset, True)


def test_experts(tmp_path):
    adapter = tmp_path / "adapter"
    model = zoo.peft_model("qwen3moe")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(adapter)
    assert_same_file(zoo.gguf_model("qwen3moe"), adapter, tmp_path, "Q4_K_M")


@pytest.mark.parametrize(
    "options",
    [
        {"pure": True},
        {"output_tensor_type": "Q8_0", "token_embedding_type": "Q5_K"},
        {"types": [("attn_v", "Q8_0"), ("ffn_down", "Q6_K")]},
    ],
    ids=["pure", "ends", "types"],
)
def test_options(options, tmp_path):
    base, adapter = models("llama")
    assert_same_file(base, [(adapter, 0.5)], tmp_path, "Q4_K_M", **options)


@pytest.mark.parametrize("outtype", ["F16", "BF16"])
def test_bases_of_half_precision(outtype, tmp_path):
    """The sum is not rounded to F16 on the way: the bytes are those of the sum in F32."""
    base = builders.gguf_model("llama", "wide", outtype)
    adapter = builders.adapter("llama", builders.Adapter(seed=1), "wide")
    merged, found = tmp_path / "merged.gguf", tmp_path / "found.gguf"
    gguflora.merge(base, adapter, merged, outtype="f32")
    changed = {tensor.name for tensor in gguflora.merge(base, adapter, found, quantize="Q4_K_M").tensors}
    assert llama_quantize(merged, tmp_path / "expected.gguf", "Q4_K_M") == 0
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (found, tmp_path / "expected.gguf")
    )
    assert len(changed) > 10
    for name in ours:
        assert ours[name].tensor_type == theirs[name].tensor_type
        np.testing.assert_array_equal(ours[name].data, theirs[name].data)


def test_parts_and_patches_give_the_same_bytes(tmp_path):
    base, adapter = models("llama")
    options = {"quantize": "Q4_K_M", "tensor_types": {"attn_v": "q8_0"}}
    gguflora.merge(base, adapter, tmp_path / "whole.gguf", **options)
    whole = (tmp_path / "whole.gguf").read_bytes()
    for number in (1, 2):
        gguflora.merge_part(base, adapter, tmp_path / f"{number}.part", number=number, count=2, **options)
    parts = [tmp_path / "1.part", tmp_path / "2.part"]
    report = gguflora.assemble(base, adapter, tmp_path / "parts.gguf", parts, **options)
    assert ((tmp_path / "parts.gguf").read_bytes(), report.preset) == (whole, "Q4_K_M")
    gguflora.merge(base, adapter, patch=tmp_path / "patch", **options)
    gguflora.apply_patch(base, tmp_path / "patch", tmp_path / "patched.gguf")
    assert (tmp_path / "patched.gguf").read_bytes() == whole
    gguflora.merge(base, adapter, tmp_path / "one.gguf", threads=1, **options)
    assert (tmp_path / "one.gguf").read_bytes() == whole


def test_command_and_recipe(tmp_path):
    base, adapter = models("llama")
    words = ["--quantize", "q4_k_m", "--tensor-type", "attn_v=q8_0", "--output-tensor-type", "q5_k", "--json"]
    done = run("merge", base, "--lora", adapter, "-o", tmp_path / "cli.gguf", *words)
    assert json.loads(done.stdout)["preset"] == "Q4_K_M"
    options = {"quantize": "Q4_K_M", "tensor_types": {"attn_v": "q8_0"}, "output_tensor_type": "Q5_K"}
    gguflora.merge(base, adapter, tmp_path / "python.gguf", **options)
    assert (tmp_path / "cli.gguf").read_bytes() == (tmp_path / "python.gguf").read_bytes()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'output = "out"\n[[steps]]\nname = "m"\naction = "merge"\nbase = "{base}"\nadapters = ["{adapter}"]\n'
        'quantize = "Q4_K_M"\ntensor_types = { attn_v = "q8_0" }\noutput_tensor_type = "Q5_K"\nout = "m.gguf"\n'
    )
    gguflora.run_pipeline(recipe)
    assert (tmp_path / "out" / "m.gguf").read_bytes() == (tmp_path / "python.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "Q4_X"}, QuantizationError, "unknown preset 'Q4_X'"),
        ({"quantize": "IQ2_XXS"}, QuantizationError, "importance matrix"),
        ({"quantize": "Q4_K_M", "outtype": "q8_0"}, UsageError, "--tensor-type"),
        ({"quantize": "Q4_K_M", "type": {"*": "q8_0"}}, UsageError, "--tensor-type"),
        ({"quantize": "Q4_K_M", "base_f16": "x.gguf"}, UsageError, "as the base itself"),
        ({"pure": True}, UsageError, "pure needs quantize"),
        ({"tensor_types": {"attn_v": "q8_0"}}, UsageError, "tensor_types needs quantize"),
        ({"quantize": "Q4_K_M", "tensor_types": {"(": "q8_0"}}, QuantizationError, "not a regular expression"),
    ],
)
def test_bad_input(options, error, message, tmp_path):
    base, adapter = models("llama")
    with pytest.raises(error, match=message):
        gguflora.merge(base, adapter, tmp_path / "out.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_not_in_place(tmp_path):
    base, adapter = models("llama")
    copy = Path(tmp_path / "base.gguf")
    copy.write_bytes(base.read_bytes())
    with pytest.raises(UsageError, match="in place keeps the types"):
        gguflora.merge(copy, adapter, in_place=True, quantize="Q4_K_M")
    assert copy.read_bytes() == base.read_bytes()
