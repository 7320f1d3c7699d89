"""enwik8 and WikiText-103 from a local copy, or downloaded where the network allows it."""

import os
import re
import tempfile
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from shutil import copyfileobj

from titans.data.sources import corpus
from titans.names import path_of

ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
WIKITEXT103_URL = "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"
TIMEOUT_SECONDS = 30


def data_folder(data_dir: str | Path | None = None) -> Path:
    """``data_dir``, else the environment variable ``TITANS_DATA``, else ``~/.cache/titans``."""
    if data_dir is not None:
        return path_of("data_dir", data_dir).expanduser()
    return Path(os.environ.get("TITANS_DATA") or Path.home() / ".cache" / "titans").expanduser()


@corpus("enwik8")
def enwik8_documents(split: str, data_dir: str | Path | None = None) -> list[str]:
    """The first 90 MB, next 5 MB or last 5 MB of enwik8, as one document.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        data_dir: folder with ``enwik8`` or ``enwik8.zip``; default as :func:`data_folder`.

    Raises:
        FileNotFoundError: neither file is there and the download fails.
        ValueError: the file is not exactly 100,000,000 bytes long.
    """
    content = _find("enwik8", [("enwik8", None), ("enwik8.zip", "enwik8")], ENWIK8_URL, data_dir)
    if len(content) != ENWIK8_BYTES:
        raise ValueError(
            f"source: enwik8 has {len(content):,} bytes instead of {ENWIK8_BYTES:,}; fetch {ENWIK8_URL} anew"
        )
    first = _character_start(content, ENWIK8_BYTES * 90 // 100)
    second = _character_start(content, ENWIK8_BYTES * 95 // 100)
    begin, end = {"train": (0, first), "validation": (first, second), "test": (second, len(content))}[split]
    return [content[begin:end].decode("utf-8", errors="replace")]


@corpus("wikitext-103")
def wikitext103_documents(split: str, data_dir: str | Path | None = None) -> list[str]:
    """The articles of WikiText-103, headings included.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        data_dir: folder with ``wikitext-103-raw-v1.zip`` or its folder ``wikitext-103-raw``, or the word-level forms
            ``wikitext-103-v1.zip`` and ``wikitext-103``; default as :func:`data_folder`.

    Raises:
        FileNotFoundError: none of these is there and the download fails.
    """
    part = {"train": "train", "validation": "valid", "test": "test"}[split]
    raw, words = f"wikitext-103-raw/wiki.{part}.raw", f"wikitext-103/wiki.{part}.tokens"
    places = [(raw, None), ("wikitext-103-raw-v1.zip", raw), (words, None), ("wikitext-103-v1.zip", words)]
    text = _find("wikitext-103", places, WIKITEXT103_URL, data_dir).decode("utf-8", errors="replace")
    # An article starts at a line " = Title = "; sections have more than one equals sign.
    articles = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
    found = [article for article in articles if article.strip()]
    if not found:
        raise ValueError(f"source: the {part} part of wikitext-103 in {data_folder(data_dir)} holds no text")
    return found


def _find(name: str, places: list[tuple[str, str | None]], url: str, data_dir: str | Path | None) -> bytes:
    """Content of the first place that exists, each a file below the data folder and, for a zip, its member.

    Without any of them the zip at ``url`` is downloaded into the data folder.
    """
    folder = data_folder(data_dir)
    for file, member in places:
        if (folder / file).is_file():
            return _read(folder / file, member)
    target = folder / url.rsplit("/", 1)[1]
    try:
        _download(url, target)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"source: {name} is not here and could not be downloaded ({error}); fetch {url} and put it at {target}"
        ) from error
    return _read(target, dict(places)[target.name])


def _download(url: str, target: Path) -> None:
    """Fetch ``url``; ``target`` appears whole or not at all, also when several processes fetch it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise OSError(f"connection closed after {file.tell()} of {expected} bytes")
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(file: Path, member: str | None) -> bytes:
    if member is None:
        return file.read_bytes()
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        # RuntimeError: encrypted; NotImplementedError: an unknown compression
        raise ValueError(f"source: {file} is not a zip file with {member} in it: {error}") from error


def _character_start(content: bytes, position: int) -> int:
    """``position``, moved on to the next start of a UTF-8 character so that no cut changes a byte."""
    while position < len(content) and content[position] & 0xC0 == 0x80:
        position += 1
    return position
