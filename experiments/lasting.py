"""What is a model's memory worth on text, and does it last? The study of docs/results/lasting.md, a row a command.

``titans experiment experiments/lasting.py --scale small
--row mac-c32 --set model.variant=MAC --set model.chunk_size=32``
trains a byte-level model (any setting of `TrainConfig` can be set) and measures it with the memory on, reset at every
segment and never written; and reads long streams continuously and restarted after every training length. Without a row:
all variants as they come.
"""

import math
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experiments.framework import SCALES, Column, Experiment, Figures, Workplace
from experiments.framework.recall import device
from experiments.framework.scales import corpus, parameters, text_run
from experiments.framework.text import bits_by_position, train_text, validation_streams
from titans import TitansModel, load_model
from titans.data import ByteTokenizer
from titans.evaluation import nats_by_position
from titans.training import ConfigError, TrainConfig
from titans.training.config import set_field

VARIANTS = ("swa", "transformer", "LMM", "MAC", "MAG", "MAL")
# Widths that give every variant of the small scale the parameters of MAG within 5 %.
FFN_MULT = {"transformer": 8.1, "swa": 8.1, "LMM": 5.9}
BUCKETS = (0, 64, 128, 256, 512, 2048, 8192, 32_768, 131_072, 524_288)


class Measure(BaseModel):
    """What is read after training.

    Attributes:
        windows: validation windows of the training length; 0 for none.
        length: of the long streams, a multiple of the training length.
        streams: how many of them; 0 for none. Full attention reads none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int = 96
    length: int = 32_768
    streams: int = 7


class Row(BaseModel):
    """A row: how the model is trained, and how it is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: TrainConfig
    measure: Measure


def arms(scale: str, data: Path | None = None, row: str | None = None, set: tuple[str, ...] = ()) -> dict[str, Row]:
    """One row, a MAG unless it says otherwise, or every variant; all with the changes of ``set``."""
    size, text = SCALES[scale], corpus(SCALES[scale], data)
    length = size.length * 64
    measured = {"measure": {"length": length} if scale == "small" else {"length": length, "windows": 32, "streams": 2}}
    changes, chosen = sort_changes(set, measured)
    found = {}
    for name in VARIANTS if row is None else (row,):
        variant = chosen or (name if row is None else "MAG")
        mult = {"ffn_mult": FFN_MULT.get(variant, 4.0)} if size.preset is None else {}
        # Without a rule, so that a change may be one of its shorthands (mem_layers, d_hidden, …).
        run = text_run(size, text, variant, ("training.eval_every=0", *changes), miras=None, **mult)
        found[name] = Row(run=run, measure=Measure(**measured["measure"]))
    long = found[name].measure.length
    if long % run.data.length:
        raise ConfigError(f"measure.length: {long} is no multiple of data.length {run.data.length}")
    if found[name].measure.streams:
        validation_streams(run.data, long, 1, ByteTokenizer())  # a corpus too short is told now
    return found


def sort_changes(changes: tuple[str, ...], measured: dict) -> tuple[tuple[str, ...], str | None]:
    """Those of the run, and the variant that the last of them chooses; those of the measure go into ``measured``."""
    for change in changes:
        if change.startswith("measure."):
            set_field(measured, change)
    variants = [change.partition("=")[2] for change in changes if change.startswith("model.variant=")]
    return tuple(c for c in changes if not c.startswith("measure.")), variants[-1] if variants else None


def unit(row: Row, seed: int, place: Workplace) -> Figures:
    """Train, then measure; everything by position goes into the record."""
    folder = train_text(row.run, seed, place)
    config, told = row.run.model, place.raw
    told["final_loss"] = statistics.mean(told["losses"][-20:]) / math.log(2)
    if norms := told["gradient_norms"][row.run.training.warmup_steps :]:
        told["largest_gradient_norm"] = max(norms)
    if row.measure.windows:
        for mode in ("on", "reset", "off") if config.has_memory else ("on",):
            bits = bits_by_position(folder, row.run.data, row.run.data.length, row.measure.windows, mode)
            told[mode] = by_bucket(bits, torch.arange(1, len(bits) + 1))
            told[f"beyond_window_{mode}"] = bits[config.window :].mean().item()
    if row.measure.streams and config.variant != "transformer":
        ids, _ = validation_streams(row.run.data, row.measure.length, row.measure.streams, ByteTokenizer())
        told.update(reading_on(load_model(folder).to(device()), ids.to(device()), row.run.data.length))
    return {**figures(told), "parameters": parameters(config)}


def reading_on(model: TitansModel, ids: Tensor, piece: int) -> dict:
    """The same bytes read continuously and restarted every ``piece``, by position, without the pieces' first bytes."""
    through = nats_by_position(model, [ids], segment=piece)
    pieces = ids.view(len(ids), -1, piece)
    restarted = torch.cat([nats_by_position(model, [pieces[:, i]], segment=piece) for i in range(pieces.shape[1])])
    # Entry t of `through` is the loss of byte t + 1. A restart cannot predict the first byte of a piece: left out.
    places = torch.arange(ids.shape[1]).view(-1, piece)[:, 1:].flatten()
    continuous, fresh = through.cpu()[places - 1] / math.log(2), restarted.cpu() / math.log(2)
    found = {"continuous": by_bucket(continuous, places), "restarted": by_bucket(fresh, places)}
    drift = {bucket: found["continuous"][bucket] - found["restarted"][bucket] for bucket in found["continuous"]}
    means = {"continuous_mean": continuous.mean().item(), "restarted_mean": fresh.mean().item()}
    return {**found, "continuous_minus_restarted": drift, **means}


def by_bucket(bits: Tensor, places: Tensor) -> dict[str, float]:
    """Mean bits per byte of the bytes whose ``places`` lie between two of ``BUCKETS``."""
    inside = {f"{low}-{high}": (places >= low) & (places < high) for low, high in pairwise(BUCKETS)}
    return {bucket: bits[mask].mean().item() for bucket, mask in inside.items() if mask.any()}


def figures(told: dict) -> Figures:
    """What the table shows of a row's raw numbers, as far as they were measured."""
    found = {"train": told["final_loss"]}
    if "beyond_window_on" in told:
        found["beyond"] = told["beyond_window_on"]
        found |= {m: told[f"beyond_window_{m}"] - found["beyond"] for m in ("reset", "off") if m in told}
        found |= {f"bits@{bucket}": bits for bucket, bits in told["on"].items()}
    if "continuous_mean" in told:
        drift = told["continuous_minus_restarted"].items()
        found |= {f"drift@{bucket}": bits for bucket, bits in drift if int(bucket.split("-")[0]) >= 512}
        found["reading_on"] = told["continuous_mean"] - told["restarted_mean"]
    return {**found, "norm": told["largest_gradient_norm"]} if "largest_gradient_norm" in told else found


EXPERIMENT = Experiment(
    name="lasting",
    purpose="What the memory is worth on text, and how long: reset, never written, read on against restarted.",
    arms=arms,
    unit=unit,
    columns={
        "train": Column("train", drawn=False),
        "beyond": Column("beyond", drawn=False),
        "reset": Column("reset", "+.3f", drawn=False),
        "off": Column("off", "+.3f", drawn=False),
        "bits": Column("bits per byte", over="bytes"),
        "drift": Column("drift", "+.3f", over="bytes"),
        "reading_on": Column("reading on", "+.3f", drawn=False),
        "norm": Column("largest gradient norm", ".1f", drawn=False),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("data", "row", "set"),
    note="Bits per byte. Train: the mean of the last 20 steps. Beyond: validation loss beyond the window; reset and "
    "off: what it costs there to reset the memory at every segment, or never to write it. Reading on: a continuous "
    "reading of long streams minus one that restarts after every training length, on the whole; drift: the same by "
    "position. The largest gradient norm is that of all steps after warm-up.",
)
