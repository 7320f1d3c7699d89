"""The tasks by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data import Tokenizer
from titans.evaluation.babilong import Babilong, PublishedBabilong
from titans.evaluation.mqar import Mqar
from titans.evaluation.niah import SETTINGS, Niah
from titans.evaluation.ppl import Perplexity
from titans.evaluation.running_text import running_text, stamps
from titans.evaluation.task import IGNORED, EvaluationError, Task
from titans.evaluation.worlds import STORIES
from titans.names import check_kind, suggestion

GROUPS: dict[str, tuple[str, ...]] = {
    "niah": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "niah_multikey": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "babilong": tuple(f"babilong_{world}" for world in STORIES),
    "babilong_published": tuple(f"babilong_published_{world}" for world in STORIES),
    "mqar": ("mqar_zoology", "mqar_easy"),
    "ppl": ("ppl",),
}
"""What may be asked for, and the tasks that it stands for; each of these may be asked for by itself."""

TASKS = tuple(name for names in GROUPS.values() for name in names)


def make_task(name: str, text: str = "stdlib", split: str = "validation") -> Task:
    """A task by its name.

    Args:
        name: one of ``TASKS``.
        text: running text for haystacks, background and perplexity, as `running_text`.
        split: of the running text.

    Raises:
        EvaluationError: unknown name, or something that the task needs is missing.
    """
    if name not in TASKS:
        known = [*GROUPS, *TASKS]
        raise EvaluationError(f"tasks: {name!r} is none of {', '.join(known)}{suggestion(name, known)}")
    if name in SETTINGS:
        return Niah(name, running_text(text, split) if SETTINGS[name].haystack == "text" else None)
    if name.startswith("mqar"):
        return Mqar(name)
    if name in GROUPS["babilong_published"]:
        return PublishedBabilong(name)
    return (Perplexity if name == "ppl" else lambda text: Babilong(name, text))(running_text(text, split))


def make_tasks(names: Sequence[str], text: str = "stdlib") -> list[Task]:
    """The tasks that names of tasks and groups stand for, each once."""
    if not names:
        raise EvaluationError(f"tasks: none given, expected some of {', '.join([*GROUPS, *TASKS])}")
    single = dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,)))
    return [make_task(name, text) for name in single]


def training_batch(
    task: str,
    tokenizer: Tokenizer,
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    text: str = "stdlib",
    questions: int = 1,
    dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """A batch to train on, from the generator that evaluation draws its samples from.

    Args:
        task: one of ``TASKS``. The running text is its training split.
        tokenizer: the model's.
        batch: rows B, ≥ 1.
        length: tokens T of a row, answer included; shorter rows are filled up with the separator.
        generator: source of all randomness; evaluation never draws the same samples.
        text: running text, as `titans.evaluation.running_text.running_text`.
        questions: most questions that a row of a needle or a story asks, one after the other; each row draws how many.
            They make training much shorter.
        dense: label every token instead of the answers only. ``ppl`` is dense in any case.

    Returns:
        ``ids`` and ``labels``, int64 [B, T], on the CPU; labels are the same ids, which the model shifts, and -100
        where nothing is asked. MQAR's labels are the values instead, which do not occur in its ids.

    Raises:
        EvaluationError: an argument is out of its range, a sample does not fit into ``length``, or the task cannot be
            trained on.
    """
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    for name, value in (("batch", batch), ("length", length), ("questions", questions)):
        check_kind(name, value, int, "an integer")
        if value < 1:
            raise EvaluationError(f"{name}: must be at least 1, got {value}")
    made = _task(task, text, "train", stamps(text))
    seeds = torch.randint(2**62, (batch,), generator=generator, device=generator.device)
    rows = [made.training_row(tokenizer, length, Random(seed), questions, dense) for seed in seeds.tolist()]
    ids, labels = (torch.stack(x) for x in zip(*rows, strict=True))
    return ids, labels


@lru_cache(maxsize=8)
def _task(name: str, text: str, split: str, stamps: tuple[tuple[str, int, int], ...]) -> Task:
    return make_task(name, text, split)


class TaskRows(Dataset[dict[str, Tensor]]):
    """Rows of several tasks to train on or to validate with, each a function of ``(seed, index)`` alone.

    Args:
        tasks: names of ``TASKS``, and the share of the rows that each has (they need not sum to 1).
        tokenizer: the model's.
        length: tokens of a row.
        n_rows: how many there are.
        seed: of all randomness.
        text: running text, as in `training_batch`.
        split: "train", or "validation" for its other half.
        questions: as in `training_batch`.

    Each item is ``{"input_ids", "labels", "bytes"}``: int64 ``[length]`` each, and the bytes of what is asked.

    Raises:
        EvaluationError: as `training_batch`; a share that is not positive and finite; no tasks.
    """

    def __init__(
        self,
        tasks: Mapping[str, float],
        tokenizer: Tokenizer,
        length: int,
        n_rows: int,
        seed: int = 0,
        *,
        text: str = "stdlib",
        split: str = "train",
        questions: int = 1,
    ):
        for name, share in tasks.items():
            if not 0 < share < math.inf:
                raise EvaluationError(f"tasks: the share of {name} must be positive, got {share}")
        if not tasks:
            raise EvaluationError("tasks: none given")
        self.tasks = [_task(name, text, split, stamps(text)) for name in tasks]
        self.shares = list(tasks.values())
        self.tokenizer, self.length, self.n_rows, self.seed = tokenizer, length, n_rows, seed
        self.split, self.questions = split, questions
        for task in self.tasks:  # what does not fit is told now
            task.training_row(tokenizer, length, Random(0), questions)

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.n_rows:
            raise IndexError(f"index: {index} is outside [0, {self.n_rows})")
        random = Random(f"{self.split} {self.seed} {index}")
        (task,) = random.choices(self.tasks, self.shares)
        ids, labels = task.training_row(self.tokenizer, self.length, random, self.questions)
        asked = self.tokenizer.decode(labels[labels != IGNORED].tolist())
        return {"input_ids": ids, "labels": labels, "bytes": torch.tensor(len(asked.encode()))}

    @property
    def fingerprint(self) -> str:
        """A hash of what the rows are drawn from."""
        drawn = [(task.name, share, task.settings()) for task, share in zip(self.tasks, self.shares, strict=True)]
        told = [drawn, self.questions, self.split, self[0]["input_ids"].tolist()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
