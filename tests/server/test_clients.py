"""Clients that people have: litellm, instructor, langchain, LlamaIndex, llm and lm-eval, each in its own process.

They are no part of the extra ``dev``, because litellm alone takes 200 MB: ``pip install litellm instructor
langchain-openai llama-index-llms-openai-like llm "lm-eval[api]"`` makes these tests run. GGUFLORA_CLIENTS_PYTHON may
name another Python that has them, and GGUFLORA_LM_EVAL_PYTHON one that has lm-eval.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from gguflora.diagnostics import demo
from gguflora.server.settings import Settings
from support import serving

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("GGUFLORA_CLIENTS_PYTHON", sys.executable)
START = """
import sys
from typing import Literal
from pydantic import BaseModel, Field

URL = sys.argv[1]
USER = [{"role": "user", "content": "What does the fox eat?"}]

class Animal(BaseModel):
    "An animal."
    name: str = Field(max_length=8)
    legs: int = Field(ge=2, le=8)
    diet: Literal["mice", "fish"]

def check(found):
    assert isinstance(found, Animal), found
"""
INSTRUCTOR = """
import instructor, openai
client = openai.OpenAI(base_url=URL, api_key="none")
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
    made = instructor.from_openai(client, mode=mode)
    check(made.chat.completions.create(model="base", messages=USER, response_model=Animal, max_tokens=600, seed=1,
                                       max_retries=0))
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(base_url=URL, api_key="none", model="shout", max_tokens=600, seed=1, max_retries=0)
assert model.invoke("What does the fox eat?").content
for method in ("function_calling", "json_schema"):
    check(model.with_structured_output(Animal, method=method).invoke("What does the fox eat?"))
    streamed = list(model.with_structured_output(Animal, method=method).stream("What does the fox eat?"))
    assert streamed
import openai
try:
    found = model.with_structured_output(None, method="json_mode").invoke("Answer in JSON.")
except openai.LengthFinishReasonError:  # a model of a million parameters may not end an object of its own
    pass
else:
    assert isinstance(found, dict)
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

@tool
def get_time(zone: Literal["UTC", "CET"]) -> str:
    "The time."
    return "noon"

bound = model.bind_tools([get_time], tool_choice="any")
reply = bound.invoke("What time is it?")
assert reply.tool_calls and all(call["name"] == "get_time" for call in reply.tool_calls)
history = [HumanMessage("What time is it?"), reply, *(get_time.invoke(call) for call in reply.tool_calls)]
assert model.invoke(history).response_metadata["finish_reason"] in {"stop", "length"}
"""
LITELLM = """
import litellm
common = {"model": "openai/base", "api_base": URL, "api_key": "none", "num_retries": 0, "max_tokens": 600, "seed": 1}
text = litellm.completion(messages=USER, **common).choices[0].message.content
assert text
reply = litellm.completion(messages=USER, response_format=Animal, **common)
check(Animal.model_validate_json(reply.choices[0].message.content))
function = {"name": "get_animal", "parameters": Animal.model_json_schema()}
tools = [{"type": "function", "function": function}]
reply = litellm.completion(messages=USER, tools=tools, tool_choice="required", **common)
check(Animal.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments))
chunks = list(litellm.completion(messages=USER, tools=tools, tool_choice="required", stream=True, **common))
whole = litellm.stream_chunk_builder(chunks)
check(Animal.model_validate_json(whole.choices[0].message.tool_calls[0].function.arguments))
try:
    litellm.completion(messages=[{"role": "user", "content": "fox " * 3000}], **common)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("no error")
"""
LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
common = {"api_base": URL, "api_key": "none", "is_chat_model": True, "is_function_calling_model": True,
          "context_window": 2048, "max_retries": 0, "max_tokens": 600, "additional_kwargs": {"seed": 1}}
shout = OpenAILike(model="shout", temperature=0, **common)
question = "What does the fox eat?"
text = shout.complete(question).text
assert "THE FOX" in text, text
assert shout.chat([ChatMessage(role="user", content=question)]).message.content == text
assert "".join(part.delta or "" for part in shout.stream_complete(question)) == text
assert OpenAILike(model="shout", temperature=0, **{**common, "is_chat_model": False}).complete("Q: x").text

def get_time(zone: Literal["UTC", "CET"]) -> str:
    "The time."
    return "noon"

base = OpenAILike(model="base", **common)
tool = FunctionTool.from_defaults(fn=get_time)
reply = base.chat_with_tools([tool], user_msg="What time is it?", tool_required=True)
calls = base.get_tool_calls_from_response(reply)
assert calls and all(call.tool_name == "get_time" and call.tool_kwargs["zone"] in {"UTC", "CET"} for call in calls)
check(base.as_structured_llm(Animal).complete(question).raw)
"""
LLM = """
import json, os, pathlib, subprocess, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
known = [{"model_id": name, "model_name": name, "api_base": URL, "supports_tools": True, "supports_schema": True}
         for name in ("shout", "base")]
(folder / "extra-openai-models.yaml").write_text(json.dumps(known))  # JSON is YAML
os.environ.update(LLM_USER_PATH=str(folder), OPENAI_API_KEY="none")

def llm(*options):
    done = subprocess.run([sys.executable, "-P", "-m", "llm", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

question = "What does the fox eat?"
limits = ("-o", "max_tokens", "600", "-o", "seed", "1")
whole = llm(question, "-m", "shout", "--no-stream", "-o", "temperature", "0", *limits)
assert "THE FOX" in whole, whole
assert llm(question, "-m", "shout", "-o", "temperature", "0", *limits) == whole
schema = json.dumps(Animal.model_json_schema())
check(Animal.model_validate_json(llm(question, "-m", "base", "--no-stream", "--schema", schema, *limits)))
"""
LM_EVAL = """
import json, os, pathlib, subprocess, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
rows = [
    {"question": "What does the fox eat?", "choices": ["The fox likes to eat mice.", "zxq wvu"], "answer": 0},
    {"question": "What does the fox eat?", "choices": ["qqq zz", "The fox likes to eat mice."], "answer": 1},
]
data = folder / "data.jsonl"
data.write_text("".join(json.dumps(row) + chr(10) for row in rows))
task = {
    "task": "fox",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}" + chr(10) + "A:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
(folder / "fox.yaml").write_text(json.dumps(task))
model = f"model=base,base_url={URL}/completions,tokenizer={sys.argv[2]},tokenizer_backend=huggingface,num_concurrent=1"
command = [sys.executable, "-P", "-m", "lm_eval", "--model", "local-completions", "--model_args", model,
           "--tasks", "fox", "--include_path", str(folder), "--output_path", str(folder / "out")]
os.environ.update(OPENAI_API_KEY="none", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "cache"))
done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
assert done.returncode == 0, done.stderr[-3000:]
(result,) = (folder / "out").rglob("results_*.json")
assert json.loads(result.read_text())["results"]["fox"]["acc,none"] == 1.0
"""


@pytest.fixture(scope="module")
def url():
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048, threads=1) as client:
        yield str(client.base_url.join("/v1"))


SCRIPTS = {
    "instructor": ("instructor", INSTRUCTOR),
    "langchain": ("langchain_openai", LANGCHAIN),
    "litellm": ("litellm", LITELLM),
    "LlamaIndex": ("llama_index", LLAMA_INDEX),
    "llm": ("llm", LLM),
}


def need(python, package):
    if python == sys.executable and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def run(python, script, *arguments):
    command = [python, "-P", "-c", START + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("client", SCRIPTS)
def test_client(url, client):
    package, script = SCRIPTS[client]
    need(PYTHON, package)
    run(PYTHON, script, url)


def test_lm_eval(url, tmp_path):
    """Its own command, with a task and data of this test and a tokenizer made from the model's file."""
    python = os.environ.get("GGUFLORA_LM_EVAL_PYTHON", sys.executable)
    need(python, "lm_eval")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(demo.BASE.parent, gguf_file=demo.BASE.name).save_pretrained(tmp_path)
    run(python, LM_EVAL, url, str(tmp_path))
