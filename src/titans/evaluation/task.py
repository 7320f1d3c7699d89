"""What a task is, and the errors with which it declines."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from titans.data import Tokenizer

Record = dict[str, Any]
IGNORED = -100


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked; the message names the argument and the value."""


class NotMeasurable(EvaluationError):
    """This task has no samples at this length or for this model; other cells may have."""


class Task(Protocol):
    """One column of an evaluation: samples from a seed, and what a model makes of them."""

    name: str
    unit: str
    """What ``summary``'s ``score`` counts, such as "accuracy"."""
    note: str
    """What the figures can be compared with; shown in every table."""

    def settings(self) -> dict[str, Any]:
        """What the samples depend on beside seed and length, as JSON."""
        ...

    def count(self, tokenizer: Tokenizer, length: int, samples: int) -> int:
        """How many samples there are when so many are asked for.

        Raises:
            NotMeasurable: none.
        """
        ...

    def measure(
        self, model: Any, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[Record]:
        """A JSON record for each of the samples ``indices``, the same in whatever groups they are asked for.

        Args:
            model: a TitansModel, or what can be called like one.
            tokenizer: the model's.
            length: tokens of a sample, never more.
            indices: which samples, each in ``[0, samples)``.
            samples: how many the whole cell has.
            seed: of all randomness.

        Raises:
            NotMeasurable: there is no such sample.
        """
        ...

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """The figures of a cell."""
        ...

    def training_row(
        self, tokenizer: Tokenizer, length: int, random: Random, questions: int = 1, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A row of `titans.evaluation.training_batch`: ids and labels, int64 ``[length]``."""
        ...


def shown_length(length: int) -> str:
    """1024 as 1k, 2^20 as 1m, others as they are."""
    for unit, sign in ((2**20, "m"), (2**10, "k")):
        if length % unit == 0:
            return f"{length // unit}{sign}"
    return str(length)


def depth_of(index: int, samples: int, depths: int = 11) -> float:
    """Where in the text a sample's needle lies, as a share of it: the samples go round evenly spaced depths."""
    depths = min(depths, samples)
    return 0.5 if depths == 1 else index % depths / (depths - 1)


def mean_score(records: Sequence[Record]) -> dict[str, Any]:
    """Mean score with its standard error, and the mean score at every depth where records have one."""
    scores = torch.tensor([float(record["score"]) for record in records], dtype=torch.float64)
    figures: dict[str, Any] = {"score": scores.mean().item()}
    if len(records) > 1:
        figures["standard_error"] = (scores.std() / len(records) ** 0.5).item()
    depths = sorted({record["depth"] for record in records if record.get("depth") is not None})
    if depths:
        at = {depth: [r["score"] for r in records if r["depth"] == depth] for depth in depths}
        figures["by_depth"] = {f"{depth:.3f}": sum(found) / len(found) for depth, found in at.items()}
    return figures
