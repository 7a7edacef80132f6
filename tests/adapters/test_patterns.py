"""Patterns of strangers: the ones that match as PEFT finds them, and a limit of time for those that would never end."""

import json
import random
import re
import threading
import time

import pytest
from peft.utils.other import get_pattern_key

import gguflora
from gguflora.adapters.peft import patterns
from gguflora.adapters.peft.config import read_config
from gguflora.adapters.peft.patterns import Matcher, ModulePatterns
from gguflora.adapters.peft.target_modules import is_target
from gguflora.errors import AdapterError
from gguflora.system.regexes import REGEXES
from support import fuzzing

ENDLESS = "(([a-z_.0-9]+)+)+!"
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj", "q_proj", "lm_head", "a_b.c", "a.b.c"]
NAMES = [
    "q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "10.mlp.down_proj", "a.b.c",
    "b.c", "a.c", "c", "self.attn.q_proj", "......", ".", "proj", "^lm_head", r"layers\.\d+\.mlp.*", "(q|down)_proj",
    r".*\.(0|1)\..*q_proj", "lm_head$", "[a-z]_proj", "_proj",
]  # fmt: skip


def write(folder, **fields):
    fuzzing.write_lora_directory(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_the_same_patterns_match_as_in_peft(module):
    expected = [name for name in NAMES if re.match(rf"(.*\.)?({name})$", module)]
    found = [name for name, _ in ModulePatterns(dict.fromkeys(NAMES, 1)).matching(module, Matcher())]
    assert found == expected
    first = get_pattern_key(NAMES, module)
    assert (found or [module])[0] == first


def test_random_plain_names():
    dice = random.Random(0)
    names = {"".join(dice.choices("ab._", k=dice.randrange(1, 6))): 1 for _ in range(400)}
    index, matcher = ModulePatterns(names), Matcher()
    for _ in range(200):
        module = "".join(dice.choices("ab._", k=dice.randrange(1, 12)))
        expected = [name for name in names if re.match(rf"(.*\.)?({name})$", module)]
        assert [name for name, _ in index.matching(module, matcher)] == expected, module


def test_as_many_patterns_as_experts_are_quick():
    names = {f"model.layers.{layer}.mlp.experts.{i}.up_proj": 8 for layer in range(60) for i in range(256)}
    index, begun = ModulePatterns(names), time.process_time()
    for module in list(names)[:2000]:
        assert [name for name, _ in index.matching(module, Matcher())] == [module]
    assert time.process_time() - begun < 20  # compiled one by one they took hours


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_an_endless_expression_is_an_error(field, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    monkeypatch.setattr("gguflora.adapters.peft.config.SECONDS", 0.5)
    write(tmp_path, **{field: {ENDLESS: 4}})
    ticks: list[float] = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.02):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        with pytest.raises(AdapterError, match=rf"{field}: its regular expressions take longer than 0.5 s"):
            gguflora.convert(tmp_path, fuzzing.base(), tmp_path / "out.gguf")
    finally:
        stop.set()
        thread.join()
    assert len(ticks) >= 5, "other threads went on"
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_endless_targets(field, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}
    value = [ENDLESS] if field == "modules_to_save" else ENDLESS
    config = read_config(write(tmp_path, **{**fields, field: value}))
    with pytest.raises(AdapterError, match=rf"{field}: its regular expressions take longer"):
        is_target(config, "model.layers.0.self_attn.some_long_name.q_proj")


def test_after_an_endless_expression_others_are_matched():
    with pytest.raises(TimeoutError):
        REGEXES.match(ENDLESS, "a" * 60, 0.3)
    assert REGEXES.match("(a+)(b)?", "aac", 30) == ["aa", "aa", None]
    assert REGEXES.match("a+$", "b", 30) is None
    with pytest.raises(re.error, match="missing"):
        REGEXES.match("(a+", "b", 30)


@pytest.mark.parametrize("fields", [{"layers_pattern": "(layers)"}, {"target_modules": "*("}])
def test_patterns_that_are_none(fields, tmp_path):
    config = read_config(write(tmp_path, **{"target_modules": ["q_proj"], "layers_to_transform": [1], **fields}))
    with pytest.raises(AdapterError, match=next(iter(fields))):
        is_target(config, "model.layers.0.self_attn.q_proj")


def test_a_configuration_has_a_largest_size(tmp_path):
    write(tmp_path, x=[0] * (3 << 20))
    with pytest.raises(AdapterError, match="8388608 bytes"):
        read_config(tmp_path)
