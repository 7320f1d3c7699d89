"""The four scales: how large the models are, how long they train, and what they are measured on.

tiny is for two CPU cores and ten minutes an experiment, small for the same cores and an hour. medium and large take the
sizes of `TitansConfig.preset` and need an accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from titans.data import ByteTokenizer
from titans.experiments.models import match_parameters, parameters
from titans.experiments.recall import RecallTask
from titans.experiments.text import TextTask, validation_streams
from titans.miras import MLP, MirasConfig
from titans.models import TitansConfig
from titans.models.config import Variant
from titans.training import TrainConfig
from titans.training.config import DataSection


class Scale(BaseModel):
    """One scale.

    Args:
        preset: of the text models; None where ``text_model`` says it all.
        text_model: fields of `TitansConfig` for byte-level text.
        length: bytes of a training window.
        training: fields of the training section.
        lengths, windows: see `TextTask`.
        recall_model: fields of `TitansConfig` for MQAR.
        recall: fields of `RecallTask` besides the model.
        expansion: hidden width of MLP memories, in head widths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = None
    text_model: dict[str, Any]
    length: int
    training: dict[str, Any]
    lengths: tuple[int, ...]
    windows: int
    recall_model: dict[str, Any]
    recall: dict[str, Any]
    expansion: float = 4

    @property
    def mlp(self) -> MLP:
        """The memory network of arms that do not choose one themselves."""
        return MLP(expansion=self.expansion)

    @property
    def rule(self) -> MirasConfig:
        """The memory rule of arms that do not choose one themselves."""
        return MirasConfig.steady(self.mlp)


CHUNKS = {"chunk_size": 16, "segment_len": 64, "window": 64}
RECALL_MODEL = {"vocab_size": 128, "d_model": 64, "n_layers": 2, "chunk_size": 16, "window": 16, "n_persistent": 0}
GPU = {
    "precision": "bf16",
    "engine": "compiled",
    "warmup_steps": 500,
    "eval_every": 1000,
    "eval_tokens": 2**19,
    "log_every": 100,
}
GPU_MODEL = {"chunk_size": 64, "segment_len": 256, "window": 256}

SCALES = {
    "tiny": Scale(
        text_model={"d_model": 64, "n_layers": 2, "n_persistent": 4, **CHUNKS},
        length=256,
        training={"steps": 120, "batch_size": 8, "lr": 4e-3, "warmup_steps": 20, "eval_every": 0, "save_every": 40},
        lengths=(256, 1024),
        windows=32,
        recall_model={**RECALL_MODEL, "vocab_size": 32},
        recall={"steps": 300, "batch_size": 16, "lr": 5e-3, "pairs": 4, "samples": 64},
        expansion=2,
    ),
    "small": Scale(
        text_model={"d_model": 128, "n_layers": 2, "n_persistent": 4, **CHUNKS},
        length=512,
        training={"steps": 500, "batch_size": 8, "lr": 3e-3, "warmup_steps": 50, "eval_every": 250, "save_every": 50},
        lengths=(512, 1024, 2048),
        windows=64,
        recall_model=RECALL_MODEL,
        recall={},
    ),
    "medium": Scale(
        preset="tiny",
        text_model=GPU_MODEL,
        length=2048,
        training={"steps": 10_000, "batch_size": 16, "lr": 1e-3, **GPU},
        lengths=(2048, 8192, 16_384),
        windows=64,
        recall_model={**RECALL_MODEL, "d_model": 128, "vocab_size": 1024},
        recall={"steps": 2000, "pairs": 16, "length": 128, "lengths": (128, 512, 2048)},
    ),
    "large": Scale(
        preset="small",
        text_model=GPU_MODEL,
        length=4096,
        training={"steps": 20_000, "batch_size": 16, "gradient_accumulation": 2, "lr": 1e-3, **GPU},
        lengths=(4096, 16_384, 32_768),
        windows=64,
        recall_model={**RECALL_MODEL, "d_model": 256, "vocab_size": 4096},
        recall={"steps": 5000, "pairs": 64, "length": 512, "lengths": (512, 2048, 8192), "lr": 2e-3},
    ),
}


class Comparison(BaseModel):
    """Settings of an arm that is measured on text and, if it has such a task, on recall."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: TextTask
    recall: RecallTask | None = None


def corpus(scale: Scale, source: str = "stdlib", data_dir: str | None = None) -> dict[str, Any]:
    """A data section without its length, after a look at whether the corpus is there and long enough.

    Raises:
        ValueError, OSError, ImportError: as `titans.experiments.text.validation_streams`.
    """
    section = {"source": source, "data_dir": data_dir}
    validation_streams(DataSection(length=scale.length, **section), max(scale.lengths), 1, ByteTokenizer())
    return section


def text_task(scale: Scale, variant: Variant, data: Mapping[str, Any], **changes: Any) -> TextTask:
    """A text task of this scale; ``changes`` are fields of its model."""
    fields = {"vocab_size": 256, "max_seq_len": scale.length, "lr": scale.training["lr"], "miras": scale.rule}
    fields = {**fields, **scale.text_model, **changes}
    preset = scale.preset
    model = TitansConfig.preset(preset, variant, **fields) if preset else TitansConfig(variant=variant, **fields)
    sections = {"model": model.to_dict(), "data": {**data, "length": scale.length}, "training": scale.training}
    return TextTask(run=TrainConfig.parse(sections), lengths=scale.lengths, windows=scale.windows)


def recall_task(scale: Scale, variant: Variant, **changes: Any) -> RecallTask:
    """A recall task of this scale; ``changes`` are fields of its model."""
    return RecallTask(
        model=TitansConfig(variant=variant, **{"miras": scale.rule, **scale.recall_model, **changes}), **scale.recall
    )


def comparison(scale: Scale, variant: Variant, data: Mapping[str, Any], **changes: Any) -> Comparison:
    """Both tasks, with the same changes to both models."""
    return Comparison(text=text_task(scale, variant, data, **changes), recall=recall_task(scale, variant, **changes))


def equal_size(arms: Mapping[str, Comparison], like: str) -> dict[str, Comparison]:
    """The arms with their feed-forwards widened or narrowed until their models have the size of arm ``like``'s."""
    text, recall = arms[like].text, arms[like].recall
    text_size, recall_size = parameters(text.run.model), 0 if recall is None else parameters(recall.model)
    return {name: arm if name == like else _resized(arm, text_size, recall_size) for name, arm in arms.items()}


def _resized(arm: Comparison, text_size: int, recall_size: int) -> Comparison:
    text, recall = arm.text, arm.recall
    run = text.run.model_copy(update={"model": match_parameters(text.run.model, text_size)})
    if recall is not None:
        recall = recall.model_copy(update={"model": match_parameters(recall.model, recall_size)})
    return Comparison(text=text.model_copy(update={"run": run}), recall=recall)
