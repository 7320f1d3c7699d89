"""MQAR: does the memory recall pairs, and does it still at 16 times the training length?

Trains an LMM (steady, C = 16) and the sliding-window baseline (window 16) on MQAR with T = 64, 6 pairs and 128 tokens
of vocabulary, and scores both at longer lengths. ``python benchmarks/recall.py --output docs/results/raw/recall.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch

from titans import TitansConfig, TitansModel, build_model, count_parameters
from titans.data import mqar_accuracy, mqar_batch
from titans.training import build_optimizer, get_cosine_schedule_with_warmup

PAIRS, VOCABULARY, TRAINED_AT = 6, 128, 64
MODELS = {
    "LMM": TitansConfig(variant="LMM", vocab_size=VOCABULARY, d_model=64, n_layers=2, chunk_size=16, n_persistent=0),
    "swa": TitansConfig(variant="swa", vocab_size=VOCABULARY, d_model=64, n_layers=2, window=16),
}
WARMUP = 30


def train(config: TitansConfig, seed: int, steps: int, batch: int, lr: float) -> tuple[TitansModel, dict]:
    """Train from scratch; returns the model and what the run looked like."""
    torch.manual_seed(seed)
    model = build_model(config)
    optimizer = build_optimizer(model, lr=lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps=WARMUP, total_steps=steps)
    random = torch.Generator().manual_seed(seed)
    losses, norms = [], []
    started = time.perf_counter()
    for step in range(steps):
        ids, labels = mqar_batch(batch, TRAINED_AT, PAIRS, VOCABULARY, random)
        loss = model(ids, labels=labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            raise SystemExit(f"non-finite loss {losses[-1]} or gradient norm {norms[-1]} at step {step}")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            worst = max(norms[WARMUP:])
            print(
                f"  step {step + 1:4d}  loss {losses[-1]:.3f}  largest gradient norm {worst:.2f}",
                flush=True,
            )
    run = {
        "seconds": time.perf_counter() - started,
        "largest_gradient_norm_after_warmup": max(norms[WARMUP:]),
        "losses": losses,
        "gradient_norms": norms,
    }
    return model, run


@torch.no_grad()
def score(model: TitansModel, length: int, samples: int = 256, batch: int = 32) -> float:
    """Share of queries answered right, on samples that no training run sees."""
    model.eval()
    random = torch.Generator().manual_seed(10_000)
    found = []
    for _ in range(samples // batch):
        ids, labels = mqar_batch(batch, length, PAIRS, VOCABULARY, random)
        found.append(mqar_accuracy(model(ids).logits, labels))
    return sum(found) / len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for name in options.models:
        for seed in options.seeds:
            print(f"{name}, seed {seed}", flush=True)
            model, run = train(MODELS[name], seed, options.steps, options.batch, options.lr)
            accuracy = {length: score(model, length) for length in options.lengths}
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
