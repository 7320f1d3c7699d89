"""An evaluation: every task at every length, cell by cell; what is finished is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans.data import ByteTokenizer, Tokenizer
from titans.evaluation.reading import rows_at_once
from titans.evaluation.task import EvaluationError, NotMeasurable, Record, Task
from titans.evaluation.tasks import make_tasks
from titans.files import bytes_of, check_ours, write_whole
from titans.names import check_kind, path_of

NEEDED = {"tokens", "state_bytes", "seconds"}  # of every task's records


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    Args:
        task, length: which.
        settings: everything that its records depend on, as JSON.
        file: where its records are kept; None to keep none.
        records: those of samples that are finished, from the first on.
    """

    task: Task
    length: int
    settings: dict[str, Any]
    file: Path | None
    records: list[Record]


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 25,
    seed: int = 0,
    output: str | Path | None = None,
    *,
    text: str = "stdlib",
    say: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Measure a model on tasks of the field.

    Args:
        model: a TitansModel on any device; it is read in evaluation mode and left as it was.
        tokenizer: the model's.
        tasks: names of tasks or groups: "niah", "niah_multikey", "babilong", "babilong_published", "mqar", "ppl", or
            single ones such as "niah_single_1".
        lengths: tokens of a sample; a sample is as long as fits, never longer.
        samples: how many of each task at each length, ≥ 1.
        seed: of all samples.
        output: folder for results.json, table.md, heatmap.png and ``cells/``, from which a broken run goes on.
        text: running text for haystacks, background and perplexity: "stdlib", "essays", a file or a folder.
        say: is told about every finished cell.

    Returns:
        What results.json holds: ``settings`` and ``cells``, each with its figures or with ``skipped`` and why.

    Raises:
        EvaluationError: an argument is wrong, something that a task needs is missing, the output folder holds cells of
            other settings or files of somebody else (named), or no cell can be measured.
    """
    check_kind("lengths", lengths, Sequence, "a list of integers")
    for name, number in (("samples", samples), ("seed", seed), *(("lengths", length) for length in lengths)):
        check_kind(name, number, int, "an integer")
    if not callable(model) or not hasattr(model, "state_dict"):  # something may stand for a model, such as `FromMemory`
        raise EvaluationError(f"model must be a model, got {type(model).__name__}")
    check_kind("text", text, (str, Path), "the name of a text or a path")
    if not hasattr(tokenizer, "vocab_size"):
        raise EvaluationError(f"tokenizer must be a Tokenizer, got {type(tokenizer).__name__}")
    if samples < 1:
        raise EvaluationError(f"samples: must be at least 1, got {samples}")
    if not lengths or min(lengths) < 2:
        raise EvaluationError(f"lengths: each must be at least 2 tokens, got {', '.join(map(str, lengths)) or 'none'}")
    made = make_tasks(tasks, text)
    settings = {**_identity(model, tokenizer), "samples": samples, "seed": seed}
    folder = None
    if output is not None:
        try:
            folder = path_of("output", output)
            check_ours(folder, ("results.json", "table.md", "heatmap.png"), "cells")
        except ValueError as error:
            raise EvaluationError(str(error)) from error
    cells = [_open(task, length, settings, folder) for task in made for length in dict.fromkeys(lengths)]
    found = []
    was_training = model.training
    model.eval()
    try:
        for cell in cells:
            found.append(_measure(cell, model, tokenizer))
            if say is not None:
                say(told(found[-1]))
    finally:
        model.train(was_training)
    if all("skipped" in cell for cell in found):
        raise EvaluationError(f"lengths: no cell can be measured; {told(found[0])}")
    results = {
        "format": 1,
        "settings": {**settings, "text": text},
        "made_with": {"torch": torch.__version__, "device": str(next(model.parameters()).device)},
        "notes": {task.name: task.note for task in made},
        "cells": found,
    }
    if folder is not None:
        from titans.evaluation.report import write_report

        write_report(results, folder)
    return results


def told(cell: dict[str, Any]) -> str:
    """A cell in a line."""
    head = f"{cell['task']} at {cell['length']:,} tokens"
    if "skipped" in cell:
        return f"{head}: skipped, {cell['skipped']}"
    return f"{head}: {cell['score']:.4g} {cell['unit']} ({cell['samples']} samples, {cell['seconds']:.0f} s)"


def _open(task: Task, length: int, settings: dict[str, Any], folder: Path | None) -> Cell:
    """The cell with what is finished of it.

    Raises:
        EvaluationError: the folder's cell was made with other settings, or is no cell.
    """
    settings = {**settings, **task.settings()}
    if folder is None:
        return Cell(task, length, settings, None, [])
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"output: {folder} is a file")
    file = folder / "cells" / f"{task.name}-{length}.json"
    if not file.exists():
        return Cell(task, length, settings, file, [])
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        before, records = dict(kept["settings"]), list(kept["records"])
        if not all(isinstance(record, dict) and set(record) >= NEEDED for record in records):
            raise ValueError("its records are none")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluationError(f"output: {file} is no cell of an evaluation; choose another output") from error
    for name in dict.fromkeys([*settings, *before]):
        now, then = settings.get(name), before.get(name)
        if now != then:
            raise EvaluationError(f"{name}: now {now!r}, but {file} was made with {then!r}; choose another output")
    return Cell(task, length, settings, file, records)


def _measure(cell: Cell, model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The cell's figures; records are written after every group of samples."""
    told = {"task": cell.task.name, "length": cell.length, "unit": cell.task.unit}
    records, rows = list(cell.records), rows_at_once(cell.length)
    try:
        samples = cell.task.count(tokenizer, cell.length, cell.settings["samples"])
        while len(records) < samples:
            began = time.perf_counter()
            indices = range(len(records), min(len(records) + rows, samples))
            new = cell.task.measure(model, tokenizer, cell.length, indices, samples, cell.settings["seed"])
            seconds = (time.perf_counter() - began) / len(new)
            records += [{**record, "seconds": seconds} for record in new]
            if cell.file is not None:
                kept = {"settings": cell.settings, "records": records}
                write_whole(cell.file, lambda path, kept=kept: _write_json(path, kept))
    except NotMeasurable as error:
        return {**told, "skipped": str(error)}
    means = {name: sum(r[name] for r in records) / samples for name in ("tokens", "state_bytes")}
    seconds = round(sum(record["seconds"] for record in records), 2)
    return {**told, "samples": samples, "seconds": seconds, **means, **cell.task.summary(records)}


def _identity(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The model's configuration and weights and the tokenizer, each as a few characters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    config = getattr(model, "config", None)
    told = "" if config is None else json.dumps(config.to_dict(), sort_keys=True)
    kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else _tokenizer_digest(tokenizer)
    model_digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    identity = {"model": model_digest, "weights": digest.hexdigest()[:16], "tokenizer": kind}
    memory = getattr(model, "memory_digest", None)  # of a model whose streams begin with a memory
    return identity if memory is None else {**identity, "memory": memory}


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Tells tokenizers apart by what they make of a text with words, digits, signs and other scripts."""
    sample = "The special magic numbers for nasty-beret are 7294830; naïve café, Привет, 你好!\n\tdef f(x): return {x}"
    ids = json.dumps([tokenizer.vocab_size, tokenizer.separator_id, *map(int, tokenizer.encode(sample))])
    return f"{tokenizer.vocab_size} ids, {hashlib.sha256(ids.encode()).hexdigest()[:16]}"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
