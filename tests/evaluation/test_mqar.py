"""Recall as zoology makes it, scored in pieces."""

from types import SimpleNamespace

import pytest
import torch

from titans import TitansConfig, build_model
from titans.data import ByteTokenizer, mqar_accuracy
from titans.evaluation import mqar as module
from titans.evaluation import reading, training_batch
from titans.evaluation.mqar import Mqar, answered_right, zoology_batch
from titans.evaluation.task import NotMeasurable


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_key_is_asked_once_and_its_value_is_the_label():
    ids, labels = zoology_batch(20, 256, 16, 8192, random())
    keys, values = ids[:, 0:32:2], ids[:, 1:32:2]
    assert bool(((keys >= 1) & (keys < 4096)).all()) and bool(((values >= 4096) & (values < 8192)).all())
    for row, asked, own, said in zip(ids, labels, keys, values):
        assert len(set(own.tolist())) == len(set(said.tolist())) == 16
        at = (asked >= 0).nonzero().flatten()
        assert bool((at % 2 == 1).all()) and int(at[0]) > 32
        value_of = dict(zip(own.tolist(), said.tolist()))
        assert [value_of.pop(key) for key in row[at - 1].tolist()] == asked[at].tolist()
        assert not value_of
        filler = torch.ones(256, dtype=torch.bool)
        filler[:32] = filler[at - 1] = False
        assert len(set(row[filler].tolist())) > 150
    assert torch.equal(zoology_batch(20, 256, 16, 8192, random())[0], ids)


def test_gaps_follow_the_power_law():
    _, labels = zoology_batch(20_000, 20, 1, 64, random())
    gaps = ((labels >= 0).double().argmax(1) - 3) // 2
    chance = 0.01 * torch.arange(1, 10, dtype=torch.float64) ** (0.01 - 1)
    expected = chance / chance.sum()
    found = torch.bincount(gaps.long(), minlength=9).double() / len(gaps)
    assert (found - expected).abs().max() < 0.012


def test_pairs_and_refusals():
    zoology, easy = Mqar("mqar_zoology"), Mqar("mqar_easy")
    assert [zoology.pairs(length) for length in (64, 128, 256, 512, 4096)] == [4, 8, 16, 64, 64]
    assert easy.pairs(64) == 6
    with pytest.raises(NotMeasurable, match="must be even, got 65"):
        zoology.batch(1, 65, random())
    with pytest.raises(NotMeasurable, match="20 tokens are too few, 6 pairs take 24"):
        easy.batch(1, 20, random())
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=256))
    with pytest.raises(NotMeasurable, match="8,192 tokens of vocabulary, the model has 256"):
        zoology.measure(model, ByteTokenizer(), 64, [0], 1, 0)


class Answers(torch.nn.Module):
    """Says the value of a key that stands in its history; ``wrong`` of the queries are answered wrongly."""

    def __init__(self, wrong=0):
        super().__init__()
        self.weight, self.wrong, self.calls = torch.nn.Parameter(torch.zeros(1)), wrong, 0

    def forward(self, ids, state=None, logits_to_keep=0):
        self.calls += 1
        before = torch.zeros(len(ids), 0, dtype=torch.int64) if state is None else state.ids
        ids = torch.cat((before, ids), 1)
        logits = torch.zeros(*ids.shape, 128)
        for row in range(len(ids)):
            pairs = dict(zip(ids[row, 0:12:2].tolist(), ids[row, 1:12:2].tolist()))
            for key in list(pairs)[: self.wrong]:
                pairs[key] = 0
            for at, token in enumerate(ids[row].tolist()):
                logits[row, at, pairs.get(token, 1)] = 1
        return SimpleNamespace(logits=logits[:, before.shape[1] :][:, -logits_to_keep:], state=State(ids))


class State:
    def __init__(self, ids):
        self.ids, self.nbytes = ids, 8 * ids.numel()


@pytest.mark.parametrize(("wrong", "score"), [(0, 1.0), (2, 4 / 6), (6, 0.0)])
def test_the_score_is_the_share_of_right_answers(wrong, score, monkeypatch):
    monkeypatch.setattr(reading, "READ_AT_ONCE", 21)
    model, task = Answers(wrong), Mqar("mqar_easy")
    records = task.measure(model, ByteTokenizer(), 60, [0, 1, 2], 3, seed=1)
    assert model.calls == 9
    assert [record["score"] for record in records] == pytest.approx([score] * 3)
    assert records[0]["state_bytes"] == 60 * 8 and task.summary(records)["pairs"] == 6
    alone = task.measure(model, ByteTokenizer(), 60, [1], 3, seed=1)
    assert alone == records[1:2]


def test_pieces_score_what_the_whole_scores(monkeypatch):
    torch.manual_seed(0)
    model = build_model(TitansConfig(variant="LMM", vocab_size=128, d_model=16, n_layers=1, chunk_size=4)).double()
    task = Mqar("mqar_easy")
    ids, labels = task.batch(200, 40, random())
    with torch.no_grad():
        logits = model(ids).logits
    whole = mqar_accuracy(logits, labels)
    # With an untrained model a few answers are right by chance.
    assert 0 < whole < 1
    monkeypatch.setattr(module, "piece_length", lambda model, rows: 7)
    with torch.no_grad():
        right, _ = answered_right(model, ids, labels)
    assert right.sum().item() / (200 * 6) == pytest.approx(whole)


def test_training_batches():
    ids, labels = training_batch("mqar_zoology", ByteTokenizer(), 3, 64, random())
    assert ids.shape == (3, 64) and (labels >= 0).sum(1).tolist() == [4, 4, 4]
    dense = training_batch("mqar_zoology", ByteTokenizer(), 3, 64, random(), dense=True)[1]
    asked = labels >= 0
    assert torch.equal(dense[asked], labels[asked]) and torch.equal(dense[~asked], ids[~asked])
