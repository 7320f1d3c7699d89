"""A text file and a run small enough for a second."""

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from titans.training.config import TrainConfig
from titans.training.run import train

WORDS = ("the", "memory", "reads", "what", "surprises", "it", "and", "forgets", "all", "that", "no", "longer", "helps")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text of 20 kB in which words follow each other at random."""
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=4000)))
    return path


def tiny_config(corpus: Path, folder: Path, *overrides: str) -> TrainConfig:
    raw = {
        "model": {"vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 8, "n_persistent": 2},
        "data": {"source": str(corpus), "length": 24},
        "training": {
            "output_dir": str(folder), "steps": 8, "batch_size": 2, "lr": 3e-3, "warmup_steps": 2, "eval_every": 8,
            "eval_tokens": 200, "save_every": 3, "device": "cpu", "threads": 1,
        },
    }  # fmt: skip
    return TrainConfig.parse(raw, overrides)


@pytest.fixture(scope="session")
def tiny(corpus):
    """Function that makes the configuration of a tiny run into any folder."""
    return lambda folder, *overrides: tiny_config(corpus, folder, *overrides)


@pytest.fixture
def make_config(corpus, tmp_path):
    """Function that makes the configuration of a tiny run into ``tmp_path / name``."""
    return lambda name="run", *overrides: tiny_config(corpus, tmp_path / name, *overrides)


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """Folder of the tiny run, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_config(corpus, folder), console=Console(file=io.StringIO()))
    return folder
