"""Clients that people have: litellm, instructor and langchain, each in a process of its own.

They are no part of the extra ``dev``, because litellm alone takes 200 MB: ``pip install litellm instructor
langchain-openai`` makes these tests run. GGUFLORA_CLIENTS_PYTHON may name another Python that has them.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

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


@pytest.fixture(scope="module")
def url():
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048) as client:
        yield str(client.base_url.join("/v1"))


@pytest.mark.parametrize(
    ("package", "script"),
    [("instructor", INSTRUCTOR), ("langchain_openai", LANGCHAIN), ("litellm", LITELLM)],
    ids=["instructor", "langchain", "litellm"],
)
def test_client(url, package, script):
    if sys.executable == PYTHON and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    command = [PYTHON, "-P", "-c", START + script, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
