"""Needle in a haystack: RULER's single-needle and multi-key tasks, in its wording, for any tokenizer.

An example of ``niah_single_1`` (Titans' S-NIAH-PK)::

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    One of the special magic numbers for nasty-beret is: 7294830.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    What is the special magic number for nasty-beret mentioned in the provided text? The special magic number for
    nasty-beret mentioned in the provided text is

The model goes on greedily; the score is 1 if the value occurs in its next 128 tokens.

Source: Hsieh et al. 2024 (RULER, arXiv 2404.06654); Titans, table 2 (PK, N, W = niah_single_1, 2, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, Literal
from uuid import UUID

from titans.evaluation.running_text import ESSAYS, RunningText
from titans.evaluation.task import EvaluationError
from titans.evaluation.text_task import Draft, TextSample, TextTask, interleave

REPEAT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}{question}"
)
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)

Haystack = Literal["repeat", "text", "needles"]


@dataclass(frozen=True)
class Setting:
    """What distinguishes one of RULER's tasks.

    Args:
        haystack: one line again and again, running text, or other needles.
        keys: "word" (adjective-noun) or "uuid".
        value: "number" (seven digits) or "uuid".
        needles: needles with keys of their own, one of which is asked for.
    """

    haystack: Haystack
    keys: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    needles: int = 1


SETTINGS = {
    "niah_single_1": Setting("repeat"),
    "niah_single_2": Setting("text"),
    "niah_single_3": Setting("text", value="uuid"),
    "niah_multikey_1": Setting("text", needles=4),
    "niah_multikey_2": Setting("needles"),
    "niah_multikey_3": Setting("needles", keys="uuid", value="uuid"),
}


class Niah(TextTask):
    """One of the tasks above.

    Args:
        name: a key of ``SETTINGS``.
        text: running text, for the tasks whose haystack it is.

    Raises:
        EvaluationError: wonderwords is not installed.
    """

    max_new_tokens = 128
    has_depth = True

    def __init__(self, name: str, text: RunningText | None = None):
        self.name = name
        self.setting = SETTINGS[name]
        self.text = text
        if self.setting.keys == "word":
            word_lists()
        of_text = self.setting.haystack == "text"
        self.note = "RULER's wording and scoring; the length counts the prompt, without RULER's 128 tokens of answer"
        if of_text and text is not None and text.name != ESSAYS:
            self.note += f"; the haystack is {text.name}, not RULER's essays, so the figures are not comparable"

    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        if self.setting.haystack != "text" or self.text is None:
            return {}
        return {"text": self.text.name, "text_digest": self.text.digest}

    def draft(self, random: Random, depth: float, questions: int = 1) -> Draft:
        """As `TextTask`: the needle asked for first lies at ``depth``, the others anywhere."""
        setting = self.setting
        asked = [self._key(random)]
        values = [self._value(random)]
        while len(asked) < max(questions, setting.needles):
            asked.append(self._other_key(random, asked))
            values.append(self._value(random))
        needles = [NEEDLE.format(kind=setting.value, key=k, value=v) for k, v in zip(asked, values, strict=True)]
        placed = [(random.random() if i else depth, needle) for i, needle in enumerate(needles)]
        joiner = " " if setting.haystack == "text" else "\n"
        question = [QUESTION.format(kind=setting.value, key=key) for key in asked]

        def compose(background: Sequence[str]) -> str:
            context = joiner.join(interleave(background, placed))
            return PROMPT.format(kind=setting.value, context=context, question=question[0])

        further = tuple(zip(question[1:questions], values[1:questions], strict=True))
        return Draft(compose, self._background(random, asked), joiner, values[0], further=further)

    def score(self, sample: TextSample, output: str) -> float:
        """1 if the value occurs in the output, in either case of letters; else 0."""
        return float(sample.answer.lower() in output.lower())

    def settled(self, sample: TextSample, output: str) -> bool:
        """As `TextTask`."""
        return self.score(sample, output) == 1

    def _background(self, random: Random, asked: Sequence[str]) -> Iterator[str]:
        if self.setting.haystack == "text":
            assert self.text is not None
            yield from self.text.stream(random)
        while True:
            yield REPEAT if self.setting.haystack == "repeat" else self._needle(random, asked)

    def _needle(self, random: Random, asked: Sequence[str]) -> str:
        """A needle whose key is none that is asked for."""
        key = self._other_key(random, asked)
        return NEEDLE.format(kind=self.setting.value, key=key, value=self._value(random))

    def _other_key(self, random: Random, taken: Sequence[str]) -> str:
        key = self._key(random)
        while key in taken:
            key = self._key(random)
        return key

    def _key(self, random: Random) -> str:
        if self.setting.keys == "uuid":
            return _uuid(random)
        adjectives, nouns = word_lists()
        return f"{random.choice(adjectives)}-{random.choice(nouns)}"

    def _value(self, random: Random) -> str:
        return _uuid(random) if self.setting.value == "uuid" else str(random.randint(1_000_000, 9_999_999))


@lru_cache(maxsize=1)
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adjectives and nouns of PyPI's wonderwords, as RULER takes them.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        from wonderwords import random_word  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EvaluationError(
            "tasks: the keys of niah come from wonderwords; pip install 'titans-miras[eval]'"
        ) from None
    lists = (random_word._get_words_from_text_file(f"{kind}list.txt") for kind in ("adjective", "noun"))
    adjectives, nouns = (tuple(sorted({word for word in words if word})) for words in lists)
    return adjectives, nouns


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))
