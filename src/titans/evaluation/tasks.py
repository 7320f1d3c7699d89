"""The tasks by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from titans.data import Tokenizer
from titans.evaluation.babilong import Babilong, PublishedBabilong
from titans.evaluation.mqar import Mqar
from titans.evaluation.niah import SETTINGS, Niah
from titans.evaluation.ppl import Perplexity
from titans.evaluation.running_text import running_text
from titans.evaluation.task import EvaluationError, Task
from titans.evaluation.worlds import STORIES
from titans.names import suggestion

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
        dense: label every token instead of the answers only. ``ppl`` is dense in any case.

    Returns:
        ``ids`` and ``labels``, int64 [B, T], on the CPU; labels are the same ids, which the model shifts, and -100
        where nothing is asked. MQAR's labels are the values instead, which do not occur in its ids.

    Raises:
        EvaluationError: an argument is out of its range, a sample does not fit into ``length``, or the task cannot be
            trained on.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise EvaluationError(f"{name}: must be at least 1, got {value}")
    return _training_task(task, text).training_batch(tokenizer, batch, length, generator, dense)


@lru_cache(maxsize=8)
def _training_task(name: str, text: str) -> Task:
    return make_task(name, text, "train")
