"""Evaluation on from a memory: every sample finds what a memory file remembers; and a user's own questions to it."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titans.data import Tokenizer
from titans.data.corpora import not_utf8
from titans.evaluation.reading import MOST_ROWS, answer
from titans.evaluation.task import EvaluationError
from titans.files import hash_tensors
from titans.models import ModelState, TitansModel
from titans.names import path_of
from titans.state import encode

ANSWERS, ANSWERS_TABLE = "questions.json", "questions.md"
COLUMNS = {
    "on": "the memory as it is",
    "reset": "memories back at their first weights; attention, convolutions and positions go on",
    "off": "nothing read",
}


class FromMemory:
    """A model whose every new stream has read what ``memory`` remembers; else the model itself.

    Args:
        model: whose memory it is.
        memory: of one row.
    """

    def __init__(self, model: TitansModel, memory: ModelState):
        self.model, self.memory = model, memory

    @property
    def memory_digest(self) -> str:
        """Tells one memory from another."""
        tensors: dict[str, Any] = {}
        encode(self.memory, tensors)
        return hash_tensors(tensors, {})[:16]

    def __call__(self, input_ids: Any, *, state: ModelState | None = None, **arguments: Any) -> Any:
        state = self.memory.fork(len(input_ids)) if state is None else state
        return self.model(input_ids, state=state, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def read_questions(path: str | Path) -> list[tuple[str, str]]:
    """Questions and answers of a ``.jsonl`` file, a line ``{"question": …, "answer": …}`` each.

    Raises:
        EvaluationError: a line is something else, or there is none, or the file is not UTF-8.
    """
    content, found = path_of("path", path).read_bytes(), []
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"questions: {path}: {not_utf8(len(content) - len(error.object) + error.start)}"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, right = row["question"], row["answer"]
            if not isinstance(question, str) or not isinstance(right, str) or not question or not right:
                raise TypeError
            f"{question}{right}".encode()  # a ValueError for half a character, which no file or model can hold
        except (ValueError, KeyError, TypeError, RecursionError):
            raise EvaluationError(
                f'questions: {path}, line {number} is not {{"question": "…", "answer": "…"}}'
            ) from None
        found.append((question, right))
    if not found:
        raise EvaluationError(f"questions: {path} holds none")
    return found


def check_answers(folder: Path) -> None:
    """Raise an EvaluationError where files that hold no earlier answers would be replaced by answers."""
    there = [folder / name for name in (ANSWERS, ANSWERS_TABLE) if os.path.lexists(folder / name)]
    try:
        told = json.loads((folder / ANSWERS).read_text(encoding="utf-8")) if there else {}
        ours = not there or set(told) >= {"accuracy", "columns", "questions"}
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise EvaluationError(f"output: {there[0]} is there, and is not ours to replace; choose another output")


def ask_questions(
    model: TitansModel,
    tokenizer: Tokenizer,
    memory: ModelState,
    questions: Sequence[tuple[str, str]],
    template: str = "\n{}",
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """What a memory answers to each question, greedily, by itself; right where the answer occurs in what is said.

    Args:
        model, tokenizer: whose memory it is.
        memory: of one row; every question is forked from it.
        questions: with the right answers.
        template: what is read for a question, ``{}`` in its place.
        max_new_tokens: longest answer.

    Returns:
        ``accuracy`` with the memory "on", "reset" and "off" (`COLUMNS`), and ``questions`` with what was said.

    Raises:
        EvaluationError: no questions, one of less than 2 tokens, or a template that no question goes into.
    """
    if "{}" not in template:
        raise EvaluationError(f"template: needs {{}} where the question goes, got {template!r}")
    if not questions:
        raise EvaluationError("questions: none given")
    prompts = [
        np.array(tokenizer.encode(template.replace("{}", question)), dtype=np.int64) for question, _ in questions
    ]
    if min(map(len, prompts)) < 2:
        raise EvaluationError("questions: each must be at least 2 tokens long")
    models = {"on": FromMemory(model, memory), "reset": FromMemory(model, memory.forget()), "off": model}
    said: dict[str, list[str]] = {}
    for column, asked in models.items():
        said[column] = []
        for at in range(0, len(prompts), MOST_ROWS):
            rights = [right for _, right in questions[at : at + MOST_ROWS]]
            outputs, _ = answer(
                asked, tokenizer, prompts[at : at + MOST_ROWS], max_new_tokens,
                lambda row, text, rights=rights: _right(rights[row], text),
            )  # fmt: skip
            said[column] += outputs
    rows = []
    for number, (question, right) in enumerate(questions):
        rows.append({"question": question, "answer": right, **{column: told[number] for column, told in said.items()}})
    accuracy = {c: sum(_right(row["answer"], row[c]) for row in rows) / len(rows) for c in COLUMNS}
    return {"accuracy": accuracy, "columns": COLUMNS, "tokens_read": memory.seen[0], "questions": rows}


def questions_table(results: dict[str, Any]) -> str:
    """Markdown: a line a question, and the share of right answers."""
    lines = ["| question | answer | memory on | reset | off |", "|---|---|---|---|---|"]
    for row in results["questions"]:
        cells = [row["question"], row["answer"], *(_mark(row["answer"], row[c]) for c in COLUMNS)]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    shares = " | ".join(f"{results['accuracy'][c]:.1%}" for c in COLUMNS)
    return "\n".join([*lines, f"| right, of {len(results['questions'])} | | {shares} |"]) + "\n"


def _right(answer: str, output: str) -> bool:
    return answer.lower() in output.lower()


def _mark(answer: str, output: str) -> str:
    shown = " ".join(output.split())
    return ("✓ " if _right(answer, output) else "✗ ") + (shown if len(shown) <= 40 else shown[:39] + "…")
