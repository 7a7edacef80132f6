"""`merge_part` and `assemble`: the bytes and the report of `gguflora.merge`, whatever is merged into whatever."""

import dataclasses

import numpy as np
import peft
import pytest

import gguflora
from gguflora.errors import FormatError, OutputError
from gguflora.files.gguf import part_paths
from gguflora.merging.parts import assemble, merge_part, shares
from gguflora.merging.prepare import MergeOptions, prepared_merge
from support import builders, zoo
from support.adapters import TIED, resized
from support.builders import Adapter
from support.imatrix import write_imatrix
from support.oracles.gguf_files import read_tensors
from support.shards import WHOLE, split

ONE = Adapter(seed=3)
TWO = Adapter(targets=("q_proj", "down_proj"), rank=3, seed=8)


def lora(arch="llama", spec=ONE, size="wide"):
    return builders.adapter(arch, spec, size)


def quantized(tmp_path):
    return builders.gguf_model(*WHOLE), lora(), {"seed": 7}


def several(tmp_path):
    adapters = [(lora(), 0.5), lora(spec=TWO)]
    return builders.gguf_model(*WHOLE), adapters, {"rounding": "nearest", "type": {"*ffn_down*": "Q8_0"}}


def precise(tmp_path):
    base = builders.gguf_model(*WHOLE)
    random = np.random.default_rng(5)
    sums = {name: random.chisquare(1, (1, values.shape[-1])) for name, values in read_tensors(base).items()}
    write_imatrix(tmp_path / "imatrix", {name: (values.astype(np.float32), [1]) for name, values in sums.items()})
    options = {"base_f16": builders.gguf_model("llama", "wide", "F16"), "imatrix": tmp_path / "imatrix"}
    return base, lora(), options


def split_base(tmp_path):
    (tmp_path / "base").mkdir()
    return split(builders.gguf_model(*WHOLE), tmp_path / "base" / "llama.gguf", 3)[1], lora(), {}


def experts(tmp_path):
    zoo.peft_model(
        "qwen3moe",
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        rank_pattern={r"layers.0.*experts\.down_proj": 5},
        alpha_pattern={r"experts\.gate_up_proj": 9},
    ).save_pretrained(tmp_path / "adapter")
    return zoo.gguf_model("qwen3moe"), tmp_path / "adapter", {}


def untied(tmp_path):
    return builders.gguf_model("gemma3"), builders.trained_adapter("gemma3", TIED["dora_both"]), {}


def new_tokens(tmp_path):
    return builders.gguf_model("qwen2"), resized("qwen2")[0], {"outtype": "f16"}


def whole_weights(tmp_path):
    """A formula of a Hugging Face weight whose rows lie in two tensors."""
    zoo.adapted("deepseek2", peft.OSFConfig, {"effective_rank": 0.5}, 0.1, tmp_path / "adapter")
    return zoo.gguf_model("deepseek2"), tmp_path / "adapter", {}


CASES = [quantized, several, precise, split_base, experts, untied, new_tokens, whole_weights]


def files(path, base):
    with gguflora.files.gguf.GgufFile(base) as file:
        return [one.read_bytes() for one in part_paths(path, len(file.paths))]


def parts_of(base, adapters, folder, count, **options):
    paths = [folder / f"{number}.part" for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        merge_part(base, adapters, path, number=number, count=count, threads=number, **options)
    return paths


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bytes_and_report_of_the_merge_in_one_go(case, tmp_path):
    base, adapters, options = case(tmp_path)
    expected = gguflora.merge(base, adapters, tmp_path / "plain.gguf", **options)
    parts = parts_of(base, adapters, tmp_path, 3, **options)
    report = assemble(base, adapters, tmp_path / "out.gguf", parts[::-1], **options)
    assert files(tmp_path / "out.gguf", base) == files(tmp_path / "plain.gguf", base)
    for field in dataclasses.fields(report):
        if field.name not in {"output", "seconds", "threads"}:
            assert getattr(report, field.name) == getattr(expected, field.name), field.name
    assert report.total.weights > 0


def test_shares_are_alike_and_keep_together_what_one_formula_changes(tmp_path):
    base, adapters, _ = quantized(tmp_path)
    with prepared_merge(base, adapters, MergeOptions()) as merging:
        targets = merging.plan.targets
        for count in (1, 3, 100):
            divided = shares(targets, count)
            assert len(divided) == count
            assert sorted(target.name for share in divided for target in share) == sorted(t.name for t in targets)
        sizes = [sum(np.prod(target.shape) for target in share) for share in shares(targets, 3)]
        assert max(sizes) < 1.3 * min(sizes)
    base, adapters, _ = whole_weights(tmp_path)
    with prepared_merge(base, adapters, MergeOptions()) as merging:
        share_of = {t.name: number for number, share in enumerate(shares(merging.plan.targets, 9)) for t in share}
    for layer in range(2):
        assert share_of[f"blk.{layer}.attn_k_b.weight"] == share_of[f"blk.{layer}.attn_v_b.weight"]
    assert len(set(share_of.values())) == 9


def test_more_parts_than_tensors(tmp_path):
    base, adapter = builders.gguf_model("llama"), lora(spec=Adapter(targets=("q_proj",)), size="small")
    parts = parts_of(base, adapter, tmp_path, 4)
    gguflora.merge(base, adapter, tmp_path / "plain.gguf")
    assemble(base, adapter, tmp_path / "out.gguf", parts)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_parts_that_are_not_those_of_the_merge(tmp_path):
    base, adapters, options = quantized(tmp_path)
    parts, out = parts_of(base, adapters, tmp_path, 2, **options), tmp_path / "out.gguf"

    def refused(match, base=base, adapters=adapters, given=parts, **more):
        with pytest.raises(FormatError, match=match):
            assemble(base, adapters, out, given, **{**options, **more})
        assert not out.exists()

    refused("no part of the merge holds", given=parts[:1])
    refused("1.part: holds .*, as .*1.part does", given=[parts[0], *parts])
    refused("none: does not exist", given=[*parts, tmp_path / "none"])
    refused("another merge", seed=8)
    refused("another merge", base_f16=builders.gguf_model("llama", "wide", "F16"))
    refused("another merge", adapters=[(adapters, 0.5)])
    refused("another merge", base=builders.gguf_model("llama", "wide", "Q8_0"))
    content = parts[1].read_bytes()
    for damaged in (content[:-1], content[:100], b"", content[:-16] + b"\xff" * 8 + content[-8:]):
        parts[1].write_bytes(damaged)
        refused("2.part: (is not a part of a merge|cannot be read)")
    parts[1].write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    refused("2.part: is damaged: 'blk")
    with pytest.raises(OutputError, match="part 3 of 2"):
        merge_part(base, adapters, tmp_path / "x", number=3, count=2)
    with pytest.raises(OutputError, match="already exists"):
        merge_part(base, adapters, parts[0], number=1, count=2)
