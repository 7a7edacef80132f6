"""Types, ISA choice, the fused merge of rows, rows over threads."""

import subprocess
import sys
import threading

import gguf
import numpy as np
import pytest

from gguflora.errors import NativeError, NonFiniteError, QuantizationError
from gguflora.quants import kernels
from gguflora.quants._lib import current_isa, isa_names
from gguflora.quants.threads import run_rows
from gguflora.quants.types import TYPES, type_named
from support import weights
from support.oracles import libggml

ISAS = isa_names()


def merged(src, kind, a, b, isa, to=None):
    to = to or kind
    out = np.full((len(src), to.row_bytes(a.shape[1])), 0xAA, np.uint8)
    kernels.merge_rows(src, kind, out, to, kernels.Product(a, b), isa=isa)
    return out


def expected_merge(src, kind, a, b, to=None):
    """The same sums in numpy: float32, rank ascending, one multiplication and one addition at a time."""
    delta = np.zeros((len(b), a.shape[1]), np.float32)
    for k in range(a.shape[0]):
        delta = delta + b[:, k : k + 1] * a[k]
    return libggml.quantize(libggml.dequantize(src, kind.id, a.shape[1]) + delta, (to or kind).id)


def factors(n_rows, n_in, rank, seed=3):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, n_in)).astype(np.float32) * np.float32(0.05)
    return a, rng.standard_normal((n_rows, rank)).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_types_are_those_of_gguf(kind):
    if kind.name == "Q2_0" and kind.name not in gguf.GGMLQuantizationType.__members__:
        pytest.skip("this gguf does not list Q2_0, which llama.cpp reads (test_quants has its sizes from there)")
    qtype = gguf.GGMLQuantizationType(kind.id)
    assert qtype.name == kind.name
    assert gguf.GGML_QUANT_SIZES[qtype] == (kind.block_weights, kind.block_bytes)
    assert type_named(kind.name.lower()) is kind


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [t for t in TYPES.values() if t.quantizes], ids=lambda kind: kind.name)
def test_merge_equals_dequantize_add_quantize(kind, isa):
    for n_rows, n_in, rank in [(1, 256, 1), (9, 768, 3), (37, 2816, 16)]:
        src = libggml.quantize(weights.rows("model-like", n_rows, n_in), kind.id)
        a, b = factors(n_rows, n_in, rank)
        assert np.array_equal(merged(src, kind, a, b, isa), expected_merge(src, kind, a, b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [0, 1, 2, 7, 64, 512, 600])
def test_merge_of_any_rank(rank, isa):
    kind = type_named("Q8_0")
    src = libggml.quantize(weights.rows("model-like", 6, 1056), kind.id)
    a, b = factors(6, 1056, rank)
    assert np.array_equal(merged(src, kind, a, b, isa), expected_merge(src, kind, a, b))


@pytest.mark.parametrize("isa", ISAS)
def test_merge_of_floats_of_any_width(isa):
    """Rows that no vector divides."""
    kind = type_named("F32")
    for n_in in (1, 2, 15, 17, 63, 65, 130):
        src = weights.rows("normal", 5, n_in).view(np.uint8)
        a, b = factors(5, n_in, 4)
        assert np.array_equal(merged(src, kind, a, b, isa), expected_merge(src, kind, a, b))


@pytest.mark.parametrize("isa", ISAS)
def test_merge_to_another_type(isa):
    source, target = type_named("Q4_K"), type_named("Q6_K")
    src = libggml.quantize(weights.rows("model-like", 5, 1024), source.id)
    a, b = factors(5, 1024, 8)
    assert np.array_equal(merged(src, source, a, b, isa, target), expected_merge(src, source, a, b, target))


def test_merge_does_not_depend_on_grouping():
    kind = type_named("Q4_K")
    src = libggml.quantize(weights.rows("model-like", 61, 2816), kind.id)
    a, b = factors(61, 2816, 16)
    whole = merged(src, kind, a, b, None)
    parts = [merged(src[i : i + 5], kind, a, b[i : i + 5], None) for i in range(0, 61, 5)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_merge_in_place():
    kind = type_named("Q6_K")
    src = libggml.quantize(weights.rows("model-like", 90, 1024), kind.id)
    a, b = factors(90, 1024, 8)
    expected = merged(src, kind, a, b, None)
    kernels.merge_rows(src, kind, src, kind, kernels.Product(a, b))
    assert np.array_equal(src, expected)


def test_merge_refuses_bad_numbers_and_shapes():
    kind = type_named("Q8_0")
    src = libggml.quantize(weights.rows("model-like", 70, 2816), kind.id)
    a, b = factors(70, 2816, 2)
    b[41] = 0
    b[41, 1], a[1, 1000] = 1, np.inf
    with pytest.raises(NonFiniteError):
        merged(src, kind, a, b, None)
    a, b = factors(70, 2816, 2)
    b[:] = 0
    b[41, 1], a[1, 1000] = 1e30, 1e10
    with pytest.raises(NonFiniteError, match="row 41, column 1000") as caught:
        merged(src, kind, a, b, None)
    assert (caught.value.row, caught.value.column) == (41, 1000)
    for bad in [(src[1:], a, b), (src, a[:1], b), (src, a[:, :-32].copy(), b), (src, a.astype(np.float64), b)]:
        with pytest.raises(QuantizationError):
            merged(bad[0], kind, bad[1], bad[2], None)


def test_output_must_be_writable():
    out = np.zeros((1, 34), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|writable|writeable"):
        kernels.quantize_rows(np.zeros((1, 32), np.float32), type_named("Q8_0"), out)


def test_isa_is_forced_by_environment(monkeypatch):
    assert ISAS[0] == "scalar"
    for isa in ISAS:
        monkeypatch.setenv("GGUFLORA_ISA", isa)
        assert current_isa() == isa
    monkeypatch.delenv("GGUFLORA_ISA")
    assert current_isa() == ISAS[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX2", "neon" if "neon" not in ISAS else "avx2"])
def test_unknown_isa_names_the_valid_ones(monkeypatch, name):
    monkeypatch.setenv("GGUFLORA_ISA", name)
    with pytest.raises(NativeError, match=f"{name}.*scalar"):
        current_isa()
    with pytest.raises(NativeError, match=f"{name}.*scalar"):
        kernels.quantize_rows(np.zeros((1, 32), np.float32), type_named("Q8_0"), np.zeros((1, 34), np.uint8))


def test_import_with_unknown_isa_is_no_error(monkeypatch):
    monkeypatch.setenv("GGUFLORA_ISA", "sse9")
    subprocess.run([sys.executable, "-P", "-c", "import gguflora.quants.kernels"], check=True)


def test_run_rows_covers_every_row_once():
    for threads in (1, 2, 7, None):
        seen = np.zeros(103, int)

        def work(start, stop, seen=seen):
            seen[start:stop] += 1

        run_rows(103, 10, work, threads)
        assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_first_error_stops_the_rest(threads):
    started = []
    lock = threading.Lock()

    def work(start, stop):
        with lock:
            started.append(start)
        raise QuantizationError(f"row {start}")

    with pytest.raises(QuantizationError, match="row"):
        run_rows(100_000, 1, work, threads)
    assert len(started) < 50_000
