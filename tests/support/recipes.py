"""Folders with a base, adapters and a recipe, and what a run leaves behind."""

import shutil

import gguflora
from support import builders
from support.builders import Adapter

SMALL = """
output = "out"

[sources]
adapters = "adapters/*"

[[steps]]
name = "small"
action = "resize"
for = { adapter = "sources.adapters" }
adapter = "{adapter}"
rank = 2
out = "{adapter}"
"""
"""A recipe that resizes each adapter."""
CONVERTED = f"""{SMALL}
[[steps]]
name = "lora"
action = "convert"
for = {{ adapter = "steps.small" }}
adapter = "{{adapter}}"
base = "base.gguf"
out = "{{adapter}}.gguf"
"""
"""A recipe that converts what `SMALL` makes."""


def add_inputs(folder, *names):
    """Add ``base.gguf`` and ``adapters/NAME``, each with a seed of its own, to a folder, and return it."""
    shutil.copyfile(builders.gguf_model("llama"), folder / "base.gguf")
    for seed, name in enumerate(names):
        source = builders.adapter("llama", Adapter(targets=("q_proj",), seed=seed))
        shutil.copytree(source, folder / "adapters" / name)
    return folder


def run_recipe(folder, text, **options):
    (folder / "recipe.toml").write_text(text)
    return gguflora.run_pipeline(folder / "recipe.toml", **options)


def statuses(report):
    return [result.status for result in report.results]


def outputs(folder):
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".gguflora" not in path.parts
    }
