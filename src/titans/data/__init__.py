"""Tokenizers, corpora, windows and synthetic tasks."""

import importlib
import pkgutil

from titans.data.corpora import load_documents
from titans.data.documents import TokenDocuments
from titans.data.sources import corpus
from titans.data.synthetic import iid_batch, mqar_accuracy, mqar_batch
from titans.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from titans.data.windows import (
    EvaluationWindows,
    StreamDataset,
    WindowDataset,
    bits_per_byte,
    evaluation_windows,
)

__all__ = [
    "ByteTokenizer",
    "EvaluationWindows",
    "HuggingFaceTokenizer",
    "StreamDataset",
    "TokenDocuments",
    "Tokenizer",
    "WindowDataset",
    "bits_per_byte",
    "corpus",
    "evaluation_windows",
    "iid_batch",
    "load_documents",
    "load_tokenizer",
    "mqar_accuracy",
    "mqar_batch",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)  # a new file here is found by itself
