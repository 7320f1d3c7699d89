"""BABILong-style questions: the facts of a small world, in order, scattered among background sentences.

An example of ``babilong_qa1``, the facts marked here only::

    Return the number of items. *Mary went to the garden.* If the key is not found, KeyError is raised. *John moved to
    the office.* *Mary journeyed to the kitchen.* See the module's documentation.
    Question: Where is Mary?
    Answer:

The model goes on greedily; the score is 1 if, in its first sentence, the right label is the only one named beside those
of the question. Worlds and background are made here, so the figures are not comparable with the published set, which
``babilong_published_qa1`` to ``_qa5`` read through ``datasets`` where it can be reached.

Source: Kuratov et al. 2024 (BABILong, arXiv 2406.10149), whose metric this is; the worlds are those of
`titans.evaluation.worlds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from titans.data import Tokenizer
from titans.evaluation.running_text import RunningText
from titans.evaluation.task import EvaluationError, NotMeasurable
from titans.evaluation.text_task import Draft, TextSample, TextTask, interleave
from titans.evaluation.worlds import GIVERS, PLACES, STORIES, THINGS

QUESTION = "\nQuestion: {question}\nAnswer:"
PUBLISHED = "RMT-team/babilong"


class Babilong(TextTask):
    """Worlds made here, among running text.

    Args:
        name: "babilong_qa1" to "babilong_qa5".
        text: the background.
    """

    max_new_tokens = 20

    def __init__(self, name: str, text: RunningText):
        self.name, self.text = name, text
        self.world = name.removeprefix("babilong_")
        self.note = f"BABILong-style: worlds made here among {text.name}; not comparable with the published set"

    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return {"text": self.text.name, "text_digest": self.text.digest}

    def draft(self, random: Random, depth: float, questions: int = 1) -> Draft:
        """As `TextTask`; the facts lie anywhere, ``depth`` is not looked at."""
        story = STORIES[self.world](random)
        depths = sorted(random.random() for _ in story.facts)
        placed = list(zip(depths, story.facts, strict=True))

        def compose(background: Sequence[str]) -> str:
            context = " ".join(interleave(background, placed))
            return context + QUESTION.format(question=story.question)

        others = random.sample(story.further, min(questions - 1, len(story.further)))
        further = tuple((QUESTION.format(question=question), answer) for question, answer in others)
        return Draft(compose, self.text.stream(random), " ", story.answer, story.question, further)

    def score(self, sample: TextSample, output: str) -> float:
        """As `only_label`."""
        labels = GIVERS + THINGS if self.world == "qa5" else PLACES
        return float(only_label(sample.answer, output, sample.question, labels))

    def settled(self, sample: TextSample, output: str) -> bool:
        """As `TextTask`: only the first sentence counts."""
        return "." in output


class PublishedBabilong(Babilong):
    """The published set of Hugging Face's hub: a hundred samples for each question and length.

    A length names the published file, "4k" for 4,096, whose tokens are not the model's; records say how many those are.
    """

    def __init__(self, name: str):
        self.name = name
        self.world = name.removeprefix("babilong_published_")
        self._rows: dict[int, Any] = {}
        self.note = (
            "the published BABILong set, its text followed by the bare question: comparable with models trained on the "
            "task, not with instruction prompts"
        )

    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return {"text": PUBLISHED}

    def count(self, tokenizer: Tokenizer, length: int, samples: int) -> int:
        """As `titans.evaluation.task.Task`: a file has a hundred."""
        return min(samples, len(self.rows(length)))

    def samples(
        self, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[TextSample]:
        """As `TextTask`, in the order of the set."""
        rows = self.rows(length)
        found = []
        for row in (rows[i] for i in indices):
            ids = tokenizer.encode_array(row["input"] + QUESTION.format(question=row["question"]))
            found.append(TextSample(ids.astype(np.int64), row["target"], row["question"], None))
        return found

    def rows(self, length: int) -> Any:
        """As `published_rows`, loaded once."""
        if length not in self._rows:
            self._rows[length] = published_rows(self.world, length)
        return self._rows[length]

    def draft(self, random: Random, depth: float, questions: int = 1) -> Draft:
        """The set cannot be trained on."""
        raise EvaluationError(f"task: {self.name} is for evaluation only; train on babilong_{self.world}")


def published_rows(world: str, length: int) -> Any:
    """The rows ``input``, ``question``, ``target`` of one published file.

    Raises:
        NotMeasurable: no file has this length.
        EvaluationError: datasets is missing, or the set cannot be reached.
    """
    if length % 1024:
        raise NotMeasurable(f"the published BABILong has lengths of whole 1,024 tokens, not {length}")
    part = "1M" if length == 2**20 else f"{length // 1024}k"
    try:
        from datasets import load_dataset
    except ImportError:
        raise EvaluationError(
            "tasks: the published BABILong set needs datasets; pip install 'titans-miras[train]'"
        ) from None
    try:
        return load_dataset(PUBLISHED, part)[world]
    except Exception as error:  # the libraries below it raise errors of half a dozen families
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"tasks: {PUBLISHED} {part} could not be loaded ({reason}); the hub must be reachable, or use "
            f"babilong_{world}, whose worlds are made here"
        ) from error


def only_label(answer: str, output: str, question: str, labels: Sequence[str]) -> bool:
    """BABILong's metric: of the labels that the question does not name, the output's first sentence names just the
    answer."""
    first = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    asked = question.lower()
    named = {label.lower() for label in labels if label.lower() in first and label.lower() not in asked}
    return named == {answer.lower()}
