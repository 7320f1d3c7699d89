"""What would a cache of the text itself still add to a trained model? The distance left to a memory that recalls all.

At every byte of validation windows beyond the model's attention window: the longest match (2 to 8 bytes) of the last
bytes with earlier ones of the same window, its next bytes mixed into the model's prediction, with a weight by length.
``python benchmarks/cache.py runs/lasting/NAME-seed0/model``
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import lasting
import torch

from titans import load_model
from titans.data import ByteTokenizer
from titans.experiments.text import validation_streams

WEIGHTS = {2: 0.05, 3: 0.15, 4: 0.25, 5: 0.4, 6: 0.5, 7: 0.55, 8: 0.65}
LONGEST = max(WEIGHTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a byte-level model")
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model)
    config = lasting.configure("MAG", [])
    ids, _ = validation_streams(config.data, config.data.length, options.windows, ByteTokenizer())
    with torch.no_grad():
        told = torch.cat([model(rows).logits.float().softmax(-1) for rows in ids.split(16)])
    window, texts = model.config.window, ids.tolist()
    plain = mixed(texts, told, window, 1, 0)
    print(f"model alone: {plain:.3f} bits per byte at positions {window} to {config.data.length}")
    for name, nearest, furthest in (("beyond the window", window + 1, 10**9), ("inside it", 1, window)):
        found = mixed(texts, told, window, nearest, furthest)
        print(f"with a cache of what lies {name}: {found:.3f} ({found - plain:+.3f})")
    return 0


def mixed(texts: list[list[int]], told: torch.Tensor, first: int, nearest: int, furthest: int) -> float:
    """Bits per byte from position ``first`` on, with matches that end ``nearest`` to ``furthest`` bytes back."""
    bits = []
    for row, text in enumerate(texts):
        for t in range(first, len(text) - 1):
            p = told[row, t, text[t + 1]].item()
            length, followers = _longest(text, t, range(max(0, t - furthest), t - nearest + 1))
            if length in WEIGHTS:
                share = followers.count(text[t + 1]) / len(followers)
                p = (1 - WEIGHTS[length]) * p + WEIGHTS[length] * share
            bits.append(-math.log2(max(p, 1e-9)))
    return statistics.mean(bits)


def _longest(text: list[int], t: int, ends: range) -> tuple[int, list[int]]:
    """The longest match of the bytes up to t with those up to one of ``ends``, and the bytes that followed."""
    best, followers = 1, []
    for end in ends:
        length = 0
        while length < LONGEST and length <= end and text[end - length] == text[t - length]:
            length += 1
        if length > best:
            best, followers = length, []
        if length == best and length > 1:
            followers.append(text[end + 1])
    return best, followers


if __name__ == "__main__":
    sys.exit(main())
