"""``make demo``: train a small MAG on Python's own source files and show what its memory is worth."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import matplotlib
import torch

from titans.data import ByteTokenizer, TokenDocuments, evaluation_windows, load_documents
from titans.evaluation import nats_by_position
from titans.evaluation.plots import plot_loss_by_position
from titans.models import TitansModel, load_model
from titans.training import TrainConfig
from titans.training.run import train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
ROWS, BATCH = 128, 16
PROMPT = "class Memory:\n    def __init__(self, "


def main() -> int:
    matplotlib.use("Agg")
    config = TrainConfig.load(CONFIG, sys.argv[1:])
    folder = Path(config.training.output_dir)
    if folder.exists():
        shutil.rmtree(folder)
    print(f"Training a {config.model.variant} on the standard library's source files, about three minutes.", flush=True)
    started = time.monotonic()
    result = train(config)
    if result.model_dir is None:
        return 1
    print(f"Trained {result.step} steps in {(time.monotonic() - started) / 60:.1f} minutes.\n", flush=True)
    model = load_model(result.model_dir).eval()
    scores = measure(model, config.data.length, folder)
    print(f"Validation bits per byte over {ROWS} streams of {config.data.length} bytes:")
    print(f"  memory on                          {scores['on']:.3f}")
    print(f"  memory reset at every segment      {scores['reset']:.3f}")
    print(f"  the memory is worth                {scores['reset'] - scores['on']:+.3f} bits per byte\n")
    sample = generate(model)
    print("A sample:\n" + "\n".join("  | " + line for line in sample.splitlines()) + "\n")
    (folder / "sample.txt").write_text(sample)
    print("Files:")
    for name in (
        "model",
        "metrics.jsonl",
        "curve.png",
        "memory.png",
        "demo_memory.png",
        "demo_memory.json",
        "sample.txt",
    ):
        print(f"  {folder / name}")
    print(f'\nNext: .venv/bin/titans generate --model {result.model_dir} --prompt "class Memory:"')
    return 0


def measure(model: TitansModel, length: int, folder: Path) -> dict[str, float]:
    """Bits per byte with the memory on and reset at every segment, by position: numbers and a picture."""
    documents = TokenDocuments.from_texts(load_documents("stdlib", "validation"), ByteTokenizer())
    windows = evaluation_windows(documents, length, ROWS, whole=True)
    ids = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    curves = {
        mode: nats_by_position(model, ids.split(BATCH), segment=model.config.segment, memory=mode) / math.log(2)
        for mode in ("on", "reset")
    }
    plot_loss_by_position(
        {"memory on": curves["on"], "memory reset at every segment": curves["reset"]}, folder / "demo_memory.png",
        title="What the memory is worth: loss by position", segment=model.config.segment,
    )  # fmt: skip
    scores = {mode: curve.mean().item() for mode, curve in curves.items()}
    report = {"bits_per_byte": scores, "by_position": {mode: curve.tolist() for mode, curve in curves.items()}}
    (folder / "demo_memory.json").write_text(json.dumps(report) + "\n")
    return scores


def generate(model: TitansModel) -> str:
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    generator = torch.Generator().manual_seed(0)
    out = model.generate(prompt, max_new_tokens=300, temperature=0.7, top_k=40, generator=generator)
    return tokenizer.decode(out[0].tolist())


if __name__ == "__main__":
    sys.exit(main())
