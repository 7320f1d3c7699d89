"""The data of a run: documents and tokenizer from the configuration's ``data`` section, and its batches."""

from dataclasses import dataclass
from pathlib import Path

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
from titans.training.config import ConfigError, TrainConfig

TOKENIZER_DIR = "tokenizer"


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        training: documents of the train split.
        validation: windows of the validation split: the fixed ones of every evaluation, or all of them when the run
            carries state; None when the run never evaluates.
        tokenizer: the tokenizer of both.
    """

    training: TokenDocuments
    validation: EvaluationWindows | None
    tokenizer: Tokenizer


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
        options = {"text_field": section.text_field, "data_dir": section.data_dir}
        training = TokenDocuments.from_texts(load_documents(section.source, "train", **options), tokenizer)
        if not config.training.eval_every:
            return RunData(training, None, tokenizer)
        held_out = TokenDocuments.from_texts(load_documents(section.source, "validation", **options), tokenizer)
        n_windows = None if config.training.carry_state else config.eval_windows
        windows = evaluation_windows(held_out, section.length, n_windows)
        windows = _MeanBytes(windows.documents, windows.length, windows.starts)
    except ConfigError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"data.{error}") from error
    return RunData(training, windows, tokenizer)


class _MeanBytes(EvaluationWindows):
    """Until the windows of `titans.data` count the bytes of their targets themselves: the mean's, exact for bytes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        n_bytes = round((self.length - 1) * self.documents.bytes_per_token)
        return {"bytes": torch.tensor(n_bytes), **super().__getitem__(index)}


class EvaluationStreams(Dataset[dict[str, Tensor]]):
    """Evaluation windows as streams: every document read window after window, several documents at a time.

    Documents come in a fixed random order, each in the row of the batch that is free first; a row that has nothing left
    to read gets windows without targets. Which windows are read does not depend on the size of the batch.

    Args:
        windows: all windows of the split, in the order of the text.
        rows: of a batch, over all processes.
        n: read this many windows at most, ≥ 1; the last document may be cut short.

    Each item is that of ``windows`` with ``fresh``, a bool: the row's state must be reset before it.
    """

    def __init__(self, windows: EvaluationWindows, rows: int, n: int):
        self.windows = windows
        begins = set(windows.documents.offsets.tolist())
        documents: list[list[int]] = []
        for i, start in enumerate(windows.starts):
            if i == 0 or start in begins or start != windows.starts[i - 1] + windows.length:
                documents.append([])
            documents[-1].append(i)
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows: list[list[tuple[int, bool]]] = [[] for _ in range(rows)]
        for document in (documents[i] for i in order):
            row = min(self.rows, key=len)
            row.extend((i, i == document[0]) for i in document[:n])
            n -= len(document[:n])

    def __len__(self) -> int:
        return len(self.rows) * max(map(len, self.rows))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at, row = divmod(index, len(self.rows))
        if at < len(self.rows[row]):
            i, fresh = self.rows[row][at]
            return {**self.windows[i], "fresh": torch.tensor(fresh)}
        item = {**self.windows[0], "fresh": torch.tensor(True)}
        return {**item, "labels": torch.full_like(item["labels"], -100), "bytes": torch.zeros_like(item["bytes"])}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items of a data set as one batch, each entry stacked.

    No document predicts the first token of the one after it: such labels become -100. ``document_ids`` stay only where
    a row holds more than one document: the model has less to do without them.
    """
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    documents = batch.pop("document_ids", None)
    if documents is not None and bool((begins := documents[:, 1:] != documents[:, :-1]).any()):
        batch["labels"][:, 1:].masked_fill_(begins, -100)
        batch["document_ids"] = documents
    return batch


def save_tokenizer(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Write the tokenizer into the model's folder; bytes need none."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(model_dir / TOKENIZER_DIR)


def load_saved_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer that a run saved with its model: the one in the folder, else bytes.

    Raises:
        ValueError: the folder's tokenizer is not readable.
    """
    folder = Path(model_dir) / TOKENIZER_DIR
    return load_tokenizer(folder) if folder.exists() else ByteTokenizer()
