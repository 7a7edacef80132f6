"""The hook into llama.cpp's graph: layouts that cannot be proven are refused, and masks do what numpy says."""

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gguflora.quants._lib import ffi, lib
from gguflora.runtime import graph_hook
from gguflora.runtime.graph_hook import GraphFaultError, GraphHook, proven_layout
from gguflora.runtime.llama_internals import ggml_library
from gguflora.runtime.tensor_layout import Ggml, LayoutError, find_layout

LAYOUT = proven_layout()
WIDTH = 4


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml(ggml_library())


# The layout


class Library:
    """The ggml that is loaded, with some functions replaced: what another version might be."""

    def __init__(self, **replaced: Any) -> None:
        self.replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name not in self.replaced:
            return getattr(ggml_library(), name)
        if self.replaced[name] is None:
            raise AttributeError(name)
        return self.replaced[name]


def shifted(name: str, by: int) -> Any:
    real = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
        ctypes.cast(getattr(ggml_library(), name), ctypes.c_void_p).value
    )
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda tensor: (real(tensor) or 0) + by)


def saying(result: bytes) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(lambda _: result)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"ggml_get_data": shifted("ggml_get_data", 8)}, "'data' of a ggml tensor was found at 0 places"),
        ({"ggml_get_name": shifted("ggml_get_name", 1 << 20)}, "'name' of a ggml tensor was not found"),
        ({"ggml_op_desc": saying(b"ADD")}, "'op' of a ggml tensor was found at 0 places"),
        ({"ggml_type_name": saying(b"f32")}, "does not number its types as GGUF does: 1 is not f16"),
        ({"ggml_type_size": ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int)(lambda _: 3)}, "'nb'"),
        ({"ggml_set_rows": None}, "has no function ggml_set_rows"),
        ({"ggml_init": ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(lambda _: None)}, "could not be given memory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_layout_is_refused(replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        find_layout(Ggml(Library(**replaced)))


@pytest.mark.parametrize("field", ["ne", "nb", "src", "name", "data", "type"])
def test_a_wrong_offset_is_noticed_by_the_hook(ggml: Ggml, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    wrong = dataclasses.replace(LAYOUT, **{field: getattr(LAYOUT, field) + (4 if field == "type" else 8)})
    monkeypatch.setattr(GraphHook, "found", lambda hook: [])  # a wrong src is no address: do not follow it
    with pytest.raises(LayoutError, match="misreads"):
        graph_hook._prove_in_c(ggml, wrong if field != "src" else LAYOUT)


def test_a_hook_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph_hook.unavailable() is None
    monkeypatch.setattr(graph_hook, "proven_layout", lambda: find_layout(Ggml(Library(ggml_mul_mat=None))))
    assert graph_hook.unavailable() == "this ggml has no function ggml_mul_mat"


# The callback, against numpy


class Graph:
    """Nodes made by ggml, whose numbers a test fills in and the hook masks."""

    def __init__(self, ggml: Ggml, context: int) -> None:
        self.ggml, self.context = ggml, context
        self.hook = GraphHook(LAYOUT)

    def tensor(self, kind: str, *ne: int, name: str = "") -> int:
        shape = (ctypes.c_int64 * len(ne))(*ne)
        pointer = self.ggml.ggml_new_tensor(self.context, getattr(LAYOUT, kind), len(ne), shape)
        self.ggml.ggml_set_name(pointer, name.encode())
        return int(pointer)

    def numbers(self, tensor: int, kind: Any, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return np.ctypeslib.as_array((kind * count).from_address(self.ggml.ggml_get_data(tensor))).reshape(shape)

    def lookup(self, tokens: np.ndarray) -> int:
        """The node that looks the tokens' embeddings up."""
        ids = self.tensor("i32", len(tokens))
        self.numbers(ids, ctypes.c_int32, len(tokens))[:] = tokens
        table = self.tensor("f32", 4, 500, name="token_embd.weight")
        return int(self.ggml.ggml_get_rows(self.context, table, ids))

    def ask(self, node: int) -> bool:
        return bool(lib.gfl_hook_eval(ffi.cast("void *", node), True, self.hook.pointer))

    def show(self, node: int) -> bool:
        return bool(lib.gfl_hook_eval(ffi.cast("void *", node), False, self.hook.pointer))


@pytest.fixture
def graph(ggml: Ggml, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    with ggml.memory() as context:
        made = Graph(ggml, context)
        yield made
        made.hook.free()


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(st.data())
def test_masks_are_those_of_numpy(ggml: Ggml, data: st.DataObject) -> None:
    """Odd numbers of tokens, outputs, bays and ubatches; experts; tensors that an adapter does not have; NaN."""
    n_bays, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    n_tokens, rank = sum(sizes), n_bays * width
    tokens = rng.integers(0, 500, n_tokens).astype(np.int32)
    outputs = (rng.random(n_tokens) < 0.5).astype(np.int8)
    weights = (rng.normal(size=(n_tokens, n_bays)) * (rng.random((n_tokens, n_bays)) < 0.6)).astype(np.float32)
    factors = (rng.normal(size=(2, n_bays)) * (rng.random((2, n_bays)) < 0.8)).astype(np.float32)
    with ggml.memory() as context:
        graph = Graph(ggml, context)
        plain = graph.tensor("f16", 8, rank, name="blk.0.attn_q.weight.lora_a")
        experts = graph.tensor("f32", 8, rank, 3, name="blk.0.ffn_up_exps.weight.lora_a")
        graph.hook.set_stack([plain, experts], width, factors)
        graph.hook.begin(tokens, outputs, weights)
        expected_diverged = np.zeros(n_tokens, bool)
        n_masked = 0
        for start, stop in itertools.pairwise([0, *np.cumsum(sizes)]):
            assert not graph.ask(graph.lookup(tokens[start:stop]))
            here = np.arange(start, stop)
            wanted = here[outputs[start:stop] != 0]
            for kind, owners in itertools.product(("plain", "experts"), (here, wanted)):
                if not len(owners):
                    continue
                used = 2 if kind == "experts" else 1
                node = _product(graph, kind, plain if kind == "plain" else experts, len(owners), used)
                assert graph.ask(node)
                values = graph.numbers(node, ctypes.c_float, len(owners), used, n_bays, width)
                values[:] = rng.normal(size=values.shape)
                values[rng.random(values.shape) < 0.02] = np.nan
                per_token = weights[owners] * factors[int(kind == "experts")]
                correct = values * per_token[:, None, :, None]
                correct[np.broadcast_to((per_token == 0)[:, None, :, None], correct.shape)] = 0
                expected_diverged[owners] |= ~np.isfinite(correct).all(axis=(1, 2, 3))
                assert graph.show(node)
                np.testing.assert_array_equal(values, correct)
                n_masked += 1
        report = graph.hook.end()
        assert (report.n_ubatches, report.n_masked) == (len(sizes), n_masked)
        np.testing.assert_array_equal(report.diverged, expected_diverged)
        graph.hook.free()


def _product(graph: Graph, kind: str, factor: int, n_tokens: int, used: int) -> int:
    ggml, context = graph.ggml, graph.context
    if kind == "plain":
        return int(ggml.ggml_mul_mat(context, factor, graph.tensor("f32", 8, n_tokens)))
    x, ids = graph.tensor("f32", 8, 1, n_tokens), graph.tensor("i32", used, n_tokens)
    return int(ggml.ggml_mul_mat_id(context, factor, x, ids))


def test_faults_are_reported_and_nothing_is_let_through(graph: Graph) -> None:
    tokens, outputs = np.arange(6, dtype=np.int32), np.zeros(6, np.int8)
    stacked = graph.tensor("f16", 8, 2 * WIDTH, name="x.lora_a")
    foreign = graph.tensor("f16", 8, 2 * WIDTH, name="y.lora_a")
    odd = graph.tensor("f16", 8, 3 * WIDTH, name="z.lora_a")
    graph.hook.set_stack([stacked, odd], WIDTH, np.ones((2, 2), np.float32))

    def faults(message: str, factor: int, n_columns: int, found: np.ndarray | None = tokens) -> None:
        graph.hook.begin(tokens, outputs, np.ones((6, 2), np.float32))
        if found is not None:
            graph.ask(graph.lookup(found))
        node = _product(graph, "plain", factor, n_columns, 1)
        assert graph.ask(node)
        size = n_columns * (3 if factor == odd else 2) * WIDTH
        values = graph.numbers(node, ctypes.c_float, size)
        values[:] = np.nan
        assert graph.show(node)
        assert not values.any()
        with pytest.raises(GraphFaultError, match=message):
            graph.hook.end()

    faults("not of the stack", foreign, 6)
    faults("another shape", odd, 6)
    faults("neither all tokens nor those with outputs", stacked, 5)
    faults("neither all tokens nor those with outputs", stacked, 6, found=None)
    faults("not those of the batch", stacked, 6, found=tokens[::-1])
    faults("not those of the batch", stacked, 7, found=np.arange(7))


def test_cells_are_cleaned(graph: Graph) -> None:
    """Of keys by token, of values transposed, in both types; the others of the batch keep theirs."""
    tokens, outputs = np.arange(3, dtype=np.int32), np.ones(3, np.int8)
    graph.hook.begin(tokens, outputs, None)
    assert not graph.ask(graph.lookup(tokens))
    for kind, number, bad in [("f32", ctypes.c_float, np.inf), ("f16", ctypes.c_uint16, 1e5)]:
        for transposed in (False, True):
            width = 4
            source = graph.tensor("f32", *((1, 3 * width) if transposed else (width, 3)))
            cells = graph.tensor(kind, *((1, 40) if transposed else (width, 10)))
            ids = graph.tensor("i64", 3 * width if transposed else 3)
            places = np.arange(3 * width) * 3 if transposed else np.array([7, 2, 5])
            graph.numbers(ids, ctypes.c_int64, len(places))[:] = places
            values = graph.numbers(source, ctypes.c_float, 3, width)
            values[:] = 1
            values[1, 2] = bad
            held = graph.numbers(cells, number, 40)
            held[:] = 9
            node = graph.ggml.ggml_set_rows(graph.context, cells, source, ids)
            assert graph.ask(node)
            assert graph.show(node)
            gone = [places[1 * width + 2]] if transposed else range(2 * width, 3 * width)
            assert set(np.flatnonzero(held == 0)) == set(gone)
    report = graph.hook.end()
    assert report.n_cleaned == 4
    assert report.diverged.tolist() == [False, True, False]


def test_a_hook_at_rest_lets_the_graph_be(graph: Graph) -> None:
    node = _product(graph, "plain", graph.tensor("f16", 8, 4, name="x.lora_a"), 3, 1)
    assert not graph.ask(node)
    assert graph.show(node)
    assert not lib.gfl_hook_eval(ffi.cast("void *", node), True, ffi.NULL)


@pytest.mark.parametrize(("kind", "number"), [(np.float16, 2), (np.float32, 4)])
def test_all_finite(kind: Any, number: int) -> None:
    values = np.random.default_rng(0).normal(size=1001).astype(kind)
    assert graph_hook.all_finite(values.ctypes.data, len(values), number)
    for bad in (np.nan, np.inf, -np.inf):
        values[-1] = bad
        assert not graph_hook.all_finite(values.ctypes.data, len(values), number)
        assert graph_hook.all_finite(values.ctypes.data, len(values) - 1, number)
