"""A text model as part of a unit: trained once, gone on with after a break, measured from its saved weights."""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.framework.experiment import Stopped, Workplace
from experiments.framework.recall import device
from titans.data import TokenDocuments, Tokenizer, evaluation_windows, load_documents
from titans.evaluation import MemoryMode, nats_by_position
from titans.models import load_model
from titans.training import ConfigError, TrainConfig
from titans.training.checkpoints import CONFIG_FILE, METRICS_FILE, MODEL_DIR, check_same, last_checkpoint
from titans.training.config import DataSection
from titans.training.data import load_saved_tokenizer
from titans.training.plots import read_metrics

READ_AT_ONCE = 2**14  # tokens


@dataclass(frozen=True)
class GivenModel:
    """A finished model that is measured without training.

    Args:
        name: of its arm, after its folder.
        folder: the whole path.
        weights: SHA-256 of its weights.
    """

    name: str
    folder: Path
    weights: str

    @classmethod
    def of(cls, folder: Path) -> "GivenModel":
        """The model of a folder, its tokenizer beside it.

        Raises:
            ValueError, OSError: it is none that can read its tokenizer's ids.
        """
        tokenizer, vocabulary = load_saved_tokenizer(folder), load_model(folder).config.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ValueError(f"--model: its tokenizer has {tokenizer.vocab_size} ids, the model knows {vocabulary}")
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        return cls(re.sub(r"[^\w.-]+", "-", folder.resolve().name), folder.resolve(), weights)


def train_text(run: TrainConfig, seed: int, place: Workplace) -> Path:
    """Train, from the last checkpoint if there is one, not at all if the model is there. Returns the model's folder.

    The output folder and the seed of ``run`` are the unit's. The record keeps ``losses`` and ``gradient_norms``, one
    per step.

    Raises:
        ConfigError: unusable data, or a run of other settings in the unit's folder.
        Stopped: a signal came; a checkpoint is saved.
        NonFiniteError: the loss or a gradient became non-finite.
    """
    from titans.training.run import train  # transformers takes seconds to import

    folder = place.folder / "text"
    changes = {"output_dir": str(folder), "seed": seed}
    config = run.model_copy(update={"training": run.training.model_copy(update=changes)})
    whole, begun = (folder / MODEL_DIR).exists(), last_checkpoint(folder) is not None
    if whole or begun:
        check_same(config, folder / CONFIG_FILE)
        # A resumed run may have another end of its schedule, a unit may not.
        steps = TrainConfig.load(folder / CONFIG_FILE).training.steps
        if steps != config.training.steps:
            raise ConfigError(f"training.steps: the run in {folder} has {steps}, not {config.training.steps}")
    if not whole and (result := train(config, resume=begun, console=place.console)).model_dir is None:
        raise Stopped(result.signal or 0)
    steps = read_metrics(folder / METRICS_FILE)
    place.raw["losses"] = [step["loss"] for step in steps if "loss" in step]
    place.raw["gradient_norms"] = [step["grad_norm"] for step in steps if "grad_norm" in step]
    return folder / MODEL_DIR


def bits_by_position(
    model_dir: Path, data: DataSection, length: int, windows: int, memory: MemoryMode = "on"
) -> Tensor:
    """Bits per byte at every position of validation streams.

    Args:
        model_dir: a saved model, its tokenizer beside it.
        data, length, windows: see `validation_streams`.
        memory: as `titans.evaluation.nats_by_position`, "reset" at every segment of the model.

    Returns:
        float64 ``[length - 1]``; entry t is the cost of token t + 1.
    """
    ids, bytes_per_token = validation_streams(data, length, windows, load_saved_tokenizer(model_dir))
    model = load_model(model_dir).to(device())
    batches = ids.to(device()).split(max(1, READ_AT_ONCE // length))
    nats = nats_by_position(model, batches, segment=model.config.segment, memory=memory)
    return nats.cpu() / (math.log(2) * bytes_per_token)


def validation_streams(data: DataSection, length: int, windows: int, tokenizer: Tokenizer) -> tuple[Tensor, float]:
    """Streams of the validation split, int64 ``[windows, length]``, and the bytes of its mean token.

    Args:
        data: the corpus.
        length: tokens of a stream.
        windows: streams, each inside a document, evenly spread over the split; fewer if it holds fewer.
        tokenizer: the model's.

    Raises:
        ValueError, OSError, ImportError: as `titans.data.load_documents`, or no document of the split is as long as a
            stream.
    """
    documents = TokenDocuments.from_texts(validation_texts(data), tokenizer)
    streams = evaluation_windows(documents, length, windows, whole=True)
    return torch.stack([streams[i]["input_ids"] for i in range(len(streams))]), documents.bytes_per_token


def validation_texts(data: DataSection) -> list[str]:
    """The documents of the validation split; raises as `titans.data.load_documents`."""
    return load_documents(data.source, "validation", text_field=data.text_field, data_dir=data.data_dir)
