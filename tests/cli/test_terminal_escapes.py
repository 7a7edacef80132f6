"""No command prints control characters of names and texts that come from strangers."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy

from support import builders
from support.builders import Adapter
from support.cli import run

EVIL = "red]a\x1b]0;owned\x07\x1b[2J\x9b31m[bold]["
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters, a base, and what commands need besides, in a folder of an evil name, with evil texts in them."""
    folder = tmp_path_factory.mktemp("strangers") / "x[" / EVIL  # in the path there is what looks like [/red]
    folder.mkdir(parents=True)
    base = folder / f"{EVIL}.gguf"
    shutil.copy(builders.gguf_model("llama", "wide", "Q4_0"), base)
    for number, name in enumerate(("one", "two")):
        place = folder / f"{EVIL}{name}"
        shutil.copytree(builders.adapter("llama", Adapter(seed=number), "wide"), place)
        builders.edit_config(place, base_model_name_or_path=EVIL, task_type=EVIL, revision=EVIL)
    (folder / "text").write_text(EVIL * 50)
    return folder


def adapter(folder, name="one"):
    return folder / f"{EVIL}{name}"


def changed(folder, tmp_path, **fields):
    """A copy of an adapter with other fields."""
    place = tmp_path / f"{EVIL}changed"
    shutil.copytree(adapter(folder), place)
    builders.edit_config(place, **fields)
    return place


def renamed(folder, tmp_path):
    """A copy of an adapter with a tensor of an evil name."""
    place = changed(folder, tmp_path)
    weights = place / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors[f"base_model.model.model.layers.0.{EVIL}.lora_A.weight"] = np.ones((4, 64), np.float32)
    safetensors.numpy.save_file(tensors, weights)
    return place


def strange_lora(folder, tmp_path):
    """A GGUF LoRA with evil metadata and an evil tensor."""
    path = tmp_path / f"{EVIL}.lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("general.name", EVIL)
    writer.add_float32("adapter.lora.alpha", 4.0)
    for kind in "ab":
        writer.add_tensor(f"blk.0.{EVIL[:20]}.weight.lora_{kind}", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


COMMANDS = {
    "convert": lambda f, t: ("convert", adapter(f), "--base", base(f), "-o", t / EVIL),
    "convert a tensor": lambda f, t: ("convert", renamed(f, t), "--base", base(f), "-o", t / EVIL),
    "convert a type": lambda f, t: ("convert", changed(f, t, peft_type=EVIL), "--base", base(f), "-o", t / EVIL),
    "convert modules": lambda f, t: (
        "convert", changed(f, t, target_modules=[EVIL], rank_pattern={EVIL: 3}), "--base", base(f), "-o", t / EVIL
    ),
    "convert json": lambda f, t: ("convert", adapter(f), "--base", base(f), "-o", t / EVIL, "--json"),
    "merge": lambda f, t: ("merge", base(f), "--lora", adapter(f), "-o", t / f"{EVIL}.gguf"),
    "merge a tensor": lambda f, t: ("merge", base(f), "--lora", renamed(f, t), "-o", t / f"{EVIL}.gguf"),
    "merge metadata": lambda f, t: ("merge", base(f), "--lora", strange_lora(f, t), "-o", t / f"{EVIL}.gguf"),
    "merge a missing one": lambda f, t: ("merge", base(f), "--lora", t / EVIL, "-o", t / "out.gguf"),
    "merge an outtype": lambda f, t: ("merge", base(f), "--lora", adapter(f), "--outtype", EVIL, "-o", t / "o.gguf"),
    "quantize": lambda f, t: ("quantize", base(f), "-o", t / f"{EVIL}.gguf", "Q8_0"),
    "quantize a preset": lambda f, t: ("quantize", base(f), "-o", t / f"{EVIL}.gguf", EVIL),
    "inspect": lambda f, t: ("inspect", adapter(f), "--base", base(f)),
    "inspect a tensor": lambda f, t: ("inspect", renamed(f, t), "--base", base(f)),
    "inspect metadata": lambda f, t: ("inspect", strange_lora(f, t)),
    "diff": lambda f, t: ("diff", adapter(f), adapter(f, "two")),
    "diff a tensor": lambda f, t: ("diff", adapter(f), renamed(f, t)),
    "combine": lambda f, t: ("combine", adapter(f), adapter(f, "two"), "-o", t / EVIL),
    "combine weights": lambda f, t: ("combine", f"{adapter(f)}:{EVIL}", adapter(f, "two"), "-o", t / EVIL),
    "resize": lambda f, t: ("resize", adapter(f), "--rank", 2, "-o", t / EVIL),
    "export": lambda f, t: ("export", strange_lora(f, t), "--base", base(f), "-o", t / EVIL),
    "extract": lambda f, t: ("extract", base(f), "--base", base(f), "--rank", 2, "-o", t / EVIL),
    "imatrix": lambda f, t: ("imatrix", base(f), "--text", f / "text", "-o", t / EVIL),
    "apply-patch": lambda f, t: ("apply-patch", base(f), base(f), "-o", t / f"{EVIL}.gguf"),
    "unmerge": lambda f, t: ("unmerge", base(f)),
    "pipeline": lambda f, t: ("pipeline", recipe(t)),
    "train": lambda f, t: ("train", base(f), "--data", data(t), "-o", t / EVIL, "--dry-run"),
    "run": lambda f, t: ("run", base(f), "--lora", t / EVIL, "-p", "x"),
    "compare": lambda f, t: ("compare", base(f), shutil.copy(base(f), t), "--lora", adapter(f), "--text", f / "text"),
    "an option": lambda f, t: ("merge", f"--{EVIL}"),
    "a command": lambda f, t: (EVIL,),
}  # fmt: skip


def base(folder):
    return folder / f"{EVIL}.gguf"


def recipe(tmp_path):
    path = tmp_path / f"{EVIL}.toml"
    path.write_text(f"output = {json.dumps(EVIL)}\n[[steps]]\nname = {json.dumps(EVIL)}\naction = {json.dumps(EVIL)}\n")
    return path


def data(tmp_path):
    path = tmp_path / f"{EVIL}.jsonl"
    path.write_text(json.dumps({"text": EVIL}) + "\n" + json.dumps({EVIL: 1}) + "\n")
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name, files, tmp_path):
    done = run(*COMMANDS[name](files, tmp_path))
    assert done.stdout + done.stderr
    assert not CONTROL.findall(done.stdout.replace("\r", "") + done.stderr.replace("\r", ""))


def test_the_names_do_reach_the_output(files, tmp_path):
    """Else the test above could not fail."""
    assert r"\x1b]0;owned" in run("convert", tmp_path / EVIL, "--base", base(files), "-o", tmp_path / "x").stderr
