"""``gguflora run``: prompts and commands through a pipe and in a terminal, and what they answer."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from gguflora.diagnostics import demo
from gguflora.engine import Sampling
from gguflora.engine.chat import HELP, Chat
from gguflora.engine.run import open_chat
from support import serving
from support.serving import PROMPT, QUESTION, expected_text, lora_file, wait_until

GREEDY = ("--temperature", "0", "--max-tokens", "60")


def run(*arguments, lines=None):
    """Exit code, answers, and what was said about them."""
    command = [sys.executable, "-P", "-m", "gguflora", "run", str(demo.BASE), *map(str, arguments)]
    entered = None if lines is None else "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=entered, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_one_shot():
    assert run("-p", QUESTION, *GREEDY)[:2] == (0, expected_text() + "\n")
    assert run("-p", PROMPT, "--raw", "--lora", lora_file("shout"), *GREEDY)[1] == expected_text("shout") + "\n"
    scaled = ("--lora-scaled", f"loud={demo.HERE / 'shout'}:0.4")
    code, out, err = run("-p", QUESTION, *scaled, *GREEDY)
    assert (code, out) == (0, expected_text("shout", 0.4) + "\n")
    assert re.fullmatch(r"\[loud@0\.4: \d+ tokens, [\d.]+ tokens/s, first after \d+ ms\]\n", err)


def test_going_back_to_a_set_keeps_its_tokens():
    adapters = {"shout": (demo.HERE / "shout", 1.0)}
    with open_chat(
        demo.BASE, adapters, {}, raw=False, ctx=None, max_tokens=4, temperature=0, seed=None, threads=1,
        text_only=False, trust_names=False, write=lambda _: None,
    ) as chat:  # fmt: skip
        chat.say(QUESTION)
        for line in ("/new", "/lora shout 0", QUESTION, "/new", "/lora shout 1"):
            chat.handle(line)
        before = chat.engine.stats().decoded_tokens
        chat.say(QUESTION)
        assert chat.engine.stats().decoded_tokens - before == 4


def test_lines_from_a_pipe(tmp_path):
    lines = [
        QUESTION, "/new", "/lora shout 1", QUESTION, "/new", "/lora shout 0", f"/load poet {demo.HERE / 'verse'}",
        "/lora poet 0.5", "", QUESTION, "/off", "/new", QUESTION, "/lora", "/quit", "never asked",
    ]  # fmt: skip
    code, out, err = run("--lora-scaled", f"{lora_file('shout')}:0", *GREEDY, lines=lines)
    sets = [(), ("shout",), ("verse", 0.5), ()]
    assert (code, out) == (0, "".join(expected_text(*one) + "\n" for one in sets))
    assert "loaded poet in" in err
    assert [line for line in err.splitlines() if line.startswith("poet: ")][-1].startswith("poet: 0  (")


def test_the_conversation_is_remembered():
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": expected_text()}]
    follow = "Where does it live?"
    wanted = serving.llama().create_chat_completion(
        [*messages, {"role": "user", "content": follow}], temperature=0, max_tokens=60
    )
    _, out, _ = run(*GREEDY, lines=[QUESTION, follow])
    assert out == expected_text() + "\n" + wanted["choices"][0]["message"]["content"] + "\n"


def test_compare_side_by_side():
    adapters = ("--lora", lora_file("shout"), "--lora-scaled", f"{lora_file('verse')}:0")
    code, out, _ = run(
        *adapters, "--raw", "--temperature", "0", "--max-tokens", "12", lines=[f"/compare {PROMPT[:-3]}"]
    )
    assert code == 0
    title, *rest = [line.split() for line in out.splitlines() if line.strip()]
    assert title == ["base", "shout@1", "verse@1"]
    assert len(re.findall(r"12 tokens, [\d.]+ tokens/s", out)) == 3
    assert len(rest) >= 3


def test_errors_do_not_end_the_conversation(tmp_path):
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(os.urandom(999))
    lines = [
        "/lora tone 1", "/lora shout", "/lora shout x", "/lora shout nan", "/load x", f"/load x {garbage}", "/what",
        "/compare", "/load shout x.gguf", "/help", "word " * 2000, QUESTION,
    ]  # fmt: skip
    code, out, err = run("--lora-scaled", f"{lora_file('shout')}:0", *GREEDY, lines=lines)
    assert (code, out) == (0, expected_text() + "\n")
    assert err.count("error: ") == 10
    assert HELP in err


@pytest.mark.parametrize("bad", [("--lora", "=x"), ("--lora-scaled", "x"), ("--lora", "a=x", "--lora", "a=y")])
def test_wrong_usage(bad):
    assert run("-p", "x", *bad)[0] == 2


def test_failures_have_an_exit_code():
    code, out, err = run("-p", "x", "--lora", "missing.gguf")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert run("-p", "word " * 2000)[0] == 1


@pytest.fixture(scope="module")
def chat_parts():
    with serving.engine() as engine:
        yield engine


def make_chat(engine, **options):
    said, told, shown = [], [], []
    sampling = Sampling(temperature=0)
    chat = Chat(engine, said.append, told.append, shown.extend, max_tokens=60, sampling=sampling, **options)
    return chat, said, told, shown


def test_it_streams(chat_parts):
    chat, said, _, _ = make_chat(chat_parts)
    assert chat.handle(QUESTION)
    assert len(said) > 10
    assert "".join(said) == expected_text() + "\n"


def test_compare_is_each_adapters_answer(chat_parts):
    chat, _, _, shown = make_chat(chat_parts, raw=True, scales={"shout": 0.4, "verse": 0.5})
    chat.handle(f"/compare {PROMPT}")
    texts = {answer.adapters: answer.text for answer in shown}
    assert list(texts) == ["base", "shout@0.4", "verse@0.5", "shout@0.4+verse@0.5"]
    assert texts["base"] == expected_text()
    assert texts["shout@0.4"] == expected_text("shout", 0.4)
    assert texts["verse@0.5"] == expected_text("verse", 0.5)
    assert all(answer.tokens > 5 and answer.tokens_per_second > 0 < answer.ttft <= answer.seconds for answer in shown)


def test_an_interrupted_answer_ends_alone(chat_parts):
    chat, _, told, _ = make_chat(chat_parts)
    said = []

    def write(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    chat.write = write
    chat.handle(QUESTION)
    wait_until(lambda: chat_parts.stats().running == 0)
    assert len(said) <= 5
    assert int(re.match(r"\[base: (\d+) tokens", told[-1])[1]) >= 3
    chat.write = said.append
    chat.handle("/new")
    chat.handle(QUESTION)
    assert "".join(said).endswith(expected_text() + "\n")


def test_in_a_terminal():
    """A prompt, an answer, and the end by Ctrl+C."""
    parent, child = pty.openpty()
    command = [sys.executable, "-P", "-m", "gguflora", "run", str(demo.BASE), *GREEDY]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    seen = b""

    def read_until(wanted):
        nonlocal seen
        while wanted not in seen:
            seen += os.read(parent, 4096)
        seen = seen.partition(wanted)[2]

    try:
        read_until(b"> ")
        os.write(parent, QUESTION.encode() + b"\n")
        read_until(expected_text().strip().encode())
        read_until(b"> ")
        for _ in range(3):  # CPython's input() sleeps on where the signal comes after its prompt and before it waits
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
