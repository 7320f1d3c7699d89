"""What a training step costs against its length, width, depth and chunk: one setting changed at a time.

Processor time of one thread per token, forward with loss and backward, batch 1. All settings take turns in one process,
so that whatever else the machine does falls on all alike; "times" is the median, turn by turn, over the base.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import harness
import torch

from titans import TitansConfig, build_model

BASE = {"tokens": 1024, "d_model": 128, "n_layers": 2, "chunk_size": 64}
SWEEPS = {
    "tokens": (512, 2048, 4096, 8192), "d_model": (64, 256), "n_layers": (1, 4), "chunk_size": (16, 32, 128),
}  # fmt: skip


def make(variant: str, setting: dict[str, int]):
    """One step, and its tokens."""
    sizes = dict(setting)
    tokens = sizes.pop("tokens")
    torch.manual_seed(0)
    config = TitansConfig(variant=variant, vocab_size=256, segment_len=128, window=128, **sizes)
    model, ids = build_model(config), torch.randint(256, (1, tokens))

    def step() -> float:
        start = time.process_time()
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
        return (time.process_time() - start) / tokens

    return step


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    settings = [("base", "", BASE)]
    settings += [(name, f"{v:,}", {**BASE, name: v}) for name, values in SWEEPS.items() for v in values]
    records = []
    for variant in options.models:
        steps = [make(variant, setting) for _, _, setting in settings]
        for step in steps:
            step()
        turns = []
        for turn in range(options.rounds):
            turns.append([step() for step in steps])
            harness.note(f"{variant}: round {turn + 1} of {options.rounds}")
        for i, (name, value, _) in enumerate(settings):
            seconds = [t[i] for t in turns]
            times = median(t[i] / t[0] for t in turns)
            records.append({"model": variant, "what": name, "value": value, "seconds": seconds, "times": times})
    rows = [
        (f"{r['model']}, {r['what']} {r['value']}", f"{1e6 * median(r['seconds']):,.0f}", f"{r['times']:.2f}")
        for r in records
    ]
    print(harness.table(("", "µs per token", "times the base"), rows))
    harness.save(options.output, {"base": BASE, "records": records})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["MAC", "MAG"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    harness.add_common_options(parser)
    parser.set_defaults(threads=1)
    harness.main(run, parser)


if __name__ == "__main__":
    main()
