"""Corpora as lists of documents: Python's standard library by default, local files, and those with a name.

Every source has a train and a validation split that never share a document and are the same on every run.
"""

import codecs
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from titans.data.sources import CORPORA, corpus
from titans.names import each_key_once, path_of, suggestion

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
STDLIB_SHARE = 0.08  # of the files; 6 to 7 % of the bytes on Python 3.10 to 3.13
LOCAL_SHARE = 0.05

RUN_MARK = "# titans run "  # how the config.yaml begins that a training run leaves in its folder

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


def load_documents(
    source: str | Path = "stdlib",
    split: str = "train",
    *,
    text_field: str = "text",
    data_dir: str | Path | None = None,
) -> list[str]:
    """The documents of one split of a corpus, in a fixed order.

    Local texts are taken as they stand, line ends, NULs and all, and must be UTF-8; of the corpora with a name, bytes
    that are none become U+FFFD. A byte order mark at the beginning of a ``.txt`` or ``.jsonl`` file is no text and is
    dropped.

    Args:
        source: ``"stdlib"`` (default: the source files of Python's own standard library, read where Python keeps
            them), another corpus's name (``"enwik8"``, ``"wikitext-103"``, see `corpus`), or the path of a ``.txt``
            file (one document), a ``.jsonl`` or ``.parquet`` file (one document a row) or a folder of such files, links
            to files and folders followed. A folder whose files or sub-folders are named after their split (``train``
            and ``validation``, ``valid`` or ``val``, perhaps ``test``) keeps these splits. All else is split here: 5 %
            of the documents, chosen by their hash, or the last 5 % of a single document are validation. Folders of
            training runs inside it are left out: a run's output is never input.
        split: ``"train"``, ``"validation"``, or ``"test"`` where the corpus has one.
        text_field: the key or column that holds the text of a ``.jsonl`` or ``.parquet`` row.
        data_dir: folder of the published corpora; default: the environment variable ``TITANS_DATA``, else
            ``~/.cache/titans``.

    Raises:
        ValueError: an argument or a file's content is wrong; the message names it.
        FileNotFoundError: the corpus is not on this machine; the message says which file to put where.
        OSError: a file or a folder inside it cannot be read; nothing is left out in silence.
        ImportError: a ``.parquet`` file is asked for and pyarrow is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}{suggestion(split, SPLITS)}")
    path = Path(os.path.expanduser(path_of("source", source)))  # a home that is nobody's is a name like any other
    if source in CORPORA:
        return CORPORA[str(source)](split, data_dir)
    if not path.exists():
        raise FileNotFoundError(
            f"source: {str(source)!r} is neither {', '.join(CORPORA)} nor an existing file or folder"
            f"{suggestion(str(source), CORPORA)}"
        )
    return _local_documents(path, split, text_field)


@corpus("stdlib")
def stdlib_documents(split: str, data_dir: str | Path | None = None) -> list[str]:
    """The source files of Python's own standard library, read where Python keeps them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    files = sorted((name, path) for name, path in files if _belongs_to_stdlib(name))
    if not files:
        raise FileNotFoundError(
            f"source: Python's standard library has no .py files in {root}; name a text file or folder instead"
        )
    chosen = [path for name, path in files if _stdlib_split(name) == split]
    if not chosen:
        raise _no_such_split("stdlib", split)
    # Line ends are made alike, as Python does when it reads source: the corpus is the same on every machine.
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in chosen)
    return [text for text in texts if text]


def _belongs_to_stdlib(name: str) -> bool:
    """Whether a file is library source and the same on every machine (no tests, no add-ons, no build records)."""
    *folders, file = name.split("/")
    generated = file.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
    return not generated and not _STDLIB_SKIPPED.intersection(folders)


def _stdlib_split(name: str) -> str:
    # By the hash of the name: the same on every machine, and a file keeps its side from one Python to the next. The
    # prefix is chosen so that validation holds typical modules, not the one 750 KB file of help texts.
    digest = hashlib.sha256(f"standard-library/{name}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < STDLIB_SHARE * 2**64 else "train"


def _local_documents(path: Path, split: str, text_field: str) -> list[str]:
    files = _files_of(path)
    own_splits = _files_by_split(path, files) if path.is_dir() else {}
    if own_splits:
        if split not in own_splits:
            raise _no_such_split(path, split)
        return _read_files(own_splits[split], path, text_field)
    if split == "test":
        raise _no_such_split(path, split)
    train, validation = _split_documents(_read_files(files, path, text_field))
    documents = train if split == "train" else validation
    if not documents:
        raise ValueError(f"source: {path} is too small or too uniform to give a {split} split")
    return documents


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise ValueError(f"source: {path} is none of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"source: {path} is neither a regular file nor a folder")
    files = sorted(file for file in walk_files(path) if suffix_of(file) in SUFFIXES)
    if not files:
        raise ValueError(f"source: folder {path} holds no {', '.join(SUFFIXES)} file")
    for file in files:
        if not file.is_file():
            what = "is no regular file" if file.exists() else "is a link to nothing"
            raise ValueError(f"source: {file} {what}; take it out of the folder or put a text there")
    return files


def suffix_of(path: Path) -> str:
    """What a file holds by its name: ``.TXT`` is ``.txt``."""
    return path.suffix.lower()


def walk_files(root: Path) -> Iterator[Path]:
    """Every file below ``root``, links to folders followed, but those of training runs.

    Raises:
        ValueError: links lead round in a circle.
        OSError: a folder cannot be read.
    """
    waiting: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while waiting:
        folder, above = waiting.pop()
        here = os.path.realpath(folder)
        if here in above:
            raise ValueError(f"source: {folder} is a link to a folder that it lies in")
        if _is_run(folder):
            continue
        with os.scandir(folder) as entries:
            for path in map(Path, entries):
                if path.is_dir():
                    waiting.append((path, (*above, here)))
                else:
                    yield path


def _is_run(folder: Path) -> bool:
    try:
        with (folder / "config.yaml").open("rb") as file:
            return file.readline(200).removeprefix(codecs.BOM_UTF8).startswith(RUN_MARK.encode())
    except OSError:
        return False


def _files_by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files grouped by the split that the words of their names tell; empty unless train and validation both occur."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.relative_to(root).with_suffix("").as_posix().lower())
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
        groups.setdefault(split, []).append(file)
    if not {"train", "validation"} <= groups.keys():
        return {}
    if "" in groups:
        raise ValueError(f"source: {groups[''][0]} names no split while other files of {root} do; move or rename it")
    return groups


def _split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Train and validation documents; equal documents always fall on the same side."""
    if len(documents) == 1:
        text = documents[0]
        cut = len(text) - round(len(text) * LOCAL_SHARE)
        parts = [[part] if part else [] for part in (text[:cut], text[cut:])]
        return parts[0], parts[1]
    digests = [hashlib.sha256(text.encode("utf-8", errors="replace")).digest() for text in documents]
    last = sorted(digests)[max(1, round(len(documents) * LOCAL_SHARE)) - 1]
    train = [text for text, digest in zip(documents, digests) if digest > last]
    validation = [text for text, digest in zip(documents, digests) if digest <= last]
    return train, validation


def _read_files(files: list[Path], source: Path, text_field: str) -> list[str]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    documents = [text for file in files for text in readers[suffix_of(file)](file, text_field) if text]
    if not documents:
        raise ValueError(f"source: {source} holds no text")
    return documents


def _read_text(file: Path, text_field: str) -> list[str]:
    return [_text_of(file.read_bytes(), file)]


def _read_jsonl(file: Path, text_field: str) -> list[str]:
    with file.open("rb") as lines:
        return list(read_jsonl(file, text_field, lines))


def read_jsonl(file: Path, text_field: str, lines: Iterable[bytes]) -> Iterator[str]:
    """The texts of a ``.jsonl`` file, one a line; ``lines`` are those of the file, open for bytes."""
    # Bytes end a line at \n alone; in text mode other characters could.
    begin = 0
    for number, content in enumerate(lines, start=1):
        line = _text_of(content, file, begin)
        begin += len(content)
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=each_key_once)
        except (ValueError, RecursionError) as error:  # not JSON, a key twice, thousands of digits, too deep
            raise ValueError(f"source: {file}, line {number} is not JSON: {error}") from error
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"text_field: {file}, line {number} has no text under {text_field!r}")
        yield text


def _read_parquet(file: Path, text_field: str) -> list[str]:
    return [text for text, _ in read_parquet(file, text_field)]


def read_parquet(file: Path, text_field: str) -> Iterator[tuple[str, float]]:
    """The texts of a ``.parquet`` file, a few rows in memory at a time, each with the share of rows read with it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"source: {file} needs pyarrow; pip install 'titans-miras[train]'") from None
    read = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"text_field: {file} has no column {text_field!r}, only {', '.join(columns)}")
            for batch in table.iter_batches(batch_size=64, columns=[text_field]):
                for scalar in batch.column(0):
                    read += 1
                    value = scalar.as_py()
                    if value is not None and not isinstance(value, str):
                        raise ValueError(f"text_field: column {text_field!r} of {file} is not text")
                    if value is not None:
                        yield value, read / table.metadata.num_rows
    except UnicodeDecodeError as error:
        raise ValueError(f"source: {file}, row {read}: {not_utf8(error.start)} of the row's text") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"source: {file} is not a readable .parquet file: {error}") from error


def _text_of(content: bytes, file: Path, begin: int = 0) -> str:
    """The text of a file's bytes from ``begin`` on, without the byte order mark of the whole."""
    mark = 0
    if not begin:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"source: {file} is UTF-16, texts must be UTF-8")
        mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"source: {file}: {not_utf8(begin + mark + error.start)}") from error


def not_utf8(byte: int) -> str:
    """What to say of a text whose bytes are no UTF-8 from ``byte`` on, counted from 0."""
    return f"not UTF-8 at byte {byte:,}; convert it first, say with iconv -t UTF-8"


def _no_such_split(source: str | Path, split: str) -> ValueError:
    return ValueError(f"split: {source} has no {split!r} split")
