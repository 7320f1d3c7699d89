"""Perplexity and bits per byte of running text by position, with the memory on, reset or off.

A sample is a window of the text's validation split, read as a stream from a fresh state; windows do not overlap, so the
stride is the length, and the token at position t is predicted from exactly t tokens. For every window::

    position     0-128   128-512   512-2048   2048-8192   ...
    memory on     6.02      4.90       4.71        4.68        what the model is
    memory reset  6.02      4.93       4.86        4.87        put back to its first weights at every segment
    memory off    6.02      5.11       5.08        5.09        never written

Perplexity is exp(mean nats of a token) and depends on the tokenizer; bits per byte do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import torch
from torch import Tensor

from titans.data import EvaluationWindows, TokenDocuments, Tokenizer, WindowDataset, evaluation_windows
from titans.evaluation.perplexity import MemoryMode, nats_of_rows
from titans.evaluation.reading import READ_AT_ONCE, device_of
from titans.evaluation.running_text import RunningText
from titans.evaluation.task import NotMeasurable, Record

MOST_LOGITS = 2**26
"""Of a call: half a gigabyte in the float64 that losses are taken in."""


class Perplexity:
    """The task ``ppl``.

    Args:
        text: the split that is read.
    """

    name = "ppl"
    unit = "bits per byte"

    def __init__(self, text: RunningText):
        self.text = text
        self.note = (
            f"text: {text.name}; windows do not overlap (stride = length), each from a fresh state; "
            "memory reset at every segment of the model"
        )
        self._documents: dict[int, TokenDocuments] = {}

    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return {"text": self.text.name, "text_digest": self.text.digest}

    def count(self, tokenizer: Tokenizer, length: int, samples: int) -> int:
        """As `titans.evaluation.task.Task`: the text may have fewer windows."""
        return len(self._windows(tokenizer, length, samples))

    def measure(
        self, model: Any, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[Record]:
        """As `titans.evaluation.task.Task`: total nats in every range of positions for every memory mode.

        The windows are spread evenly over the text and do not depend on the seed.
        """
        documents = self.documents(tokenizer)
        windows = self._windows(tokenizer, length, samples)
        ids = torch.stack([windows[i]["input_ids"] for i in indices]).to(device_of(model))
        modes = get_args(MemoryMode) if model.config.has_memory else ("on",)
        found: dict[str, list[list[float]]] = {}
        state_bytes = 0
        for mode in modes:
            segment = model.config.segment
            if mode != "reset":  # only there it decides more than the memory needed
                segment *= max(1, min(READ_AT_ONCE, MOST_LOGITS // model.config.vocab_size) // len(ids) // segment)
            nats, held = nats_of_rows(model, ids, segment=segment, memory=mode)
            parts = [nats[:, begin:end].sum(1) for begin, end in ranges(length)]
            found[mode] = torch.stack(parts, 1).tolist()
            state_bytes = held if mode == "on" else state_bytes
        told: dict[str, Any] = {"tokens": length, "state_bytes": state_bytes}
        told["bytes_per_token"] = documents.bytes_per_token
        return [
            {"index": index, **told, "nats": {mode: rows[row] for mode, rows in found.items()}}
            for row, index in enumerate(indices)
        ]

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`: both figures for every memory mode, over all and by position."""
        length, bytes_per_token = records[0]["tokens"], records[0]["bytes_per_token"]
        spans = ranges(length)
        totals = {mode: torch.tensor([r["nats"][mode] for r in records]).sum(0) for mode in records[0]["nats"]}
        whole = {mode: nats.sum().item() / len(records) / (length - 1) for mode, nats in totals.items()}
        figures: dict[str, Any] = {
            "score": whole["on"] / math.log(2) / bytes_per_token,
            "stride": length,
            "memory": {mode: _figures(nats, bytes_per_token) for mode, nats in whole.items()},
            "by_position": {},
        }
        for place, (begin, end) in enumerate(spans):
            means = {mode: nats[place].item() / len(records) / (end - begin) for mode, nats in totals.items()}
            row = {mode: _figures(nats, bytes_per_token) for mode, nats in means.items()}
            figures["by_position"][f"{begin}-{end}"] = row
        return figures

    def training_row(
        self, tokenizer: Tokenizer, length: int, random: Random, questions: int = 1, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `titans.evaluation.task.Task`: a random window; its labels are always dense."""
        window = WindowDataset(self.documents(tokenizer), length, random.getrandbits(62), 1)[0]
        return window["input_ids"], window["input_ids"].clone()

    def _windows(self, tokenizer: Tokenizer, length: int, samples: int) -> EvaluationWindows:
        try:
            return evaluation_windows(self.documents(tokenizer), length, samples)
        except ValueError as error:
            raise NotMeasurable(str(error)) from error

    def documents(self, tokenizer: Tokenizer) -> TokenDocuments:
        """The text in a tokenizer's ids."""
        if id(tokenizer) not in self._documents:
            self._documents = {id(tokenizer): TokenDocuments.from_texts(self.text.documents, tokenizer)}
        return self._documents[id(tokenizer)]


def ranges(length: int) -> list[tuple[int, int]]:
    """Ranges of predictions 0 … length - 2, ending at 128, 512, 2048, … and at the end."""
    ends = [128]
    while ends[-1] < length - 1:
        ends.append(4 * ends[-1])
    ends[-1] = length - 1
    return list(zip([0, *ends], ends))


def _figures(nats: float, bytes_per_token: float) -> dict[str, float]:
    return {"bits_per_byte": nats / math.log(2) / bytes_per_token, "perplexity": math.exp(min(nats, 700.0))}
