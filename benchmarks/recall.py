"""MQAR: does the memory recall pairs, and does it still at 64 times the training length?

Trains the four models (C = 16, segments and windows of 16) and the sliding-window baseline on MQAR with T = 64, 6 pairs
and 128 tokens of vocabulary, and scores them at longer lengths.
``python benchmarks/recall.py --output docs/results/raw/recall.json``; another rule: ``--set miras=titans``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import yaml

from titans import TitansConfig, count_parameters
from titans.experiments.recall import RecallTask, score_recall, train_recall

PAIRS, VOCABULARY, TRAINED_AT = 6, 128, 64
FIELDS = {
    "vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "chunk_size": 16, "segment_len": 16, "window": 16,
    "n_persistent": 0,
}  # fmt: skip
MODELS = ("LMM", "MAC", "MAG", "MAL", "swa")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = {name: yaml.safe_load(value) for name, _, value in (change.partition("=") for change in options.set)}
    results = []
    for name in options.models:
        for seed in options.seeds:
            print(f"{name}, seed {seed}", flush=True)
            task = RecallTask(
                model=TitansConfig(variant=name, **{**FIELDS, **changes}), length=TRAINED_AT, pairs=PAIRS,
                steps=options.steps, batch_size=options.batch, lr=options.lr,
            )  # fmt: skip
            model, run = train_recall(task, seed, lambda line: print(line, flush=True))
            accuracy = {length: score_recall(model, task, length) for length in options.lengths}
            run["largest_gradient_norm_after_warmup"] = max(run["gradient_norms"][task.warmup_steps :])
            shown = "  ".join(f"T={length} {value:.1%}" for length, value in accuracy.items())
            print(f"  {run['seconds']:.0f} s  {shown}", flush=True)
            results.append(
                {"model": name, "seed": seed, "parameters": count_parameters(model), "accuracy": accuracy, **run}
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        told = {**vars(options), "output": str(options.output)}
        machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        report = {"command": " ".join(sys.argv), "options": told, **machine, "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
