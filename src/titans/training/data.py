"""The data of a run: documents and tokenizer from the configuration's ``data`` section."""

import shutil
from dataclasses import dataclass
from pathlib import Path

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
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        training: documents of the train split.
        validation: fixed windows of the validation split; None when the run never evaluates.
        bytes_per_token: mean bytes of a validation token.
        tokenizer: the tokenizer of both.
    """

    training: TokenDocuments
    validation: EvaluationWindows | None
    bytes_per_token: float
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
            return RunData(training, None, training.bytes_per_token, tokenizer)
        held_out = TokenDocuments.from_texts(load_documents(section.source, "validation", **options), tokenizer)
        n_windows = max(1, config.training.eval_tokens // section.length)
        windows = evaluation_windows(held_out, section.length, n_windows)
    except ConfigError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"data.{error}") from error
    return RunData(training, windows, held_out.bytes_per_token, tokenizer)


def save_tokenizer(tokenizer: Tokenizer, model_dir: Path) -> None:
    """Copy the tokenizer's files into the model's folder; bytes need none."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return
    target = model_dir / TOKENIZER_DIR
    target.mkdir()
    folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if tokenizer.path.is_file():
        shutil.copyfile(tokenizer.path, target / "tokenizer.json")


def load_saved_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer that a run saved with its model: the one in the folder, else bytes.

    Raises:
        ValueError: the folder's tokenizer is not readable.
    """
    folder = Path(model_dir) / TOKENIZER_DIR
    return load_tokenizer(folder) if folder.exists() else ByteTokenizer()
