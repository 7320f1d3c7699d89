"""Does ``titans memorize`` hold its memory and its speed? Resident bytes over the reading, and tokens per second
against the model called on ready-made pieces of the same length, turn about and in processor time.

What the C library keeps of freed memory goes up and down by some megabytes at any length of text. ``peak`` is with it,
``held`` without: now and then it is made to give everything back, just before a look.

``python benchmarks/memorize.py --model runs/mac/model --megabytes 100``
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from titans.data import load_documents
from titans.models import load_model
from titans.models.memorize import piece_length
from titans.reading import Job, Progress, memorize_files
from titans.training.data import load_saved_tokenizer


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])


class Watch:
    """Looks after every piece; every ``every``-th time it also reads a ready-made piece of ids with the bare model, and
    some twenty times of ``tokens`` it has freed memory given back and looks again."""

    def __init__(self, model, every: int, tokens: int):
        self.model, self.every = model, every
        self.give_back = max(1, tokens // piece_length(model) // every // 20) * every
        ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, piece_length(model)))
        self.ids, self.state = torch.from_numpy(ids), None
        self.bytes: list[int] = []
        self.held: list[int] = []
        self.own = [0, 0.0]  # tokens, seconds of the bare model
        self.aside = 0.0

    @torch.no_grad()
    def tell(self, progress: Progress) -> None:
        self.bytes.append(resident())
        if len(self.bytes) % self.every == 0:
            begun = time.process_time()
            self.state = self.model(self.ids, state=self.state, logits_to_keep=1).state
            seconds = time.process_time() - begun
            self.own[0] += self.ids.shape[1]
            self.own[1] += seconds
            if len(self.bytes) % self.give_back == 0:
                ctypes.CDLL(None).malloc_trim(0)
                self.held.append(resident())
            self.aside += time.process_time() - begun


def by_tenths(series: list[int]) -> list[int]:
    """The greatest of each tenth."""
    return [int(part.max()) for part in np.array_split(series, 10) if part.size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--warm-up", type=float, default=0.1, help="share of the pieces that is left out")
    parser.add_argument("--save-every", type=float, default=30, help="seconds")
    parser.add_argument("--every", type=int, default=4, help="pieces between two looks at the bare model")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model).eval(), load_saved_tokenizer(given.model)
    with TemporaryDirectory() as folder:
        text = "\n".join(load_documents("stdlib", "validation")).encode()
        size, source = round(given.megabytes * 1e6), Path(folder) / "text.txt"
        with source.open("wb") as file:
            for at in range(0, size, len(text)):
                file.write(text[: size - at])
        del text
        watch = Watch(model, given.every, size)
        begun = time.process_time()
        job = Job((str(source),), Path(folder) / "memory", save_every=given.save_every)
        file = memorize_files(model, tokenizer, job, watch.tell)
        seconds = time.process_time() - begun - watch.aside
    settled = watch.held[int(given.warm_up * len(watch.held)) :]
    rate, own = file.tokens / seconds, watch.own[0] / watch.own[1]
    told = {
        "tokens": file.tokens,
        "pieces": len(watch.bytes),
        "held_after_warm_up": [min(settled), max(settled)],
        "held_by_tenths": by_tenths(watch.held),
        "peak_by_tenths": by_tenths(watch.bytes),
        "spread": round(max(settled) / min(settled) - 1, 5),
        "tokens_per_second": round(rate),
        "engine_tokens_per_second": round(own),
        "share": round(rate / own, 3),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
