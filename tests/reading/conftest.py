"""A tiny model in a folder, and files to read."""

import json

import pytest
import torch

from titans.data import ByteTokenizer
from titans.models import TitansConfig, build_model
from titans.models import memorize as memorizing

TEXTS = ("the quick brown fox. " * 20, "jumps over\n" * 33, "the lazy dog " * 31)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(memorizing, "PIECE", 70)  # 64 with segments of 16


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    fields = {"variant": "MAC", "vocab_size": 256, "d_model": 16, "n_layers": 1, "chunk_size": 16, "n_persistent": 2}
    return build_model(TitansConfig(**fields)).eval()


@pytest.fixture(scope="session")
def model_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def files(tmp_path):
    """a.txt, b.jsonl (two rows), c.txt."""
    (tmp_path / "a.txt").write_text(TEXTS[0])
    rows = [TEXTS[1][:100], TEXTS[1][100:]]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "c.txt").write_text(TEXTS[2])
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.txt")]
