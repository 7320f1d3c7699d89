"""One run of the study behind docs/results/lasting.md: train a byte-level model, measure what its memory is worth.

Trains on the default corpus (window 64, T = 512, 4,096 tokens a step, unless ``--set`` says otherwise) and writes one
JSON file with bits per byte by position: memory on, reset at every segment, never written; and over 229,376 bytes of
validation text read in streams of 32,768 and restarted every 512.
``python benchmarks/lasting.py mag-c32 --variant MAG --set model.chunk_size=32``
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from titans import count_parameters, load_model
from titans.data import ByteTokenizer
from titans.evaluation import nats_by_position
from titans.experiments.machine import made_with
from titans.experiments.text import validation_streams
from titans.training import ConfigError, TrainConfig
from titans.training.checkpoints import CONFIG_FILE, check_same, last_checkpoint
from titans.training.plots import read_metrics
from titans.training.run import train

BASE = {
    "model": {
        "vocab_size": 256, "d_model": 128, "n_layers": 2, "n_persistent": 4,
        "chunk_size": 16, "segment_len": 64, "window": 64,
    },
    "data": {"length": 512},
    "training": {
        "steps": 600, "batch_size": 8, "lr": 3e-3, "warmup_steps": 50, "eval_every": 0, "save_every": 100,
        "log_every": 50, "threads": 1, "engine": "compiled",
    },
}  # fmt: skip
# Widths that give every variant the parameters of MAG within 5 %.
FFN_MULT = {"transformer": 8.1, "swa": 8.1, "LMM": 5.9}
LONG, STREAMS, PIECE = 32_768, 7, 512
BUCKETS = (0, 64, 128, 256, 512, 2048, 8192, LONG)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the run; its file is OUTPUT/NAME-seedS.json")
    parser.add_argument("--variant", default="MAG", choices=["LMM", "MAC", "MAG", "MAL", "swa", "transformer"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--measure", choices=["all", "quick", "nothing"], default="all", help="after training")
    parser.add_argument("--output", type=Path, default=Path("docs/results/raw/lasting"))
    options = parser.parse_args()
    try:
        return _run(options)
    except FloatingPointError as error:
        _write(options, {"failure": str(error)})
        print(error, file=sys.stderr)
        return 1


def configure(variant: str, changes: list[str]) -> TrainConfig:
    """The run's configuration, ``changes`` as the command line has them."""
    raw = json.loads(json.dumps(BASE))
    raw["model"] |= {"variant": variant, "ffn_mult": FFN_MULT.get(variant, 4.0)}
    return TrainConfig.parse(raw, changes)


def _run(options: argparse.Namespace) -> int:
    if _target(options).exists():
        print(f"{_target(options)} is there already, kept", flush=True)
        return 0
    print(f"== {options.name}, {options.variant}, seed {options.seed}: {' '.join(options.changes)}", flush=True)
    config = configure(options.variant, [*options.changes, f"training.seed={options.seed}"])
    folder = Path("runs/lasting") / f"{options.name}-seed{options.seed}"
    config.training.output_dir = str(folder)
    started = time.perf_counter()
    if (folder / "model").exists():
        check_same(config, folder / CONFIG_FILE)
        if (done := read_metrics(folder / "metrics.jsonl")[-1]["step"]) != config.training.steps:
            raise ConfigError(f"training.steps: {folder} has {done}, not {config.training.steps}")
    else:
        result = train(config, last_checkpoint(folder) is not None, Console(stderr=True, force_terminal=False))
        if result.model_dir is None:
            sys.exit(128 + (result.signal or 0))
    seconds = time.perf_counter() - started
    model = load_model(folder / "model")
    steps = read_metrics(folder / "metrics.jsonl")
    report = {"parameters": count_parameters(model), "seconds": round(seconds), **_training(steps, config)}
    if options.measure != "nothing":
        quick = options.measure == "quick"
        report |= _windows(model, config, 32 if quick else 96)
        if config.model.variant != "transformer":
            length, streams = (8192, 6) if quick else (LONG, STREAMS)
            report |= _lasting(model, validation_streams(config.data, length, streams, ByteTokenizer())[0])
    report["config"] = config.to_dict()
    _write(options, report)
    shown = {k: v for k, v in report.items() if k not in ("config", "losses", "gradient_norms", "memory")}
    print(json.dumps(shown), flush=True)
    return 0


def _training(steps: list[dict], config: TrainConfig) -> dict:
    losses = [s["loss"] for s in steps if "loss" in s]
    norms = [s["grad_norm"] for s in steps if "grad_norm" in s]
    return {
        "final_loss": statistics.mean(losses[-20:]) / math.log(2),
        "largest_gradient_norm": max(norms[config.training.warmup_steps :], default=0.0),
        "median_gradient_norm": statistics.median(norms),
        "losses": [round(x, 4) for x in losses],
        "gradient_norms": [round(x, 3) for x in norms],
        "memory": next((s["memory"] for s in reversed(steps) if "memory" in s), []),
    }


def _windows(model, config: TrainConfig, count: int) -> dict:
    """Bits per byte by position in validation windows of the training length."""
    ids, _ = validation_streams(config.data, config.data.length, count, ByteTokenizer())
    found = {}
    for mode in ("on", "reset", "off") if config.model.has_memory else ("on",):
        segment = config.model.segment if mode == "reset" else config.data.length
        nats = nats_by_position(model, ids.split(32), segment=segment, memory=mode)
        found[mode] = by_bucket(nats)
        found[f"beyond_window_{mode}"] = nats[config.model.window :].mean().item() / math.log(2)
    return found


def _lasting(model, ids: Tensor) -> dict:
    """The same bytes read continuously and restarted every 512, by position; the pieces' first bytes are left out."""
    through = nats_by_position(model, [ids], segment=PIECE)
    pieces = ids.view(len(ids), -1, PIECE)
    restarted = [nats_by_position(model, [pieces[:, i]], segment=PIECE) for i in range(pieces.shape[1])]
    # Entry t of `through` is the loss of byte t + 1. A restart cannot predict bytes 512, 1024, ...: left out.
    same = torch.ones(ids.shape[1], dtype=torch.bool)
    same[::PIECE] = False
    places = torch.arange(ids.shape[1])[same]
    continuous, fresh = through[places - 1], torch.cat(restarted)
    found: dict = {"continuous": by_bucket(continuous, places), "restarted": by_bucket(fresh, places)}
    found["continuous_minus_restarted"] = {
        k: round(found["continuous"][k] - found["restarted"][k], 4) for k in found["continuous"]
    }
    found["continuous_mean"] = continuous.mean().item() / math.log(2)
    found["restarted_mean"] = fresh.mean().item() / math.log(2)
    return found


def by_bucket(nats: Tensor, places: Tensor | None = None) -> dict[str, float]:
    """Mean bits per byte between the positions of ``BUCKETS``; ``places`` are the bytes' own positions."""
    places = torch.arange(1, len(nats) + 1) if places is None else places
    found = {}
    for low, high in pairwise(BUCKETS):
        inside = (places >= low) & (places < high)
        if inside.any():
            found[f"{low}-{high}"] = round(nats[inside].mean().item() / math.log(2), 4)
    return found


def _target(options: argparse.Namespace) -> Path:
    return options.output / f"{options.name}-seed{options.seed}.json"


def _write(options: argparse.Namespace, report: dict) -> None:
    told = {"name": options.name, "variant": options.variant, "seed": options.seed, "changes": options.changes}
    options.output.mkdir(parents=True, exist_ok=True)
    report = {**told, **report, "made_with": made_with()}
    _target(options).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
