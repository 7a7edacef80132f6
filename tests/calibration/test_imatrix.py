"""`imatrix` against torch (llama.cpp's formula in numpy on the inputs of transformers' modules) and llama-imatrix."""

from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH, get_tensor_name_map

import gguflora
from gguflora.calibration.collect import TOKENS
from gguflora.calibration.text import built_in_text
from gguflora.errors import FormatError, GgufError, GgufloraError, HotSwapError, UsageError
from gguflora.merging.imatrix import read_origin
from gguflora.quants._lib import choose_isa
from gguflora.runtime.graph_hook import GraphHook, proven_layout
from gguflora.runtime.input_watch import InputWatch
from gguflora.runtime.logits import LogitsModel
from support import builders, zoo
from support.llama_quantize import llama_quantize
from support.real_models import model as real_model

pytestmark = pytest.mark.llama
CTX = 32
DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"
DEMO_LINE = "line {}: the quick brown fox jumps over the lazy dog, said nobody {}.\n"
TEXT = "the cat and the other animals are in the garden under another tree, thinner than ever. " * 3


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def windows(ctx=CTX):
    tokens = builders._tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    return [tokens[start : start + ctx] for start in range(0, len(tokens) - ctx + 1, ctx)]


def measured(path):
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
    assert len(tensors) == 2 * len(names)
    return {name: (np.atleast_2d(tensors[f"{name}.in_sum2"]), tensors[f"{name}.counts"].ravel()) for name in names}


def expected(model, modules):
    """Sums of squares and counts of the inputs of modules, by the name of the module."""
    sums, counts = defaultdict(float), defaultdict(int)

    def note(name):
        def hook(_, arguments):
            rows = arguments[0].detach().double().reshape(-1, arguments[0].shape[-1])
            sums[name] += (rows**2).sum(0).numpy()
            counts[name] += len(rows)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, modules):
            module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        for window in windows():
            model(torch.tensor([window]), use_cache=False)
    return {name: (sums[name], counts[name]) for name in sums}


@pytest.mark.parametrize(("arch", "tolerance"), [("llama", 1e-5), ("qwen2", 1e-5), ("gemma2", 2e-3)])
def test_sums_of_torch(arch, tolerance, text, tmp_path):
    """ggml looks gemma's GELU up in a table of halves; nothing else but the order of sums separates them."""
    report = gguflora.imatrix(builders.gguf_model(arch), tmp_path / "out.gguf", text=text, ctx=CTX, threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model(arch), attn_implementation="eager")
    names = get_tensor_name_map(getattr(MODEL_ARCH, arch.upper()), 2)
    found, wanted = measured(tmp_path / "out.gguf"), expected(model.float().eval(), torch.nn.Linear)
    wanted = {f"{names.get_name(name)}.weight": sums for name, sums in wanted.items() if name != "lm_head"}
    assert found.keys() == wanted.keys() == set(report.tensors)
    for name, (squares, count) in wanted.items():
        np.testing.assert_array_equal(found[name][1], [count])
        np.testing.assert_allclose(found[name][0].ravel(), squares, rtol=tolerance)
    assert (report.chunks, report.ctx) == (len(windows()), CTX)


def test_inputs_of_the_first_layer_are_exact(text, tmp_path):
    """Before any attention: nothing but float32 separates them."""
    gguflora.imatrix(builders.gguf_model("llama"), tmp_path / "out.gguf", text=text, ctx=CTX, threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model("llama")).float().eval()
    squares, _ = expected(model, torch.nn.Linear)["model.layers.0.self_attn.q_proj"]
    for projection in "qkv":
        found, _ = measured(tmp_path / "out.gguf")[f"blk.0.attn_{projection}.weight"]
        np.testing.assert_allclose(found.ravel(), squares, rtol=1e-5)


def test_experts_are_counted_by_torch(text, tmp_path):
    gguflora.imatrix(zoo.gguf_model("qwen3moe"), tmp_path / "out.gguf", text=text, ctx=CTX, threads=1)
    found, model = measured(tmp_path / "out.gguf"), zoo.model("qwen3moe")
    n_experts = model.config.num_experts
    seen = []  # of the first layer: inputs and chosen experts
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0], arguments[1])))
    with torch.inference_mode():
        for window in windows():
            model(torch.tensor([window]), use_cache=False)
    x = torch.cat([inputs for inputs, _ in seen]).double()
    chosen = torch.cat([ids for _, ids in seen])
    for expert in range(n_experts):
        rows = x[(chosen == expert).any(1)]
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        for part, inputs in {"gate": rows, "up": rows, "down": inner}.items():
            squares, counts = found[f"blk.0.ffn_{part}_exps.weight"]
            assert counts[expert] == len(rows)
            np.testing.assert_allclose(squares[expert], (inputs**2).sum(0).detach(), rtol=2e-3, atol=1e-6)
    assert 0 < found["blk.0.ffn_down_exps.weight"][1].max() < chosen.numel()


def test_windows_larger_than_a_batch_and_a_rest(tmp_path):
    """Whole windows only, each in batches of its own."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    base = builders.gguf_model("llama", outtype="F32")
    report = gguflora.imatrix(base, tmp_path / "out.gguf", text=path, ctx=100, threads=1)
    tokens = builders._tokenizer()(TEXT * 8, add_special_tokens=False)["input_ids"]
    assert report.chunks == len(tokens) // 100
    assert measured(tmp_path / "out.gguf")["blk.1.ffn_down.weight"][1] == [100 * report.chunks]
    two = gguflora.imatrix(base, tmp_path / "two.gguf", text=path, ctx=100, chunks=2, threads=1)
    assert (two.chunks, measured(tmp_path / "two.gguf")["blk.0.attn_q.weight"][1]) == (2, [200])


def test_output_weight_on_request(text, tmp_path):
    for number, (arch, name) in enumerate({"llama": "output.weight", "gemma2": "token_embd.weight"}.items()):
        options = {"text": text, "ctx": CTX, "threads": 1, "process_output": True}
        report = gguflora.imatrix(builders.gguf_model(arch), tmp_path / f"{number}.gguf", **options)
        assert name in report.tensors


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_batches_end_before_the_output_matrix(arch):
    """From the second on, unless its inputs are watched; the sums are the same."""
    base, found = builders.gguf_model(arch), []
    output = "output.weight" if arch == "llama" else "token_embd.weight"
    for names in (["blk.0.attn_q.weight", "blk.1.ffn_down.weight"], ["blk.0.attn_q.weight", output]):
        shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(base).tensors}
        watch = InputWatch({name: (1, int(shapes[name][0])) for name in names})
        with LogitsModel(base, 1) as model:
            hook, stopped = GraphHook(proven_layout()), []
            hook.watch(watch, choose_isa(None))
            context = model.context(CTX, hook=hook)
            for window in windows()[:3]:
                context.clear()
                hook.begin_watching(np.asarray(window, np.int32))
                context.decode(window)
                stopped.append(hook.end().n_stopped)
        assert stopped == ([0, 0, 0] if output in names else [0, 1, 1])
        found.append(watch.found())
    assert found[0].keys() == {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    assert {inputs.counts[0] for each in found for inputs in each.values()} == {3 * CTX}
    np.testing.assert_array_equal(*(each["blk.0.attn_q.weight"].squares for each in found))


def test_the_file_is_read_as_llama_imatrix_writes_it(text, tmp_path):
    base, out = builders.gguf_model("llama", "wide"), tmp_path / "out.gguf"
    gguflora.imatrix(base, out, text=text, ctx=CTX, threads=1)
    reader = gguf.GGUFReader(out)
    fields = {name: reader.fields[name].contents() for name in reader.fields if name.startswith(("imatrix", "general"))}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == [str(text)]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (len(windows()), CTX)
    origin = read_origin(out)
    assert (origin.dataset, origin.chunks) == (str(text), len(windows()))
    assert llama_quantize(base, tmp_path / "theirs.gguf", "IQ3_M", imatrix=out, origin=(str(text), len(windows()))) == 0
    gguflora.quantize(base, tmp_path / "ours.gguf", "IQ3_M", imatrix=out)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_file_of_llama_imatrix_itself(tmp_path):
    """Made by ``llama-imatrix -m base.gguf -f demo.txt -o demo.imatrix.gguf -c 128 -t 1 -ctk f32 -ctv f32 -fa off``.

    The tool is that of llama-cpp-python 0.3.36's sources. With its own cache of halves its sums depend on its batches:
    ``-b 128`` alone changes them by 1e-3.
    """
    base, text, out = (tmp_path / name for name in ("base.gguf", "demo.txt", "out.gguf"))
    gguflora.quantize(DEMO / "base.gguf", base, "F32")
    text.write_text("".join(DEMO_LINE.format(number, number**2) for number in range(1, 40))[:2600])
    gguflora.imatrix(base, out, text=text, ctx=128, threads=1)
    recorded = Path(__file__).with_name("demo.imatrix.gguf")
    found, wanted = measured(out), measured(recorded)
    assert [(t.name, list(t.shape), t.tensor_type) for t in gguf.GGUFReader(out).tensors] == [
        (t.name, list(t.shape), t.tensor_type) for t in gguf.GGUFReader(recorded).tensors
    ]
    for name, (squares, counts) in wanted.items():
        np.testing.assert_array_equal(found[name][1], counts)
        np.testing.assert_allclose(found[name][0], squares, rtol=1e-4)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_the_built_in_text_is_enough_for_a_calibration(name):
    with LogitsModel(real_model(name), 1) as model:
        assert TOKENS <= len(model.tokenize(built_in_text().encode())) < 1.2 * TOKENS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ctx": 8}, UsageError, "expected at least 16 tokens"),
        ({"chunks": 0}, UsageError, "chunks is 0"),
        ({"text": b"short"}, FormatError, "tokens, expected at least 32; give a longer text"),
        ({"text": b""}, FormatError, "is empty"),
        ({"text": b"\xff" * 99}, FormatError, "is not UTF-8: byte 0 is 0xff"),
    ],
)
def test_bad_input(options, error, message, text, tmp_path):
    options = dict(options)
    if "text" in options:
        text.write_bytes(options.pop("text"))
    with pytest.raises(error, match=message):
        gguflora.imatrix(builders.gguf_model("llama"), tmp_path / "o.gguf", **{"text": text, "ctx": CTX, **options})
    assert not (tmp_path / "o.gguf").exists()


def test_infinite_inputs_are_named(text, tmp_path):
    broken = tmp_path / "broken.gguf"
    content = bytearray(builders.gguf_model("llama").read_bytes())
    tensor = next(t for t in gguf.GGUFReader(bytes_at(content, broken)).tensors if t.name == "blk.1.ffn_norm.weight")
    at = int(tensor.data_offset)
    content[at : at + 4] = np.float32("inf").tobytes()
    broken.write_bytes(content)
    with pytest.raises(HotSwapError, match=r"blk\.1\.ffn_(gate|up)\.weight.*its input is NaN or infinite"):
        gguflora.imatrix(broken, tmp_path / "o.gguf", text=text, ctx=CTX, threads=1)
    assert not (tmp_path / "o.gguf").exists()


def bytes_at(content, path):
    path.write_bytes(content)
    return path


def test_no_model(text, tmp_path):
    with pytest.raises(GgufError):
        gguflora.imatrix(text, tmp_path / "o.gguf", text=text)
    lora = tmp_path / "lora.gguf"
    gguflora.convert(builders.adapter("llama", builders.Adapter()), builders.gguf_model("llama"), lora)
    with pytest.raises(GgufloraError):
        gguflora.imatrix(lora, tmp_path / "o.gguf", text=text)
