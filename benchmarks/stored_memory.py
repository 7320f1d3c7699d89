"""What rounding a memory file costs: recall and bits per byte after float32, bfloat16 and int8.

Recall: each sample is read but for its last tokens, the memory is written to a file of the dtype, read again, and
answers. Bits per byte: windows of running text are read half, written, read again, and their second half is scored.
``python benchmarks/stored_memory.py --model runs/mac/model --tasks niah_single_1,niah_single_2 --lengths 4k``
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from titans.data import evaluation_windows
from titans.evaluation.reading import read
from titans.evaluation.tasks import make_task
from titans.models import ModelState, load_model
from titans.models.stored import Dtype
from titans.training.data import load_saved_tokenizer


class Stored:
    """A model whose state goes through a file of ``dtype`` before it answers."""

    def __init__(self, model: Any, dtype: Dtype, folder: Path):
        self.model, self.dtype, self.file, self.bytes = model, dtype, folder / dtype, 0

    def round(self, state: ModelState) -> ModelState:
        """What is left of a state after its file."""
        state.save(self.file, self.dtype)
        self.bytes = self.file.stat().st_size // state.rows
        return ModelState.load(self.file).to(self.model.embedding.weight.device)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def stream(self, prompt: Any, *, state: ModelState, **named: Any) -> Any:
        return self.model.stream(prompt, state=self.round(state), **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def recall(stored: Stored, tokenizer: Any, name: str, length: int, samples: int) -> float:
    """Share of right answers."""
    task, records, rows = make_task(name), [], max(1, min(16, 2**16 // length))
    for at in range(0, samples, rows):
        indices = range(at, min(at + rows, samples))
        records += task.measure(stored, tokenizer, length, indices, samples, seed=0)
    return task.summary(records)["score"]


@torch.no_grad()
def bits_per_byte(stored: Stored, tokenizer: Any, length: int, samples: int) -> float:
    """Of the second halves of windows, after their first halves went through a file."""
    documents = make_task("ppl").documents(tokenizer)  # type: ignore[attr-defined]
    windows = evaluation_windows(documents, length, samples)
    nats, tokens = 0.0, 0
    for item in (windows[i] for i in range(len(windows))):
        ids, half = item["input_ids"][None], length // 2
        state = stored.round(read(stored, ids[:, :half]))
        logits = stored.model(ids[:, half:], state=state).logits[:, :-1]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, half + 1 :], reduction="sum").item()
        tokens += length - half - 1
    return nats / math.log(2) / tokens / documents.bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", default="niah_single_1,niah_single_2")
    parser.add_argument("--lengths", default="4k", help="such as 1k,4k,16k")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--text-samples", type=int, default=16, help="windows of running text")
    parser.add_argument("--output", help="also write the figures as JSON")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model).eval(), load_saved_tokenizer(given.model)
    lengths = [
        int(word.lower().replace("k", "")) * (1024 if "k" in word.lower() else 1) for word in given.lengths.split(",")
    ]
    found = []
    print("length  dtype     bytes/stream  bits per byte  " + "  ".join(given.tasks.split(",")))
    with TemporaryDirectory() as folder:
        for length in lengths:
            for dtype in get_args(Dtype):
                stored = Stored(model, dtype, Path(folder))
                shares = {
                    name: recall(stored, tokenizer, name, length, given.samples)
                    for name in given.tasks.split(",")
                    if name
                }
                bits = bits_per_byte(stored, tokenizer, length, given.text_samples)
                row = {"length": length, "dtype": dtype, "bytes": stored.bytes, "bits_per_byte": bits, "recall": shares}
                found.append(row)
                told = "  ".join(f"{share:{len(name)}.1%}" for name, share in shares.items())
                print(f"{length:6}  {dtype:8}  {stored.bytes:12,}  {bits:13.4f}  {told}", flush=True)
    if given.output:
        Path(given.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
