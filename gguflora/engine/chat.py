"""A conversation in the terminal: a line that begins with ``/`` is a command, any other line is a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gguflora.engine import AdapterSet, Engine, Generation, Request, Sampling, describe_set
from gguflora.engine.adapter_templates import ended_by
from gguflora.errors import AdapterNameError, GgufloraError, RequestError

HELP: Final = """\
/lora               list the adapters
/lora NAME SCALE    set an adapter's scale, for example: /lora legal 0.5
/load NAME PATH     load an adapter and switch it on; NAME:TASK chooses a task of a multitask prompt
/off                switch all adapters off
/compare PROMPT     show the answers of the base and of each adapter side by side
/new                start a new conversation
/help               show this list
/quit               quit"""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer and its speed.

    Attributes:
        adapters: the adapter set, as text.
        text: text of the answer.
        tokens: number of tokens of the answer.
        ttft: seconds from the request to the first token.
        seconds: seconds from the request to the last token.
        tokens_per_second: tokens generated per second, after the first token.
    """

    adapters: str
    text: str
    tokens: int
    ttft: float
    seconds: float
    tokens_per_second: float


@dataclass(slots=True)
class Chat:
    """A conversation with one engine.

    Attributes:
        engine: the engine that answers.
        write: called with each piece of an answer's text.
        tell: called with each message about the conversation, one line.
        show: called with the answers of ``/compare``.
        raw: continue each prompt as plain text, without the chat template and without earlier messages.
        max_tokens: largest number of tokens of one answer.
        sampling: sampling parameters of all answers.
        scales: scale of each adapter that is on, by name.
        messages: the conversation so far.
    """

    engine: Engine
    write: Callable[[str], None]
    tell: Callable[[str], None]
    show: Callable[[list[ChatAnswer]], None]
    raw: bool = False
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    scales: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def handle(self, line: str) -> bool:
        """Run a command or answer a prompt; return False if the line ends the conversation.

        Errors go to `tell`; they are not raised.
        """
        line = line.strip()
        word, _, rest = line.partition(" ")
        try:
            if line.startswith("/"):
                return self._command(word, rest.strip())
            if line:
                self.say(line)
        except GgufloraError as error:
            self.tell(f"error: {error}")
        return True

    def say(self, text: str) -> ChatAnswer:
        """Answer a prompt and, unless `raw`, add both to the conversation.

        Raises:
            GgufloraError: if the prompt cannot be answered; the conversation then stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(text, messages, self.adapters, self.write)
        if not self.raw:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.tell(f"[{answer.adapters}: {describe(answer)}]")
        return answer

    def compare(self, prompt: str) -> list[ChatAnswer]:
        """Answer a prompt with the base, with each adapter alone, and with the current set.

        The answers do not become part of the conversation.
        """
        messages = [{"role": "user", "content": prompt}]
        names = [adapter.name for adapter in self.engine.adapters()]
        alone = [self.engine.adapter_set([(name, self.scales.get(name) or 1.0)]) for name in names]
        sets = dict.fromkeys([(), *alone, self.adapters])
        return [self._answer(prompt, messages, adapters) for adapters in sets]

    @property
    def adapters(self) -> AdapterSet:
        """The current adapter set."""
        return self.engine.adapter_set(list(self.scales.items()))

    def _request(self, text: str, messages: list[dict[str, str]], adapters: AdapterSet) -> Request:
        template = None if self.raw else self.engine.template_of(adapters)
        tokens = self.engine.tokenize(text) if self.raw else self.engine.render_chat(messages, template=template)
        return Request(tokens, adapters, max_tokens=self.max_tokens, sampling=ended_by(self.sampling, template))

    def _answer(
        self,
        text: str,
        messages: list[dict[str, str]],
        adapters: AdapterSet,
        write: Callable[[str], None] = lambda _: None,
    ) -> ChatAnswer:
        started = time.perf_counter()
        request = self._request(text, messages, adapters)
        generation, text = self.engine.submit(request), ""
        try:
            for piece in generation:
                text += piece.text
                write(piece.text)
        except KeyboardInterrupt:  # Ctrl+C ends the answer, not the conversation
            generation.cancel()
            for _ in generation:  # discard pieces that were already under way
                pass
        finally:
            write("\n")
        return _measured(generation, describe_set(adapters), text, time.perf_counter() - started)

    def _command(self, word: str, rest: str) -> bool:
        commands: Mapping[str, Callable[[str], None]] = {
            "/lora": self._lora,
            "/load": self._load,
            "/off": self._off,
            "/compare": self._compare,
            "/new": self._new,
            "/help": lambda _: self.tell(HELP),
        }
        if word == "/quit":
            return False
        if word not in commands:
            raise RequestError(f"{word} is not a command; /help lists the commands")
        commands[word](rest)
        return True

    def _lora(self, rest: str) -> None:
        name, _, scale = rest.rpartition(" ")
        if rest and not name:
            raise RequestError(f"/lora needs a name and a scale, for example: /lora {rest} 1")
        if rest:
            self._set(name.strip(), scale)
        for adapter in self.engine.adapters():
            self.tell(f"{adapter.name}: {self.scales.get(adapter.name, 0):g}  ({adapter.method}, {adapter.path.name})")
        if not self.engine.adapters():
            self.tell("no adapter is loaded; /load NAME PATH loads one")

    def _set(self, name: str, text: str) -> None:
        try:
            scale = float(text)
        except ValueError:
            raise RequestError(f"the scale of {name!r} is {text!r}, expected a number") from None
        self.engine.adapter_set([(name, scale)])
        self.scales[name] = scale

    def _load(self, rest: str) -> None:
        name, _, path = rest.partition(" ")
        if not path.strip():
            raise AdapterNameError("/load needs a name and a path, for example: /load legal legal.gguf")
        name, colon, task = name.partition(":")
        if colon and not task.isdecimal():
            raise RequestError(f"the task of {name!r} is {task!r}, expected a whole number")
        started = time.perf_counter()
        adapter = self.engine.load(Path(path.strip()).expanduser(), name, task=int(task) if colon else None)
        for text in adapter.warnings:
            self.tell(f"warning: {text}")
        self.scales[adapter.name] = 1.0
        self.tell(f"loaded {adapter.name} in {time.perf_counter() - started:.2f} s; it is on at 1")

    def _off(self, _: str) -> None:
        self.scales.clear()
        self.tell("all adapters are off")

    def _compare(self, prompt: str) -> None:
        if not prompt:
            raise RequestError("/compare needs a prompt")
        self.show(self.compare(prompt))

    def _new(self, _: str) -> None:
        self.messages = []
        self.tell("started a new conversation")


def _measured(generation: Generation, adapters: str, text: str, seconds: float) -> ChatAnswer:
    tokens, timings = generation.usage.completion_tokens, generation.timings
    rate = (tokens - 1) / timings.decode if tokens > 1 and timings.decode else 0.0
    return ChatAnswer(adapters, text, tokens, timings.ttft, seconds, rate)


def describe(answer: ChatAnswer) -> str:
    """Describe the length and speed of an answer in words."""
    return f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, first after {answer.ttft * 1e3:.0f} ms"
