"""Perplexity by position adds up to the loss that the model itself reports."""

import math

import pytest
import torch

from titans import TitansConfig, build_model
from titans.data import ByteTokenizer, evaluation_windows
from titans.evaluation import training_batch
from titans.evaluation.ppl import Perplexity, ranges
from titans.evaluation.running_text import running_text
from titans.evaluation.task import NotMeasurable


@pytest.fixture
def task(text):
    return Perplexity(running_text(text))


def model_of(variant="MAG", vocab=500):
    torch.manual_seed(0)
    config = TitansConfig(variant=variant, vocab_size=vocab, d_model=16, n_layers=1, chunk_size=4, window=8)
    return build_model(config).double().eval()


def test_ranges_cover_every_prediction_once():
    assert ranges(64) == [(0, 63)]
    assert ranges(129) == [(0, 128)]
    assert ranges(130) == [(0, 128), (128, 129)]
    assert ranges(2049) == [(0, 128), (128, 512), (512, 2048)]
    assert ranges(8000) == [(0, 128), (128, 512), (512, 2048), (2048, 7999)]


def test_figures_are_the_models_own_loss(task, tokenizer):
    model = model_of()
    records = task.measure(model, tokenizer, 200, [0, 1, 2], 3, seed=0)
    figures = task.summary(records)
    windows = evaluation_windows(task.documents(tokenizer), 200, 3)
    ids = torch.stack([windows[i]["input_ids"] for i in range(3)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        silent = model(ids, labels=ids, store_mask=torch.zeros_like(ids)).loss.item()
    bits = loss / math.log(2) / task.documents(tokenizer).bytes_per_token
    assert figures["memory"]["on"] == pytest.approx({"bits_per_byte": bits, "perplexity": math.exp(loss)}, rel=1e-6)
    assert figures["memory"]["off"]["perplexity"] == pytest.approx(math.exp(silent), rel=1e-6)
    assert figures["score"] == pytest.approx(bits, rel=1e-6) and figures["stride"] == 200
    parts = figures["by_position"]
    assert list(parts) == ["0-128", "128-199"]
    total = 128 * math.log(parts["0-128"]["on"]["perplexity"]) + 71 * math.log(parts["128-199"]["on"]["perplexity"])
    assert total / 199 == pytest.approx(loss, rel=1e-6)
    assert len({figures["memory"][mode]["perplexity"] for mode in ("on", "reset", "off")}) == 3


def test_a_record_does_not_depend_on_its_group(task):
    model = model_of()
    together = task.measure(model, ByteTokenizer(), 100, [0, 1], 2, seed=0)
    alone = task.measure(model, ByteTokenizer(), 100, [1], 2, seed=5)
    assert alone[0]["nats"]["reset"] == pytest.approx(together[1]["nats"]["reset"])
    assert alone[0]["nats"]["on"] != pytest.approx(together[0]["nats"]["on"])


def test_a_baseline_has_no_memory_to_reset(task):
    (record,) = task.measure(model_of("swa"), ByteTokenizer(), 100, [0], 1, seed=0)
    assert list(record["nats"]) == ["on"]


def test_there_are_as_many_windows_as_the_text_has(task):
    held = len(task.documents(ByteTokenizer()).tokens)
    assert task.count(ByteTokenizer(), held // 2, 25) == 2
    with pytest.raises(NotMeasurable, match="more than the"):
        task.count(ByteTokenizer(), held + 1, 25)


def test_training_windows_come_from_the_training_split(text):
    ids, labels = training_batch("ppl", ByteTokenizer(), 3, 80, torch.Generator().manual_seed(0), text=text)
    assert torch.equal(ids, labels) and ids.shape == (3, 80)
    documents = "".join(running_text(text, "train").documents)
    assert all(ByteTokenizer().decode(row.tolist()) in documents for row in ids)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_text_that_was_edited_is_read_again(tmp_path, kind):
    """In the process that has read it before, too: its batches and its digest, which results are kept under."""
    file = tmp_path / "text.txt"
    source = str(file if kind == "file" else tmp_path)
    found = []
    for letter in "ab":
        file.write_text(f"{letter * 50}. " * 100)
        ids, _ = training_batch("ppl", ByteTokenizer(), 1, 40, torch.Generator().manual_seed(0), text=source)
        found.append((ids.tolist(), running_text(source).digest))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
