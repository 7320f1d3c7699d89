"""``make demo``: ask the shipped model what a text hid, then train a small MAG and show what its memory is worth."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import matplotlib
import torch

from titans.data import ByteTokenizer, TokenDocuments, evaluation_windows, load_documents
from titans.evaluation import nats_by_position
from titans.evaluation.niah import NEEDLE, QUESTION
from titans.evaluation.plots import plot_loss_by_position
from titans.models import TitansModel, load_model
from titans.training import TrainConfig
from titans.training.run import train

ROOT = Path(__file__).parents[1]
CONFIG, FINDER = ROOT / "configs" / "demo.yaml", ROOT / "models" / "finder"
HIDDEN_IN = 16_000  # bytes
ROWS, BATCH = 128, 16
PROMPT = "class Memory:\n    def __init__(self, "


def main() -> int:
    matplotlib.use("Agg")
    config = TrainConfig.load(CONFIG, sys.argv[1:])
    folder = Path(config.training.output_dir)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    find(folder)
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


def find(folder: Path) -> None:
    """Hide a number in a long text, let the shipped model read it, and ask."""
    number, key = str(random.randint(1_000_000, 9_999_999)), random.choice(("garden-shed", "blue-kettle", "old-atlas"))
    text = next(text for text in load_documents("stdlib", "validation") if len(text) > HIDDEN_IN)[:HIDDEN_IN]
    lines = text.split("\n")
    at = random.randrange(len(lines))
    lines.insert(at, NEEDLE.format(kind="number", key=key, value=number))
    (folder / "hidden.txt").write_text("\n".join(lines), encoding="utf-8")
    print(
        f"Line {at + 1} of {len(lines)} of {folder / 'hidden.txt'}, a source file of Python's, now says:\n  {lines[at]}"
    )

    started = time.monotonic()
    model, tokenizer = load_model(FINDER).eval(), ByteTokenizer()
    memory = model.memorize("\n".join(lines), tokenizer)
    memory.save(folder / "hidden.memory")
    question = QUESTION.format(kind="number", key=key)
    told = f"its memory is {memory.nbytes:,} bytes, its window {model.config.window}"
    print(f"models/finder has read it; {told}. Asked for it:")
    for state, which in ((memory, "with this memory"), (None, "without it")):
        asked = torch.tensor([tokenizer.encode(question)])
        answer = model.generate(asked, state=state, max_new_tokens=len(number) + 1)[0, asked.shape[1] :]
        print(f"  {which:16}  {tokenizer.decode(answer.tolist()).strip()}")
    print(f"That took {time.monotonic() - started:.0f} seconds. Hide your own, then ask for {key} or for your own key:")
    print(f"  .venv/bin/titans memorize --model models/finder --input {folder / 'hidden.txt'} --output my.memory")
    print("  .venv/bin/titans ask --model models/finder --memory my.memory\n", flush=True)


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
