"""``tools/demo --real``: two small adapters of PEFT on SmolLM2-135M-Instruct."""

import json
import subprocess
import sys

import pytest

from support import real_models
from tools import ROOT
from tools.real_demo import ADAPTERS, HERE, QUESTION, chat_prompt


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_small(name):
    config = json.loads((HERE / name / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert sum(file.stat().st_size for file in (HERE / name).iterdir()) < 1_000_000


@pytest.mark.real
def test_the_prompt_is_that_of_the_models_template():
    tokenizer = real_models.tokenizer(real_models.model("smollm2"))
    messages = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == chat_prompt(QUESTION)


@pytest.mark.real
@pytest.mark.slow
def test_the_table(tmp_path):
    real_models.model("smollm2")
    command = [sys.executable, "-m", "tools.real_demo", "--json", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    report = json.loads(done.stdout)
    answered = {answer["weights"]: answer["text"].strip() for answer in report["answers"]}
    assert answered["base"] == answered["shout removed"]
    assert not answered["base"].isupper()
    assert answered["shout"].isupper()
    assert answered["merged file (shout)"].isupper()
    assert answered["verse"].count("\n") >= 1
    assert report["kl"] < 0.1 * report["kl_base"]
    assert {path.name for path in tmp_path.iterdir()} == {"shout.gguf", "verse.gguf", "base-shout.gguf"}
