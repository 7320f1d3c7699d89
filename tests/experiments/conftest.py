"""A scale at which a unit takes less than a second, and stand-ins of the published corpora."""

import io

import pytest
from rich.console import Console

from experiments.framework import SCALES
from experiments.framework.scales import Scale
from titans.data import published

SMOKE = Scale(
    model={"d_model": 16, "n_layers": 1, "n_persistent": 2, "chunk_size": 8, "segment_len": 16, "window": 16},
    length=32,
    training={
        "steps": 3, "batch_size": 2, "lr": 1e-3, "warmup_steps": 1, "eval_every": 0, "save_every": 1, "device": "cpu",
    },
    lengths=(32, 64),
    windows=2,
    recall={
        "model": {"vocab_size": 16, "d_model": 16, "n_layers": 1, "chunk_size": 8, "window": 8, "n_persistent": 0},
        "steps": 2, "batch_size": 2, "length": 16, "pairs": 2, "lengths": (16, 32), "samples": 4,
    },
    expansion=2,
)  # fmt: skip
ENWIK8 = "It is [[memory]] that &lt;reads&gt; naïve text. " * 125
ARTICLE = " \n = {} = \n \n The {} of a <unk> memory , and what it reads . \n \n"


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
    """ "tiny" is smaller still."""
    monkeypatch.setitem(SCALES, "tiny", SMOKE)


@pytest.fixture
def console():
    """A console whose text is in ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=500)


@pytest.fixture
def corpus(tmp_path):
    """A local text file."""
    path = tmp_path / "corpus.txt"
    path.write_text("what the memory reads it may forget, " * 200)
    return path


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Published corpora are small and come from the disk or not at all."""
    monkeypatch.setattr(published, "ENWIK8_URL", (tmp_path / "server" / "enwik8.zip").as_uri())
    monkeypatch.setattr(published, "WIKITEXT103_URL", (tmp_path / "server" / "wikitext-103-raw-v1.zip").as_uri())
    monkeypatch.setattr(published, "ENWIK8_BYTES", len(ENWIK8.encode()))
    monkeypatch.setenv("TITANS_DATA", str(tmp_path / "cache"))


@pytest.fixture
def enwik8(tmp_path, no_network):
    """A file of enwik8's name."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "enwik8").write_text(ENWIK8)
    return tmp_path / "local" / "enwik8"


@pytest.fixture
def wikitext(tmp_path, no_network):
    """A folder of WikiText-103's name and layout."""
    folder = tmp_path / "local" / "wikitext-103-raw"
    folder.mkdir(parents=True)
    for part, articles in (("train", 40), ("valid", 6), ("test", 6)):
        text = "".join(ARTICLE.format(f"{part} {i}", i) for i in range(articles))
        (folder / f"wiki.{part}.raw").write_text(text)
    return folder
