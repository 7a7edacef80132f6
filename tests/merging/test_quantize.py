"""`quantize` against llama.cpp's own quantizer: the same bytes of whole files, metadata included."""

import gguf
import numpy as np
import pytest

import gguflora
from gguflora.errors import FormatError, GgufloraError, QuantizationError
from gguflora.merging.presets import _PRESETS
from support.llama_quantize import imatrix_of, layered_model, llama_quantize
from support.real_models import model as real_model

MODELS = {
    "llama": {},
    "tied": {"tied": True, "n_head_kv": 8},
    "experts": {"architecture": "qwen3moe", "n_expert": 4},
    "eight_experts": {"n_expert": 8},
    "falcon": {"architecture": "falcon", "n_layers": 32},
    "phi3": {"architecture": "phi3"},
    "odd": {"n_in": 96},
    "very_odd": {"n_in": 80},
}
pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model with its importance matrix, made when a test asks for it."""
    folder, made = tmp_path_factory.mktemp("layered"), {}

    def get(name):
        if name not in made:
            path = layered_model(folder / f"{name}.gguf", **MODELS[name])
            made[name] = path, imatrix_of(path, folder / f"{name}.imatrix")
        return made[name]

    return get


def assert_same_file(source, folder, preset, *, imatrix=None, types=(), **options):
    expected, found = folder / "expected.gguf", folder / "found.gguf"
    status = llama_quantize(source, expected, preset, imatrix=imatrix, types=types, **options)
    if status:  # llama.cpp refuses: an importance matrix is missing
        with pytest.raises(GgufloraError, match=r"importance matrix|cannot be stored as"):
            gguflora.quantize(source, found, preset, imatrix=imatrix, tensor_types=types, **options)
        return
    gguflora.quantize(source, found, preset, imatrix=imatrix, tensor_types=types, force=True, **options)
    if found.read_bytes() != expected.read_bytes():
        assert types_of(found) == types_of(expected)  # says which tensor differs
        pytest.fail("the types are equal, the bytes are not")


def types_of(path):
    return [(tensor.name, tensor.tensor_type.name) for tensor in gguf.GGUFReader(path).tensors]


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_M", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "tied", "experts", "odd"])
def test_same_bytes(name, preset, with_imatrix, models, tmp_path):
    source, imatrix = models(name)
    assert_same_file(source, tmp_path, preset, imatrix=imatrix if with_imatrix else None)


@pytest.mark.slow
@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", _PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_every_preset(name, preset, with_imatrix, models, tmp_path):
    source, imatrix = models(name)
    assert_same_file(source, tmp_path, preset, imatrix=imatrix if with_imatrix else None)


@pytest.mark.parametrize("source_type", ["F16", "BF16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("preset", ["Q4_K_M", "F32", "Q8_0"])
def test_sources_of_other_types(source_type, preset, models, tmp_path):
    """Quantized tensors are quantized again, and those that have their type already are copied."""
    gguflora.quantize(models("llama")[0], tmp_path / "source.gguf", source_type)
    assert_same_file(tmp_path / "source.gguf", tmp_path, preset)


def test_quantizing_again_is_warned_about(models, tmp_path):
    first = gguflora.quantize(models("llama")[0], tmp_path / "q8.gguf", "Q8_0")
    assert first.warnings == ()
    assert "quantized again" in gguflora.quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0").warnings[0]


@pytest.mark.parametrize(
    "options",
    [
        {"pure": True},
        {"output_tensor_type": "Q8_0"},
        {"token_embedding_type": "Q5_K"},
        {"types": [("attn_v", "Q8_0"), ("blk.[0-3].ffn_down", "F16"), ("ffn_down", "Q6_K")]},
        {"types": [("token_embd", "Q4_0")], "pure": True, "output_tensor_type": "F16"},
    ],
    ids=["pure", "output", "embedding", "types", "all"],
)
@pytest.mark.parametrize("name", ["llama", "tied", "odd"])
def test_options(name, options, models, tmp_path):
    if name == "odd" and "token_embedding_type" in options:
        options = {"token_embedding_type": "Q5_1"}
    assert_same_file(models(name)[0], tmp_path, "Q4_K_M", **options)


def test_threads_change_nothing(models, tmp_path):
    for threads in (1, 3):
        gguflora.quantize(models("experts")[0], tmp_path / f"{threads}.gguf", "Q4_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_dry_run_tells_the_size(models, tmp_path):
    source = models("llama")[0]
    plan = gguflora.quantize(source, tmp_path / "out.gguf", "q4_k", dry_run=True)
    assert not list(tmp_path.iterdir())
    report = gguflora.quantize(source, tmp_path / "out.gguf", "Q4_K_M")
    assert (plan.size, plan.types) == ((tmp_path / "out.gguf").stat().st_size, report.types)
    assert list(report.tensors) != []
    assert sum(report.types.values()) == len(report.tensors)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("Q4_X", {}, "unknown preset 'Q4_X'"),
        ("IQ2_XXS", {}, "importance matrix"),
        ("Q4_K_M", {"tensor_types": [("(", "Q8_0")]}, "not a regular expression"),
        ("Q4_K_M", {"tensor_types": {"attn_v": "Q9"}}, "unknown quant type 'Q9'"),
        ("Q4_K_M", {"output_tensor_type": "IQ2_XS"}, "importance matrix"),
    ],
)
def test_bad_input(preset, options, message, models, tmp_path):
    with pytest.raises(QuantizationError, match=message.replace("(", r"\(")):
        gguflora.quantize(models("llama")[0], tmp_path / "out.gguf", preset, **options)
    assert not list(tmp_path.iterdir())


def test_nan_is_located(models, tmp_path):
    source, broken = models("llama")[0], tmp_path / "broken.gguf"
    content = bytearray(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.3.ffn_up.weight")
    at = int(tensor.data_offset) + 4 * (5 * 256 + 7)
    content[at : at + 4] = np.float32("nan").tobytes()
    broken.write_bytes(content)
    with pytest.raises(GgufloraError, match=r"blk\.3\.ffn_up\.weight', row 5, column 7"):
        gguflora.quantize(broken, tmp_path / "out.gguf", "Q4_K_M")
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_that_is_no_imatrix(models, tmp_path):
    (tmp_path / "text").write_text("no matrix at all")
    with pytest.raises(FormatError):
        gguflora.quantize(models("llama")[0], tmp_path / "out.gguf", "Q4_K_M", imatrix=tmp_path / "text")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name, tmp_path):
    assert_same_file(real_model(name), tmp_path, "Q4_K_M")
