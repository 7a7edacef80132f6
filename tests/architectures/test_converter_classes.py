"""Every class of llama.cpp's converter, by its syntax tree: what it changes has a rule, is harmless, or is refused."""

import ast
from functools import cache

import pytest

from gguflora.architectures import KNOWN
from gguflora.architectures.name_maps import has_names
from gguflora.architectures.unruled import CHANGED, RENAMED
from support.oracles.llama_cpp import llama_cpp_dir

RENAMES = {
    "map_tensor_name", "format_tensor_name", "match_model_tensor_name", "find_hparam", "is_full_attention",
    "_attn_gate_types", "modify_tensors",
}  # fmt: skip
"""Methods that return a name or a number."""

CHANGES = {
    "permute", "reshape", "view", "split", "chunk", "transpose", "swapaxes", "cat", "squeeze", "unsqueeze", "exp", "t",
    "repeat_interleave", "flatten", "norm", "div_", "mul_", "add_", "flip", "roll", "repeat",
}  # fmt: skip
"""Functions and methods of tensors that change values or their order; `stack` only puts experts side by side."""

DATA = {"data_torch", "tensor", "data", "weights"}

HARMLESS = {
    "AfmoeModel": "calls ModelBase.modify_tensors, past LlamaModel's permutation",
    "ApertusModel": "sets undo_permute to False; what it changes besides becomes metadata",
    "CogVLMModel": "its q, k and v lie in one weight, whose name LlamaModel's permutation does not match",
    "Dots1Model": "cuts gate_up_proj into gate and up, which experts.py does for every architecture",
    "RND1Model": "as Dots1Model",
    "Ernie4_5Model": "splits qkv_proj and up_gate_proj of older checkpoints, names that no tensor of the base has",
    "Ernie4_5MoeModel": "calls ModelBase.modify_tensors, past Ernie4_5Model's splits",
    "PaddleOCRModel": "as Ernie4_5Model",
    "Gemma4Model": "its norm_shift is 0; rows that it cuts from the embedding are compared by shape",
    "Gemma4UnifiedModel": "as Gemma4Model",
    "Gemma4AssistantModel": "as Gemma4Model",
    "LFM2Model": "squeezes the convolution, whose columns stay in order",
    "LFM2ColBertModel": "as LFM2Model",
    "LFM25AudioTokenizer": "as LFM2Model",
    "LFM2MoeModel": "as LFM2Model",
    "MapleModel": "its _stack_experts is a stack",
    "NomicBertModel": "reshapes only the experts of nomic-bert-moe, which is refused",
    "Qwen3VLTextModel": "takes the rows of a classifier from the output weight, which unruled.py refuses for rerankers",
    "Qwen3ASRTextModel": "as Qwen3VLTextModel",
}
"""Classes that change tensors, of architectures without a rule: why it does not matter."""


@cache
def classes():
    found = {}
    for path in sorted((llama_cpp_dir() / "conversion").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
    return found


def ancestry(name):
    """The class and its parents in the converter, without the two that all have."""
    names = [name]
    for current in names:
        parents = [ast.unparse(parent).rpartition(".")[2] for parent in classes()[current].bases]
        names += [parent for parent in parents if parent in classes() and parent not in names]
    return names


def text_classes():
    parents = {name: ancestry(name) for name in classes()}
    return sorted(
        name
        for name, found in parents.items()
        if "TextModel" in found and name != "TextModel" and "MmprojModel" not in found
    )


def architectures_of(name):
    """The architectures that a class names in its body; else those of its nearest parent that names one."""
    for current in ancestry(name):
        if current in {"TextModel", "ModelBase"}:
            continue
        nodes = [node for node in ast.walk(classes()[current]) if isinstance(node, ast.Attribute)]
        found = {node.attr for node in nodes if ast.unparse(node).startswith("gguf.MODEL_ARCH.")}
        if found:
            return {llama_cpp_names()[member] for member in found}
    return set()


@cache
def llama_cpp_names():
    """Names of architectures by member of MODEL_ARCH, from the gguf-py beside the converter."""
    tree = ast.parse((llama_cpp_dir() / "gguf-py/gguf/constants.py").read_text(encoding="utf-8"))
    names = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODEL_ARCH_NAMES"
    )
    return {key.attr: value.value for key, value in zip(names.keys, names.values, strict=True)}


def changes_of(name):
    """What a class, or a parent, does to tensors in `modify_tensors`."""
    return {
        change
        for current in ancestry(name)
        if current not in {"TextModel", "ModelBase"}
        for method in classes()[current].body
        if isinstance(method, ast.FunctionDef) and method.name == "modify_tensors"
        for node in ast.walk(method)
        if (change := change_in(node))
    }


def change_in(node):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = ast.unparse(node.func.value)
        is_text = owner in {"name", "key_with_suffix"}
        if node.func.attr in CHANGES and not is_text:
            return node.func.attr
        return node.func.attr if owner == "self" and node.func.attr not in RENAMES | {"norm_shift"} else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("_"):
        return node.func.id
    if isinstance(node, ast.BinOp) and any(is_data(side) for side in (node.left, node.right)):
        return type(node.op).__name__
    if isinstance(node, ast.AugAssign) and is_data(node.target):
        return type(node.op).__name__
    return "slice" if isinstance(node, ast.Subscript) and is_data(node.value) else None


def is_data(node):
    return isinstance(node, ast.Name) and node.id in DATA


@pytest.mark.parametrize("name", text_classes())
def test_class_has_a_rule_is_harmless_or_is_refused(name):
    changes = changes_of(name)
    for architecture in architectures_of(name):
        if architecture in KNOWN or architecture in CHANGED:
            continue
        assert architecture in RENAMED, f"{name}: {architecture} is in no list"
        assert not changes or name in HARMLESS, f"{name} ({architecture}) has no rule, but does: {sorted(changes)}"


def test_reasons_belong_to_classes_that_change_something():
    assert set(HARMLESS) <= set(text_classes())
    idle = [name for name in HARMLESS if not changes_of(name)]
    assert not idle


def test_lists_do_not_overlap_and_name_architectures_of_the_converter():
    assert not KNOWN.keys() & (CHANGED.keys() | RENAMED)
    assert not CHANGED.keys() & RENAMED
    assert set(CHANGED) | RENAMED <= set(llama_cpp_names().values())
    assert all(has_names(architecture) for architecture in KNOWN)


def test_classes_are_found():
    """The walk itself: what it says about classes that everybody knows."""
    assert len(text_classes()) > 150
    assert architectures_of("ArceeModel") == {"arcee"}
    assert changes_of("ArceeModel") == {"permute"}
    assert changes_of("SeedOssModel") == set()
    assert {"Mult", "reshape"} <= changes_of("FalconH1Model")
    assert "normal_to_neox" not in changes_of("SeedOssModel")
