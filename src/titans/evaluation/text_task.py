"""Tasks whose samples are text: a prompt with something hidden among background sentences, and an answer to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.data import Tokenizer
from titans.evaluation.reading import answer
from titans.evaluation.task import IGNORED, NotMeasurable, Record, depth_of, mean_score

DRAWS = 50
Part = tuple[list[int], bool]  # token ids, and whether they are an answer


@dataclass(frozen=True)
class Draft:
    """A sample before its length is known.

    Args:
        compose: background sentences -> the whole prompt.
        background: sentences without end.
        joiner: what stands between two sentences.
        answer: the right answer.
        question: what is asked, for metrics that look at it.
        further: more questions about the same text, as they follow the answer before, and their answers.
    """

    compose: Callable[[Sequence[str]], str]
    background: Iterator[str]
    joiner: str
    answer: str
    question: str = ""
    further: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TextSample:
    """A finished sample.

    Args:
        ids: the prompt's tokens, int64 [T].
        answer, question: as in its draft.
        depth: where the needle was asked to be, as a share of the background; None where there is no one needle.
    """

    ids: np.ndarray
    answer: str
    question: str
    depth: float | None


class TextTask(ABC):
    """Base of the tasks that are scored by what a model says."""

    name: str
    unit = "accuracy"
    note: str
    max_new_tokens: int

    @abstractmethod
    def draft(self, random: Random, depth: float, questions: int = 1) -> Draft:
        """Draw a sample with up to so many questions; all randomness comes from ``random``."""

    @abstractmethod
    def score(self, sample: TextSample, output: str) -> float:
        """What an output is worth, in [0, 1]."""

    @abstractmethod
    def settled(self, sample: TextSample, output: str) -> bool:
        """Whether nothing that may follow ``output`` changes its score."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""

    has_depth = False

    def sample(self, tokenizer: Tokenizer, length: int, random: Random, depth: float) -> TextSample:
        """The longest prompt that fits.

        Args:
            tokenizer: counts the tokens of the whole prompt.
            length: most tokens.
            random: a draw that is too long even without background is drawn again from it, so that short lengths have
                the shorter stories.
            depth: in [0, 1].

        Raises:
            NotMeasurable: nothing fits.
        """
        draft, ids, _ = self._fitting(tokenizer, length, lambda: (self.draft(random, depth), []))
        return TextSample(ids, draft.answer, draft.question, depth if self.has_depth else None)

    def _fitting(
        self, tokenizer: Tokenizer, length: int, draw: Callable[[], tuple[Draft, list[Part]]]
    ) -> tuple[Draft, np.ndarray, list[Part]]:
        """The first draft that fits into ``length`` tokens with what goes around its prompt, the prompt, and that."""
        least = None
        for _ in range(DRAWS):
            draft, around = draw()
            taken = sum(len(part) for part, _ in around)
            ids = fit(draft, tokenizer, length - taken)
            if isinstance(ids, np.ndarray):
                return draft, ids, around
            least = min(ids + taken, least or ids + taken)
        raise NotMeasurable(f"{length} tokens are too few, a sample takes about {least}")

    def samples(
        self, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[TextSample]:
        """Samples ``indices`` of a cell."""
        draws = ((Random(f"{self.name} {length} {seed} {i}"), depth_of(i, samples)) for i in indices)
        return [self.sample(tokenizer, length, random, depth) for random, depth in draws]

    def count(self, tokenizer: Tokenizer, length: int, samples: int) -> int:
        """As `titans.evaluation.task.Task`."""
        return samples

    def measure(
        self, model: Any, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[Record]:
        """As `titans.evaluation.task.Task`: each record holds the answer, the output and its score."""
        asked = self.samples(tokenizer, length, indices, samples, seed)
        prompts = [sample.ids for sample in asked]
        outputs, state_bytes = answer(
            model, tokenizer, prompts, self.max_new_tokens, lambda row, text: self.settled(asked[row], text)
        )
        return [
            {
                "index": index,
                "depth": sample.depth,
                "tokens": len(sample.ids),
                "state_bytes": state_bytes,
                "answer": sample.answer,
                "output": output,
                "score": self.score(sample, output),
            }
            for index, sample, output in zip(indices, asked, outputs, strict=True)
        ]

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return mean_score(records)

    def answer_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """What a model should say: a space, the answer, and the separator, at which decoding ends."""
        return [*tokenizer.encode(f" {text}"), tokenizer.separator_id]

    def training_row(
        self, tokenizer: Tokenizer, length: int, random: Random, questions: int = 1, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `titans.evaluation.task.Task`: a prompt, its answer, and further questions, each with its answer."""
        first = [tokenizer.separator_id] * random.randrange(2)  # a text that is memorized begins with it

        def draw() -> tuple[Draft, list[Part]]:
            draft = self.draft(random, random.random(), random.randint(1, questions))
            return draft, [(first, False), *self._said(draft, tokenizer)]

        _, prompt, (begun, *said_after) = self._fitting(tokenizer, length, draw)
        parts = [begun, (prompt.tolist(), False), *said_after]
        ids = torch.tensor([token for part, _ in parts for token in part])
        said = torch.tensor([asked or dense for part, asked in parts for _ in part])
        rest = (0, length - len(ids))
        labels = F.pad(ids.masked_fill(~said, IGNORED), rest, value=IGNORED)
        return F.pad(ids, rest, value=tokenizer.separator_id), labels

    def _said(self, draft: Draft, tokenizer: Tokenizer) -> list[Part]:
        """What follows a draft's prompt."""
        found = [(self.answer_ids(tokenizer, draft.answer), True)]
        for question, said in draft.further:
            found += [(tokenizer.encode(question), False), (self.answer_ids(tokenizer, said), True)]
        return found


def fit(draft: Draft, tokenizer: Tokenizer, limit: int) -> np.ndarray | int:
    """The prompt with as many background sentences as ``limit`` tokens hold; how many it needs where not even the bare
    one fits.

    The whole prompt is tokenised, as a user's would be. Sentences are first counted one by one, which for merging
    tokenizers says a little too much or too little; the rounds that follow correct it.
    """
    ids = _encode(tokenizer, draft.compose([]))
    if len(ids) > limit:
        return len(ids)
    chosen: list[str] = []
    counted: dict[str, int] = {}

    def cost(sentence: str) -> int:
        if sentence not in counted:
            counted[sentence] = len(tokenizer.encode(draft.joiner + sentence))
        return counted[sentence]

    following = next(draft.background)
    while True:
        room, before = limit - len(ids), len(chosen)
        while cost(following) <= room:
            room -= max(1, cost(following))
            chosen.append(following)
            following = next(draft.background)
        if len(chosen) == before:
            return ids
        ids = _encode(tokenizer, draft.compose(chosen))
        if len(ids) > limit:
            break
    while len(ids) > limit:
        excess = len(ids) - limit
        while excess > 0:
            excess -= max(1, cost(chosen.pop()))
        ids = _encode(tokenizer, draft.compose(chosen))
    return ids


def interleave(background: Sequence[str], placed: Sequence[tuple[float, str]]) -> list[str]:
    """Background sentences with others put between them.

    Args:
        background: sentences in order.
        placed: depth and text; each text goes into the gap nearest to that share of the background's characters, those
            of one gap in the order given.
    """
    ends = [0, *accumulate(map(len, background))]
    gaps: list[list[str]] = [[] for _ in ends]
    for depth, text in placed:
        wanted = depth * ends[-1]
        gap = bisect_left(ends, wanted)
        if gap and wanted - ends[gap - 1] < ends[gap] - wanted:
            gap -= 1
        gaps[gap].append(text)
    return [text for gap, after in zip(gaps, [*([s] for s in background), []], strict=True) for text in (*gap, *after)]


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode_array(text).astype(np.int64)
