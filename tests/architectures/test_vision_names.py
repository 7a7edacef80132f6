"""Names of tensors of mmproj files, as a broken or strange file may hold them."""

from pathlib import Path

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.vision import vision_slices


def test_deepstack_layers_without_a_number_are_passed_over():
    names = ("v.deepstack.x.norm.weight", "v.deepstack.", "v.deepstack.9.norm.weight", "v.deepstack.16.norm.weight")
    shapes = dict.fromkeys(names, (4,))
    base = BaseModel(Path("mmproj.gguf"), "clip", shapes, 24, (16,) * 24, (16,) * 24, projector="qwen3vl_merger")
    for index, layer in enumerate((9, 16)):
        weight = f"visual.deepstack_merger_list.{index}.norm.weight"
        assert [found.tensor for found in vision_slices(base, weight, weight)] == [f"v.deepstack.{layer}.norm.weight"]
