"""The trained models in models/: small, complete, and able to do what their cards say."""

import math
from pathlib import Path

import pytest
import torch

from titans import load_model
from titans.data import ByteTokenizer, TokenDocuments, evaluation_windows, load_documents
from titans.evaluation import nats_by_position
from titans.evaluation.niah import NEEDLE, QUESTION

ROOT = Path(__file__).parents[1]
MODELS = sorted(folder for folder in (ROOT / "models").iterdir() if folder.is_dir())
MOST_BYTES = 6_000_000


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_every_model_is_small_and_has_a_card(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES
    card = (folder / "README.md").read_text()
    for said in ("## Data", "## Training", "## Results", "## Limits"):
        assert said in card
    assert load_model(folder).config.vocab_size == ByteTokenizer().vocab_size


@pytest.mark.parametrize("at", [0.1, 0.6])
def test_the_finder_answers_from_its_memory_alone(at):
    tokenizer, model = ByteTokenizer(), load_model(ROOT / "models" / "finder").eval()
    lines = next(text for text in load_documents("stdlib", "validation") if len(text) > 8000)[:8000].split("\n")
    lines.insert(int(len(lines) * at), NEEDLE.format(kind="number", key="garden-shed", value="4719305"))
    memory = model.memorize("\n".join(lines), tokenizer)
    question = torch.tensor([tokenizer.encode(QUESTION.format(kind="number", key="garden-shed"))])
    with torch.no_grad():
        told = model.generate(question, state=memory, max_new_tokens=8)[0, question.shape[1] :]
        unread = model.generate(question, max_new_tokens=8)[0, question.shape[1] :]
    assert tokenizer.decode(told.tolist()) == " 4719305" != tokenizer.decode(unread.tolist())


def test_the_finder_says_how_it_is_asked():
    told = (ROOT / "models" / "finder" / "question.txt").read_text()
    assert told == QUESTION.format(kind="number", key="{}")


def test_the_reader_reads_the_better_for_its_memory():
    """In the second half of a window a byte costs a tenth of a bit more without it, at least."""
    model = load_model(ROOT / "models" / "reader").eval()
    documents = TokenDocuments.from_texts(load_documents("stdlib", "validation"), ByteTokenizer())
    windows = evaluation_windows(documents, 2048, 4)
    ids = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    on, reset = (
        nats_by_position(model, [ids], segment=model.config.segment, memory=mode)[1024:].mean() / math.log(2)
        for mode in ("on", "reset")
    )
    assert on + 0.1 < reset < 2.5
