"""Rows as token lists: the prompt's tokens and then the answer's, as llama.cpp makes them when the model is served.

The template is asked twice for each answer: for the text up to where the answer begins, as generation sees it, and for
the text with the answer. What the second has more is the answer and how it ends. Nothing of it depends on how the
template marks answers, and a template that leaves out thoughts of earlier turns simply makes more samples of a chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gguflora.errors import RequestError, TrainingDataError, UsageError
from gguflora.training.rows import Row, said


class ChatVocabulary(Protocol):
    """What is needed of `gguflora.engine.model.Model`."""

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template."""

    @property
    def end_of_text(self) -> int:
        """The token that ends a text, or -1."""

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> list[int]:
        """Tokens of a text."""

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None,
        to_answer: bool,
        **kwargs: Any,  # noqa: ANN401
    ) -> str:
        """The text of a chat."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A token list to learn.

    Attributes:
        tokens: of prompt and answer.
        trained: which of them are learned.
        source: file and line.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    source: str

    @property
    def n_trained(self) -> int:
        """Learned tokens; the first of a text follows nothing and cannot be learned."""
        return sum(self.trained[1:])


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples, and what became of those that did not fit.

    Attributes:
        samples: with something to learn in each.
        cut: sources of those that lost tokens at their end.
        dropped: sources of those whose answer was cut away whole.
    """

    samples: tuple[Sample, ...]
    cut: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleMaker:
    """Turns rows into samples.

    Attributes:
        vocabulary: the model's vocabulary.
        template: in place of the model's own.
        learn_all: whether prompts are learned, too.
    """

    vocabulary: ChatVocabulary
    template: str | None = None
    learn_all: bool = False

    def make(self, rows: Sequence[Row]) -> list[Sample]:
        """The samples of all rows, whole.

        Raises:
            TrainingDataError: with each row that the template refuses.
            UsageError: if there are chats, but no template.
        """
        if any(row.messages for row in rows) and self.template is None and not self.vocabulary.has_template:
            raise UsageError(
                "the data has chats, but the base brings no chat template; give one with --chat-template FILE, or data "
                "with 'prompt' and 'completion'"
            )
        found: list[Sample] = []
        problems = []
        for row in rows:
            try:
                found += self._chat(row) if row.messages else [self._text(row)]
            except RequestError as error:
                problems.append(f"{row.source}: {error}")
        if problems:
            raise TrainingDataError(said(problems, "cannot be used"), problems)
        return found

    def _text(self, row: Row) -> Sample:
        prompt = [] if row.prompt is None else self._tokens(row.prompt, add_bos=True)
        if row.prompt is None:
            answer = self._tokens(row.text, add_bos=True)
        else:
            answer = self._answer(prompt, row.prompt, row.text, add_bos=True)
        if self.vocabulary.end_of_text >= 0:
            answer = [*answer, self.vocabulary.end_of_text]
        learned = [self.learn_all] * len(prompt) + [True] * len(answer)
        return Sample(tuple(prompt + answer), tuple(learned), row.source)

    def _chat(self, row: Row) -> list[Sample]:
        """A sample of all turns; more than one where the template shows earlier turns otherwise than they were made."""
        samples: list[Sample] = []
        turns = [n for n, message in enumerate(row.messages) if message["role"] == "assistant" and n >= row.first]
        for number in turns:
            prompt, answer = self._turn(row, number)
            before = samples[-1] if samples else Sample((), (), row.source)
            goes_on = prompt[: len(before.tokens)] == list(before.tokens)
            known = before.trained if goes_on else ()
            learned = (*known, *[self.learn_all] * (len(prompt) - len(known)), *[True] * len(answer))
            if samples and goes_on:
                samples.pop()
            samples.append(Sample((*prompt, *answer), learned, row.source))
        return samples

    def _turn(self, row: Row, number: int) -> tuple[list[int], list[int]]:
        """Tokens of the prompt of one answer, and of the answer with the token that ends it."""
        asked = self._render(row, number, to_answer=True)
        told = self._render(row, number + 1, to_answer=False)
        content = str(row.messages[number]["content"])
        if told.startswith(asked):
            answer = told[len(asked) :]
        else:  # the template opens a thought, say, that the answer does not have
            at = told.rfind(content) if content else -1
            answer = told[at:] if at >= 0 else content
        prompt = self._tokens(asked, add_bos=self._adds_bos)
        tokens = self._answer(prompt, asked, answer, add_bos=self._adds_bos)
        end = next((at for at, token in enumerate(tokens) if self.vocabulary.is_end(token)), None)
        if end is not None:
            return prompt, tokens[: end + 1]
        tokens = self._answer(prompt, asked, answer.rstrip(), add_bos=self._adds_bos)
        if self.vocabulary.end_of_text < 0:
            raise RequestError("the model has no token that ends an answer")
        return prompt, [*tokens, self.vocabulary.end_of_text]

    @property
    def _adds_bos(self) -> bool:
        return self.template is None and not self.vocabulary.has_template

    def _render(self, row: Row, count: int, *, to_answer: bool) -> str:
        more = {"tools": list(row.tools)} if row.tools else {}
        return self.vocabulary.chat_text(row.messages[:count], template=self.template, to_answer=to_answer, **more)

    def _tokens(self, text: str, *, add_bos: bool) -> list[int]:
        return self.vocabulary.tokenize(text, add_bos=add_bos, special=True)

    def _answer(self, prompt: Sequence[int], asked: str, answer: str, *, add_bos: bool) -> list[int]:
        """Tokens that follow a prompt; where the text of both is cut elsewhere, those of the answer alone."""
        whole = self._tokens(asked + answer, add_bos=add_bos)
        if whole[: len(prompt)] == list(prompt):
            return whole[len(prompt) :]
        return self._tokens(answer, add_bos=False)


def fit(samples: Sequence[Sample], length: int, name: str = "samples") -> SampleSet:
    """Samples of at most ``length`` tokens: texts in pieces, the rest without their end.

    Args:
        samples: whole samples.
        length: most tokens of one.
        name: what they are, in the message of an error.

    Raises:
        TrainingDataError: if nothing is left to learn.
    """
    kept: list[Sample] = []
    cut: list[str] = []
    dropped: list[str] = []
    for sample in samples:
        pieces = _pieces(sample, length)
        learned = [piece for piece in pieces if piece.n_trained]
        if sum(len(piece.tokens) for piece in pieces) < len(sample.tokens):
            (cut if learned else dropped).append(sample.source)
        elif not learned:
            dropped.append(sample.source)
        kept += learned
    if not kept:
        where = ", ".join(sample.source for sample in samples[:8])
        raise TrainingDataError(
            f"none of the {len(samples)} {name} has a token to learn within {length} tokens ({where}); shorten their "
            "prompts, or allow more with --length"
        )
    return SampleSet(tuple(kept), tuple(cut), tuple(dropped))


def _pieces(sample: Sample, length: int) -> list[Sample]:
    if all(sample.trained):
        starts = range(0, len(sample.tokens), length)
        return [Sample(sample.tokens[s : s + length], sample.trained[s : s + length], sample.source) for s in starts]
    return [Sample(sample.tokens[:length], sample.trained[:length], sample.source)]
