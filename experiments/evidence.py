"""What is a memory worth on top of fair attention? The field of docs/results/evidence.md.

Every model has the same short convolution and induction start in its attention, the same blocks, the same training, and
its feed-forward widened or narrowed until it has the parameters of the MAG::

    titans experiment experiments/evidence.py --scale small --set data.length=2048 --set training.batch_size=2
    titans experiment experiments/evidence.py --scale small --row mag-c8 --set model.chunk_size=8

The first command is the whole field (or one of it: ``--row mag``), the second a recipe of one's own. A model is read
over validation windows of its training length with the memory on, reset at every segment and never written, and over
streams 16 times as long: continuously, and in sliding windows of its training length, which is all that full attention
can do there.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experiments.framework import SCALES, Column, Experiment, Figures, Workplace
from experiments.framework.recall import device
from experiments.framework.scales import corpus, match_parameters, parameters, text_run
from experiments.framework.text import train_text, validation_streams
from experiments.lasting import by_bucket, sort_changes
from titans import TitansModel, load_model
from titans.data import ByteTokenizer
from titans.evaluation import nats_by_position
from titans.models import TitansConfig
from titans.models.cost import measure_cost
from titans.training import ConfigError, TrainConfig
from titans.training.checkpoints import METRICS_FILE
from titans.training.plots import read_metrics

WIDE = "window-wide"
FIELD: dict[str, dict[str, Any]] = {
    "window": {"variant": "swa"},
    WIDE: {"variant": "swa"},  # its reach is chosen below
    "transformer": {"variant": "transformer"},
    "mag": {"variant": "MAG"},
    "mac": {"variant": "MAC"},
    "mal": {"variant": "MAL"},
    "lmm": {"variant": "LMM"},
    "mag-matrix": {"variant": "MAG", "mem_layers": 1},
    "mac-matrix": {"variant": "MAC", "mem_layers": 1},
    "mag-delta": {"variant": "MAG", "mem_layers": 1, "use_momentum": False},
}


class Measure(BaseModel):
    """What is read after training.

    Attributes:
        windows: validation windows of the training length.
        times: length of the long streams, in training lengths; an even number.
        streams: how many of them; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int = 48
    times: int = 16
    streams: int = 6


class Row(BaseModel):
    """A row: how the model is trained, and how it is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: TrainConfig
    measure: Measure


def arms(scale: str, data: Path | None = None, row: str | None = None, set: tuple[str, ...] = ()) -> dict[str, Row]:
    """The field, or one of it; any other row is a MAG unless its changes say otherwise."""
    size, text = SCALES[scale], corpus(SCALES[scale], data)
    measure: dict[str, Any] = {"measure": {}}
    changes, chosen = sort_changes(set, measure)

    def run(fields: dict[str, Any], changes: tuple[str, ...] = changes) -> TrainConfig:
        return text_run(size, text, overrides=("training.eval_every=0", *changes), **{"miras": None, **fields})

    of_the_field = tuple(change for change in changes if not change.startswith("model."))
    like = run({"variant": "MAG"}, of_the_field).model
    found = {}
    for name in FIELD if row is None else (row,):
        fields = dict(FIELD.get(name, {"variant": "MAG"}))
        if chosen:
            fields["variant"] = chosen
        if name == WIDE:
            fields["window"] = window_of_equal_state(like)
        task = run(fields)
        if size.preset is None and not any(change.startswith("model.ffn_mult=") for change in changes):
            task = task.model_copy(update={"model": match_parameters(task.model, parameters(like))})
        found[name] = Row(run=task, measure=Measure(**measure["measure"]))
    long = found[name].run.data.length * found[name].measure.times
    if found[name].measure.times % 2:
        raise ConfigError(f"measure.times: must be even, got {found[name].measure.times}")
    if found[name].measure.streams:
        validation_streams(found[name].run.data, long, 1, ByteTokenizer())  # a corpus too short is told now
    return found


def window_of_equal_state(config: TitansConfig) -> int:
    """Tokens whose keys and values are as many numbers as the state of ``config``."""
    per_token = 2 * config.d_model * config.n_layers * 4  # bytes
    return round(measure_cost(config).state_bytes / per_token)


def unit(row: Row, seed: int, place: Workplace) -> Figures:
    """Train, then measure; everything by position goes into the record."""
    folder = train_text(row.run, seed, place)
    config, told, length = row.run.model, place.raw, row.run.data.length
    told["final_loss"] = statistics.mean(told["losses"][-20:]) / math.log(2)
    told["largest_gradient_norm"] = max(told["gradient_norms"][row.run.training.warmup_steps :], default=0.0)
    told["parameters"], told["state_bytes"] = parameters(config), measure_cost(config).state_bytes
    model = load_model(folder).to(device())
    ids, _ = validation_streams(row.run.data, length, row.measure.windows, ByteTokenizer())
    found = {"train": told["final_loss"], "parameters": told["parameters"]}
    for mode in ("on", "reset", "off") if config.has_memory else ("on",):
        bits = bits_by_position(model, ids, mode)
        told[mode] = by_bucket(bits, torch.arange(1, len(bits) + 1))
        told[f"by_position_{mode}"] = [round(x, 4) for x in bits.view(-1).tolist()]
        second = bits[length // 2 - 1 :].mean().item()
        found[mode] = second if mode == "on" else second - found["on"]
    told["tokens_per_s"] = statistics.median(x["tokens_per_s"] for x in read_metrics(folder.parent / METRICS_FILE))
    if row.measure.streams:
        long, _ = validation_streams(row.run.data, length * row.measure.times, row.measure.streams, ByteTokenizer())
        told["long"] = read_long(model, long, length)
        found |= {f"long_{how}": bits["beyond"] for how, bits in told["long"].items()}
    return found


def bits_by_position(model: TitansModel, ids: Tensor, mode: str = "on") -> Tensor:
    """Bits per byte of bytes 1, 2, … of windows [N, T]: float64 [T - 1]."""
    batches = ids.to(device()).split(max(1, 2**14 // ids.shape[1]))
    segment = model.config.segment if mode == "reset" else ids.shape[1]
    return nats_by_position(model, batches, segment=segment, memory=mode).cpu() / math.log(2)  # type: ignore[arg-type]


def read_long(model: TitansModel, ids: Tensor, length: int) -> dict[str, dict[str, float]]:
    """Bits per byte of long streams by position, and of all bytes beyond the training length.

    Continuously, if the model's state is of constant size; and sliding: every half of a training length is read after
    the half before it, from a fresh state, so that each byte has at least that half before it.
    """
    half, found = length // 2, {}
    pieces = ids.unfold(1, length, half)  # [N, pieces, length], each half a length on
    nats = [bits_by_position(model, pieces[:, i].contiguous()) for i in range(pieces.shape[1])]
    slid = torch.cat([nats[0], *(x[half - 1 :] for x in nats[1:])])
    readings = {"sliding": slid}
    if model.config.variant != "transformer":
        readings["continuous"] = nats_by_position(model, ids.to(device()).split(1), segment=length).cpu() / math.log(2)
    for how, bits in readings.items():
        found[how] = by_bucket(bits, torch.arange(1, len(bits) + 1)) | {"beyond": bits[length - 1 :].mean().item()}
    return found


EXPERIMENT = Experiment(
    name="evidence",
    purpose="What a memory is worth on top of fair attention, beside windows, a Transformer and a matrix memory.",
    arms=arms,
    unit=unit,
    columns={
        "train": Column("train", drawn=False),
        "on": Column("second half"),
        "reset": Column("reset", "+.3f", drawn=False),
        "off": Column("off", "+.3f", drawn=False),
        "long_continuous": Column("16 lengths, continuous"),
        "long_sliding": Column("16 lengths, sliding"),
        "parameters": Column("parameters", ",.0f", drawn=False),
    },
    inputs=("data", "row", "set"),
    note="Bits per byte. Train: the mean of the last 20 steps. Second half: validation loss in the second half of "
    "windows of the training length; reset and off: what it costs there to reset the memory at every segment, or never "
    "to write it. 16 lengths: streams that long, beyond the first training length, read continuously or in sliding "
    "windows of the training length with half of it as context.",
)
