"""What would a cache of the text itself still add to a trained model? The distance left to a memory that recalls all.

At every byte of validation windows beyond the model's attention window: the longest match (2 to 8 bytes) of the last
bytes with earlier ones of the same window, its next bytes mixed into the model's prediction, with a weight by length.
``titans experiment experiments/cache.py --scale small --model FOLDER``, such as the ``runs/ROW-seed0/text/model`` that
`lasting.py` leaves.
"""

import math
import statistics
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from experiments.framework import SCALES, Column, Experiment, Figures, Workplace
from experiments.framework.recall import device
from experiments.framework.scales import corpus
from experiments.framework.text import validation_streams
from titans import load_model
from titans.data import ByteTokenizer
from titans.training.config import DataSection

WEIGHTS = {2: 0.05, 3: 0.15, 4: 0.25, 5: 0.4, 6: 0.5, 7: 0.55, 8: 0.65}
LONGEST = max(WEIGHTS)


class Reading(BaseModel):
    """A byte-level model, and the windows that it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    data: DataSection
    windows: int = 48


def arms(scale: str, data: Path | None = None, model: Path | None = None) -> dict[str, Reading]:
    """The model given."""
    if model is None:
        raise ValueError("--model: the folder of a byte-level model is needed, got none")
    text = corpus(SCALES[scale], data)
    if load_model(model).config.window >= text["length"] - 1:
        raise ValueError(f"--model: its window leaves nothing of {text['length']} bytes, got {model}")
    return {"model": Reading(model=model.resolve(), data=DataSection(**text))}


def unit(settings: Reading, seed: int, place: Workplace) -> Figures:
    """Bits per byte of the model alone, and with a cache of the text beyond its window, and inside it."""
    model = load_model(settings.model).to(device())
    ids, _ = validation_streams(settings.data, settings.data.length, settings.windows, ByteTokenizer())
    with torch.no_grad():
        told = torch.cat([model(rows.to(device())).logits.float().softmax(-1).cpu() for rows in ids.split(16)])
    window, texts = model.config.window, ids.tolist()
    alone = mixed(texts, told, window, 1, 0)
    return {
        "alone": alone,
        "beyond": mixed(texts, told, window, window + 1, 10**9) - alone,
        "inside": mixed(texts, told, window, 1, window) - alone,
    }


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


EXPERIMENT = Experiment(
    name="cache",
    purpose="What a cache of the text, beyond the window or inside it, would add to a trained model.",
    arms=arms,
    unit=unit,
    columns={
        "alone": Column("model alone"),
        "beyond": Column("with a cache of what lies beyond the window", "+.3f"),
        "inside": Column("with a cache of what lies inside it", "+.3f"),
    },
    inputs=("data", "model"),
    note="Bits per byte at the positions beyond the window.",
)
