"""The data of a run: documents and tokenizer from the configuration's ``data`` section, and its batches."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data import (
    ByteTokenizer,
    EvaluationWindows,
    HuggingFaceTokenizer,
    TokenDocuments,
    Tokenizer,
    evaluation_windows,
    load_documents,
    load_tokenizer,
)
from titans.evaluation import TaskRows
from titans.evaluation.task import NotMeasurable
from titans.models import byte_tokenizer
from titans.models.byte_tokenizer import BYTES, OLDER, SETTINGS, TOKENIZER, spells_bytes
from titans.names import path_of
from titans.training.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        training: documents of the train split, or all rows of the run where it trains on tasks.
        validation: fixed windows or rows of the validation split; None when the run never evaluates.
        tokenizer: the tokenizer of both.
    """

    training: TokenDocuments | TaskRows
    validation: EvaluationWindows | TaskRows | None
    tokenizer: Tokenizer

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """A hash of the tokens of each split, None for one that is not read."""
        held_out = self.validation.documents if isinstance(self.validation, EvaluationWindows) else self.validation
        return {"train": self.training.fingerprint, "validation": None if held_out is None else held_out.fingerprint}


def load_data(config: TrainConfig) -> RunData:
    """Read and tokenise both splits.

    Raises:
        ConfigError: the corpus or tokenizer is missing or unusable, too short for one window, or has more token ids
            than the model.
    """
    section = config.data
    try:
        tokenizer = load_tokenizer(section.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of "
                f"data.tokenizer {section.tokenizer!r}"
            )
        if section.tasks is not None:
            return _task_data(config, section.tasks, tokenizer)
        options = {"text_field": section.text_field, "data_dir": section.data_dir}
        training = TokenDocuments.from_texts(load_documents(section.source, "train", **options), tokenizer)
        if len(training.tokens) < section.length:
            raise ConfigError(
                f"data.length: {section.length} is more than the {len(training.tokens)} tokens of the train split of "
                f"data.source {section.source!r}"
            )
        if not config.training.eval_every:
            return RunData(training, None, tokenizer)
        held_out = TokenDocuments.from_texts(load_documents(section.source, "validation", **options), tokenizer)
        windows = evaluation_windows(held_out, section.length, config.eval_windows)
    except ConfigError:
        raise
    except NotMeasurable as error:
        raise ConfigError(f"data.length: {error}") from error
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise ConfigError(f"data.{told}" if told.startswith(("source", "tokenizer")) else f"data: {told}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"data.{error}") from error
    return RunData(training, windows, tokenizer)


def _task_data(config: TrainConfig, tasks: dict[str, float], tokenizer: Tokenizer) -> RunData:
    settings, section = config.training, config.data

    def rows(n: int, split: str) -> TaskRows:
        where = {"text": section.source, "split": split, "questions": section.questions}
        return TaskRows(tasks, tokenizer, section.length, n, settings.seed, **where)

    held_out = rows(config.eval_windows, "validation") if settings.eval_every else None
    return RunData(rows(settings.steps * settings.windows_per_step, "train"), held_out, tokenizer)


class EvaluationStreams(Dataset[dict[str, Tensor]]):
    """Documents as streams, for evaluation with carried state: each is read window after window, several at a time.

    Documents come in a fixed random order, each in the row of the batch that is free first; rows with nothing left to
    read get windows without targets. What is read does not depend on the size of the batch. The first token of a window
    is read and not scored, as in training.

    Args:
        documents: what to read.
        length: tokens a window, ≥ 2.
        rows: of a batch, over all processes.
        n: read this many windows at most, ≥ 1; the last document may be cut short.

    Each item is ``{"input_ids", "labels", "bytes", "fresh"}`` as of `titans.data.evaluation_windows`; ``fresh``, a
    bool, says that the row's state must be reset before it.
    """

    def __init__(self, documents: TokenDocuments, length: int, rows: int, n: int):
        self.documents = documents
        self.length = length
        self.rows: list[list[tuple[int, int, bool]]] = [[] for _ in range(rows)]  # start, stop, fresh
        for i in torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist():
            begin, end = documents.offsets[i : i + 2].tolist()
            starts = range(begin, end - 1, length)[:n]  # a last token alone would be no target
            min(self.rows, key=len).extend((start, min(start + length, end), start == begin) for start in starts)
            n -= len(starts)

    def __len__(self) -> int:
        return len(self.rows) * max(map(len, self.rows))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at, row = divmod(index, len(self.rows))
        start, stop, fresh = self.rows[row][at] if at < len(self.rows[row]) else (0, 0, True)
        ids = self.documents.window(start, self.length)  # what follows a document's end is read in vain, then reset
        labels = ids.clone()
        labels[stop - start :] = -100
        n_bytes = int(self.documents.byte_lengths[start + 1 : stop].sum())
        return {"input_ids": ids, "labels": labels, "bytes": torch.tensor(n_bytes), "fresh": torch.tensor(fresh)}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items of a data set as one batch, each entry stacked.

    ``document_ids`` stay only where a row holds more than one document: the model has less to do without them.
    """
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    documents = batch.get("document_ids")
    if documents is not None and bool((documents == documents[:, :1]).all()):
        del batch["document_ids"]
    return batch


def save_tokenizer(tokenizer: Tokenizer, model_dir: str | Path) -> None:
    """Write the tokenizer into the model's folder, in the files that ``AutoTokenizer`` opens."""
    auto_tokenizer(tokenizer).save_pretrained(path_of("model_dir", model_dir))


def auto_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """The same tokenizer as transformers has it: end, begin and padding are the separator, which no text can spell."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            for name, text in byte_tokenizer.files().items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            return PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.save(folder)
        backend = Backend.from_file(str(Path(folder) / TOKENIZER))
    end = backend.id_to_token(tokenizer.separator_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",  # of prompts: what is generated follows the last token
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_saved_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer that lies in a model's folder, else bytes.

    Raises:
        ValueError: the folder's tokenizer is not readable.
    """
    folder = path_of("model_dir", model_dir)
    settings, older = folder / SETTINGS, folder / OLDER
    if not settings.exists() and not (folder / TOKENIZER).exists():
        return load_tokenizer(older) if older.exists() else ByteTokenizer()
    try:
        told = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        if told.get(BYTES):
            if (folder / TOKENIZER).exists() and not spells_bytes(folder / TOKENIZER):
                raise ValueError(f"tokenizer: {folder / TOKENIZER} is not that of bytes, as {settings} says it is")
            return ByteTokenizer()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(f"tokenizer: {settings} is no mapping in JSON: {error}") from error
    return load_tokenizer(folder)
