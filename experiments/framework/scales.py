"""The four scales: how large the models are, how long they train, and what they are measured on.

tiny is for two CPU cores and ten minutes an experiment, small for the same cores and an hour. medium and large take the
sizes of `TitansConfig.preset` and need an accelerator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from experiments.framework.recall import RecallTask
from experiments.framework.text import validation_streams
from titans.data import ByteTokenizer
from titans.miras import MLP, MirasConfig
from titans.models import TitansConfig, build_model, count_parameters
from titans.training import TrainConfig
from titans.training.config import DataSection


@dataclass(frozen=True)
class Scale:
    """One scale.

    Args:
        model: fields of `TitansConfig` for byte-level text, besides those of ``preset``.
        length: bytes of a training window.
        training: fields of the training section.
        lengths, windows: see `Comparison`.
        recall: fields of `RecallTask`, its model's among them.
        preset: of the text models.
        expansion: hidden width of MLP memories, in head widths.
    """

    model: dict[str, Any]
    length: int
    training: dict[str, Any]
    lengths: tuple[int, ...]
    recall: dict[str, Any]
    windows: int = 64
    preset: str | None = None
    expansion: float = 4

    @property
    def mlp(self) -> MLP:
        """The memory network of arms that do not choose one themselves."""
        return MLP(expansion=self.expansion)


TEXT = {"n_layers": 2, "n_persistent": 4, "chunk_size": 16, "segment_len": 64, "window": 64}
GPU_TEXT = {"chunk_size": 64, "segment_len": 256, "window": 256}
GPU = {
    "precision": "bf16", "engine": "compiled", "warmup_steps": 500, "eval_every": 1000, "eval_tokens": 2**19,
    "log_every": 100, "batch_size": 16, "lr": 1e-3,
}  # fmt: skip


def _recall(vocab_size: int, d_model: int, **task: Any) -> dict[str, Any]:
    sizes = {"n_layers": 2, "chunk_size": 16, "window": 16, "n_persistent": 0}
    return {"model": {"vocab_size": vocab_size, "d_model": d_model, **sizes}, **task}


SCALES = {
    "tiny": Scale(
        model={"d_model": 64, **TEXT},
        length=256,
        training={"steps": 120, "batch_size": 8, "lr": 4e-3, "warmup_steps": 20, "eval_every": 0, "save_every": 40},
        lengths=(256, 1024),
        windows=32,
        recall=_recall(32, 64, pairs=4, batch_size=16, lr=5e-3, samples=64),
        expansion=2,
    ),
    "small": Scale(
        model={"d_model": 128, **TEXT},
        length=512,
        training={"steps": 500, "batch_size": 8, "lr": 3e-3, "warmup_steps": 50, "eval_every": 250, "save_every": 50},
        lengths=(512, 1024, 2048),
        recall=_recall(128, 64),
    ),
    "medium": Scale(
        model=GPU_TEXT,
        preset="tiny",
        length=2048,
        training={**GPU, "steps": 10_000},
        lengths=(2048, 8192, 16_384),
        recall=_recall(1024, 128, pairs=16, steps=2000, length=128, lengths=(128, 512, 2048)),
    ),
    "large": Scale(
        model=GPU_TEXT,
        preset="small",
        length=4096,
        training={**GPU, "steps": 20_000, "gradient_accumulation": 2},
        lengths=(4096, 16_384, 32_768),
        recall=_recall(4096, 256, pairs=64, steps=5000, lr=2e-3, length=512, lengths=(512, 2048, 8192)),
    ),
}


class Comparison(BaseModel):
    """Settings of an arm that is measured on text and, if it has such a task, on recall.

    Args:
        text: training of the text model; its output folder and seed are the unit's.
        lengths: bits per byte are measured over this many first bytes of a validation stream; any increasing numbers.
        windows: validation streams of the largest length.
        recall: the other task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: TrainConfig
    lengths: tuple[int, ...]
    windows: int
    recall: RecallTask | None = None


def corpus(scale: Scale, source: str | Path | None = None, data_dir: Path | None = None) -> dict[str, Any]:
    """A data section for this scale, after a look at whether the corpus is there and long enough.

    Args:
        source: as `DataSection` has it; None for the default corpus.
        data_dir: where downloaded corpora lie.

    Raises:
        ValueError, OSError, ImportError: as `experiments.framework.text.validation_streams`.
    """
    folder = None if data_dir is None else str(data_dir)
    section = {"source": str(source or "stdlib"), "data_dir": folder, "length": scale.length}
    validation_streams(DataSection(**section), max(scale.lengths), 1, ByteTokenizer())
    return section


def text_run(
    scale: Scale, data: Mapping[str, Any], variant: str, overrides: tuple[str, ...] = (), **changes: Any
) -> TrainConfig:
    """A run of this scale, every default of the memory spelt out.

    Args:
        data: what `corpus` gives.
        overrides: as `TrainConfig.parse`; the last word.
        changes: fields of the model.
    """
    fields: dict[str, Any] = {"vocab_size": 256, "miras": MirasConfig.steady(scale.mlp), **scale.model, **changes}
    if scale.preset is not None:
        fields = TitansConfig.preset(scale.preset, variant, **fields).model_dump(exclude_unset=True)
    raw = {"model": {**fields, "variant": variant}, "data": {**data}, "training": scale.training}
    run = TrainConfig.parse(raw, overrides)
    return run.model_copy(update={"model": run.model.explicit()})


def recall_task(scale: Scale, variant: str, **changes: Any) -> RecallTask:
    """A recall task of this scale; ``changes`` are fields of its model."""
    fields = {"miras": MirasConfig.steady(scale.mlp), **scale.recall["model"], **changes}
    return RecallTask(**{**scale.recall, "model": TitansConfig(variant=variant, **fields).explicit()})


def comparison(scale: Scale, data: Mapping[str, Any], variant: str, recall: bool = True, **changes: Any) -> Comparison:
    """An arm with both tasks, or with the text alone; ``changes`` are fields of its models."""
    text = text_run(scale, data, variant, **changes)
    task = recall_task(scale, variant, **changes) if recall else None
    return Comparison(text=text, lengths=scale.lengths, windows=scale.windows, recall=task)


def equal_size(arms: Mapping[str, Comparison], like: str) -> dict[str, Comparison]:
    """The arms with their feed-forwards widened or narrowed until their models have the size of arm ``like``'s."""
    found = dict(arms)
    for part in ("text", "recall"):
        target = getattr(arms[like], part)
        size = 0 if target is None else parameters(target.model)
        for name in [name for name in arms if name != like and size]:
            task = getattr(arms[name], part)
            task = task.model_copy(update={"model": match_parameters(task.model, size)})
            found[name] = found[name].model_copy(update={part: task})
    return found


def lengths_up_to(first: int, most: int, times: int) -> tuple[int, ...]:
    """``first``, each ``times`` the one before, and ``most``.

    Raises:
        ValueError: ``most`` is less than ``first``.
    """
    if most < first:
        raise ValueError(f"--max-context: must be at least {first}, the length of training, got {most}")
    found = [first]
    while found[-1] * times < most:
        found.append(found[-1] * times)
    return tuple(dict.fromkeys([*found, most]))


def parameters(config: TitansConfig) -> int:
    """Learned numbers of the model that ``config`` describes, without making it."""
    with torch.device("meta"):
        return count_parameters(build_model(config))


def match_parameters(config: TitansConfig, size: int) -> TitansConfig:
    """``config`` with the width of its feed-forward chosen so that it has ``size`` parameters.

    That width moves in steps of 8, so half a step (12 · d_model · n_layers parameters) may remain.

    Raises:
        ValueError: with the least feed-forward the model would still be larger.
    """

    def of_width(hidden: int) -> TitansConfig:
        # The layer rounds its width up: half an element below keeps clear of rounding errors.
        return config.model_copy(update={"ffn_mult": (hidden - 0.5) * 3 / (2 * config.d_model)})

    least = parameters(of_width(8))
    steps = round((size - least) / (24 * config.d_model * config.n_layers))
    if steps < 0:
        raise ValueError(f"{config.variant}: {least} parameters with the least feed-forward are more than {size}")
    return of_width(8 + 8 * steps)
