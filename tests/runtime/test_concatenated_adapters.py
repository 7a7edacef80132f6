"""Many adapters fused into one: the same logits as side by side, and no abort where llama.cpp has no room for them."""

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

import gguflora
from gguflora.engine import Engine, Request, Sampling
from gguflora.errors import HotSwapError
from gguflora.lora.concatenate import concatenate
from gguflora.runtime import attached
from gguflora.runtime import concatenated_adapters as fuse_module
from gguflora.runtime.bindings import free_lora, load_lora, set_loras
from gguflora.runtime.concatenated_adapters import FIXED_GRAPH, SEPARATE
from support import builders, hotswap, zoo
from support.hotswap import PROMPT, A, B, C, expected, gguf_lora, kill_python, logits, open_llama
from support.oracles.gguf_files import lora_changes, read_tensors
from support.oracles.llama_cpp import llama_cpp_dir, quiet_llama_cpp

MANY = 64
SCALES = {"a": 0.5, "b": -0.75, "c": 1.0}


def random_loras(folder: Path, count: int, rank: int = 2, dtype: type = np.float32) -> list[Path]:
    """Small adapters of all linear layers and the token embedding of the llama of `builders`."""
    shapes = {name: array.shape for name, array in read_tensors(builders.gguf_model("llama")).items()}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name != "output.weight"}
    paths = []
    for number in range(count):
        chance = np.random.default_rng(number)
        tensors = {}
        for name, (n_out, n_in) in matrices.items():
            flipped = name == "token_embd.weight"
            a, b = ((n_out, rank), (n_in, rank)) if flipped else ((rank, n_in), (n_out, rank))
            tensors[f"{name}.lora_a"] = (0.1 * chance.standard_normal(a)).astype(dtype)
            tensors[f"{name}.lora_b"] = (0.1 * chance.standard_normal(b)).astype(dtype)
        alpha = np.float32(number % 3 * 2)  # 0 means: no alpha / rank
        paths.append(hotswap.write_lora(folder / f"{number}.gguf", tensors, adapter__lora__alpha=alpha))
    return paths


def side_by_side(llm, paths, scales):
    """Logits with each adapter applied by llama.cpp itself."""
    loras = [(load_lora(llm.model, path), scale) for path, scale in zip(paths, scales, strict=True)]
    set_loras(llm.ctx, loras)
    found = logits(llm)
    set_loras(llm.ctx, [])
    for pointer, _ in loras:
        free_lora(pointer)
    return found


def fused_logits(llm, paths, scales, out):
    concatenate(list(zip(paths, scales, strict=True)), out)
    return side_by_side(llm, [out], [1.0])


def test_logits_are_those_of_the_sum_by_peft(tmp_path):
    with closing(open_llama()) as llm:
        found = fused_logits(llm, [gguf_lora(spec) for spec in (A, B, C)], SCALES.values(), tmp_path / "f.gguf")
    wanted = expected(*zip((A, B, C), SCALES.values(), strict=True))
    np.testing.assert_allclose(found, wanted, atol=hotswap.TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_logits_are_those_of_side_by_side(tmp_path, count):
    """All linear layers, the flipped token embedding, files with and without alpha."""
    scales = np.linspace(-0.5, 0.5, count) + 0.1
    paths = random_loras(tmp_path, count)
    with closing(open_llama()) as llm:
        base, wanted = logits(llm), side_by_side(llm, paths, scales)
        found = fused_logits(llm, paths, scales, tmp_path / "fused.gguf")
    assert np.abs(wanted - base).max() > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_a_fused_file_is_the_exact_sum(tmp_path):
    paths, scales = random_loras(tmp_path, 5), (0.5, -1, 2, 0.25, 1)
    concatenate(list(zip(paths, scales, strict=True)), tmp_path / "fused.gguf")
    parts, total = [lora_changes(path) for path in paths], lora_changes(tmp_path / "fused.gguf")
    for name, change in total.items():
        wanted = sum(scale * part[name] for scale, part in zip(scales, parts, strict=True))
        np.testing.assert_allclose(change, wanted, atol=1e-7)


def test_halves_stay_halves_where_that_is_exact(tmp_path):
    paths = random_loras(tmp_path, 2, dtype=np.float16)
    for scales, kinds in (((2, -4), {"F16"}), ((0.3, 0.7), {"F16", "F32"})):
        concatenate(list(zip(paths, scales, strict=True)), tmp_path / "fused.gguf")
        found = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "fused.gguf").tensors}
        assert found == kinds


def test_stacks_of_experts(tmp_path):
    folder = zoo.checkpoint("qwen3moe").parent / "fused-experts"
    model = zoo.peft_model("qwen3moe", target_modules=[], target_parameters=["experts.gate_up_proj"])
    model.save_pretrained(folder)
    base, lora = zoo.gguf_model("qwen3moe"), tmp_path / "lora.gguf"
    gguflora.convert(folder, base, lora)
    with closing(open_llama_of(base)) as llm:
        wanted = side_by_side(llm, [lora, lora], [0.5, 1.5])
        found = fused_logits(llm, [lora, lora], [0.5, 1.5], tmp_path / "fused.gguf")
        assert np.abs(wanted - logits(llm)).max() > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def open_llama_of(base: Path, **options):
    import llama_cpp

    settings = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "logits_all": True, "verbose": False}
    with quiet_llama_cpp():
        return llama_cpp.Llama(str(base), **settings | options, type_k=0, type_v=0)


def test_64_at_once(tmp_path):
    paths = random_loras(tmp_path, MANY)
    scales = {f"n{number}": 0.02 * (number % 7 - 3) for number in range(MANY)}
    on = [(path, scale) for path, scale in zip(paths, scales.values(), strict=True) if scale]
    with closing(open_llama()) as llm:
        base, wanted = logits(llm), side_by_side(llm, *zip(*on, strict=True))
        with attached.attach(llm) as adapters:
            for name, path in zip(scales, paths, strict=True):
                adapters.load(name, path)
            adapters.apply(scales)
            np.testing.assert_allclose(logits(llm), wanted, atol=1e-4, rtol=0)
            assert len(adapters._set._concatenated._made) == 1
            adapters.apply(n0=1.0)
            one = logits(llm)
            adapters.apply(scales)
            np.testing.assert_allclose(logits(llm), wanted, atol=1e-4, rtol=0)
            adapters.unload("n0")
            adapters.apply()
            np.testing.assert_array_equal(logits(llm), base)
            assert np.abs(one - base).max() > 0.01


# -- architectures without room in the graph -------------------------------------------------------


@pytest.fixture(scope="module")
def qwen35(tmp_path_factory):
    """A base for whose adapters llama.cpp makes no room, and an adapter."""
    folder = tmp_path_factory.mktemp("qwen35")
    zoo.peft_model("qwen35").save_pretrained(folder / "peft")
    gguflora.convert(folder / "peft", zoo.gguf_model("qwen35"), folder / "lora.gguf")
    return zoo.gguf_model("qwen35"), folder / "lora.gguf", folder / "peft"


def test_llama_cpp_aborts_on_16_adapters(qwen35):
    """Why they are fused. When this fails, llama.cpp has learnt to make room."""
    code = """
import sys, llama_cpp
from pathlib import Path
from gguflora.runtime.bindings import load_lora, set_loras
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_batch=8, n_ubatch=8, n_threads=1, verbose=False)
set_loras(llm.ctx, [(load_lora(llm.model, Path(sys.argv[2])), 0.01) for _ in range(16)])
llm.eval([1, 2, 3])
"""
    kill_python(code, *qwen35[:2])


def test_64_at_once_where_there_is_no_room(qwen35):
    """64 times an adapter at 1/64 is the adapter: a GGUF file as well as a PEFT directory, in attach and the engine."""
    base, lora, folder = qwen35
    with closing(open_llama_of(base, n_batch=8, n_ubatch=8)) as llm, attached.attach(llm) as adapters:
        for number in range(MANY):
            adapters.load(f"n{number}", folder if number == 5 else lora)
        adapters.apply(n0=1.0)
        wanted = logits(llm)
        adapters.apply({f"n{number}": 1 / MANY for number in range(MANY)})
        np.testing.assert_allclose(logits(llm), wanted, atol=1e-4, rtol=0)
    with Engine(base, n_ctx=256, n_batch=8, threads=1, kv_type="F32") as engine:
        for number in range(MANY):
            engine.load(lora, f"n{number}")
        names = "+".join(f"n{number}@{1 / MANY}" for number in range(MANY))
        for name in ("n0", names, "base", names):
            request = Request(list(PROMPT), engine.adapter_set(name), max_tokens=1, sampling=Sampling(temperature=0))
            (piece, *_) = list(engine.submit(request))
            assert name == "base" or piece.tokens[0] == wanted[-1].argmax()


def test_a_file_that_has_changed_since(qwen35, tmp_path):
    base, lora, _ = qwen35
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(lora.read_bytes())
    with closing(open_llama_of(base)) as llm, attached.attach(llm) as adapters:
        adapters.load("a", copy)
        adapters.load("b", lora)
        adapters.apply(a=1.0)
        before = logits(llm)
        copy.write_bytes(copy.read_bytes()[:-1] + b"!")
        with pytest.raises(HotSwapError, match="has changed since it was loaded"):
            adapters.apply(a=1.0, b=1.0)
        assert adapters.active == {"a": 1.0}
        np.testing.assert_array_equal(logits(llm), before)


def test_elsewhere_it_is_applied_side_by_side(tmp_path):
    paths = random_loras(tmp_path, SEPARATE + 1)
    with closing(open_llama()) as llm, attached.attach(llm) as adapters:
        for number, path in enumerate(paths):
            adapters.load(f"n{number}", path)
            path.unlink()
        adapters.apply(dict.fromkeys(adapters.loaded, 0.1))
        assert not adapters._set._concatenated._made
        logits(llm)


def test_fused_adapters_are_freed(tmp_path, monkeypatch):
    paths, freed = random_loras(tmp_path, SEPARATE + 1), []
    monkeypatch.setattr(fuse_module, "free_lora", lambda pointer: (freed.append(pointer), free_lora(pointer)))
    with closing(open_llama()) as llm, attached.attach(llm) as adapters:
        for number, path in enumerate(paths):
            adapters.load(f"n{number}", path)
        for step in range(7):
            adapters.apply(dict.fromkeys(adapters.loaded, 0.1 * (step + 1)))
            logits(llm)
        assert len(adapters._set._concatenated._made) == 4
        assert len(freed) == 3
        adapters.unload("n0")
        assert len(freed) == 7
    open_files = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert not [name for name in open_files if "gguflora-concatenated" in name]


def test_fixed_graphs_are_those_of_llama_cpp():
    """The architectures named where llama.cpp counts the nodes of its graph without those of adapters."""
    source = (llama_cpp_dir() / "src/llama-context.cpp").read_text()
    names = (llama_cpp_dir() / "src/llama-arch.cpp").read_text()
    body = source.split("uint32_t llama_context::graph_max_nodes")[1].split("lora->get_n_nodes")[0]
    import re

    arches = {re.search(rf'{{ {arch},\s+"([^"]+)"', names)[1] for arch in re.findall(r"LLM_ARCH_\w+", body)}
    assert arches == FIXED_GRAPH
