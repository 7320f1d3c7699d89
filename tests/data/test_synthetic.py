"""Recall and noise: what a row holds, and that the right answer scores 1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.data import iid_batch, mqar_accuracy, mqar_batch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(0, 13), st.integers(0, 9), st.integers(0, 2**31))
def test_mqar_row(pairs, extra_length, extra_vocab, seed):
    length, vocab = 4 * pairs + extra_length, 2 * pairs + 2 + extra_vocab
    rows = mqar_batch(3, length, pairs, vocab, seeded(seed))
    assert all(part.shape == (3, length) and part.dtype == torch.int64 for part in rows)
    for ids, labels in zip(*(part.tolist() for part in rows)):
        keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert all(1 <= key < vocab // 2 for key in keys)
        assert all(vocab // 2 <= value < vocab for value in values)
        assert len(set(keys)) == len(set(values)) == pairs

        asked = [t for t in range(2 * pairs, length) if ids[t] != 0]
        assert all(t % 2 == 0 and t <= length - 2 for t in asked)
        assert sorted(ids[t] for t in asked) == sorted(keys)

        answers = dict(zip(keys, values))
        expected = [-100] * length
        for t in asked:
            expected[t + 1] = answers[ids[t]]
        assert labels == expected


def test_mqar_queries_are_uniform_over_the_slots():
    ids, _ = mqar_batch(4000, 40, 4, 64, seeded())
    frequency = (ids[:, 8:40:2] != 0).double().mean(dim=0)
    assert frequency.shape == (16,)
    assert (frequency - 4 / 16).abs().max() < 0.04
    # Which key is asked first does not depend on its place among the pairs either.
    first = ids[:, 8:].gather(1, (ids[:, 8:] != 0).int().argmax(dim=1, keepdim=True))
    shares = (ids[:, 0:8:2] == first).double().mean(dim=0)
    assert (shares - 1 / 4).abs().max() < 0.04


def test_mqar_depends_on_the_generator_alone():
    first, again, other = (mqar_batch(2, 32, 4, 32, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_accuracy_reads_the_logits_before_the_label():
    ids, labels = mqar_batch(8, 32, 4, 32, seeded())
    answers = labels.clamp(min=0).roll(-1, dims=1)
    logits = torch.nn.functional.one_hot(answers, 32).float()
    assert mqar_accuracy(logits, labels) == 1.0
    assert mqar_accuracy(logits.roll(1, dims=1), labels) == 0.0
    half = logits.clone()
    half[:4] = 0
    assert mqar_accuracy(half, labels) == 0.5
    with pytest.raises(ValueError, match="labels: every label"):
        mqar_accuracy(logits, torch.full_like(ids, -100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 15}, "length: 15 is too short for 4 pairs and their queries, at least 16"),
        ({"vocab": 9}, "vocab: 9 holds fewer than 4 different keys, at least 10"),
        ({"pairs": 0}, "pairs: 0"),
        ({"batch": 0}, "batch: 0"),
    ],
)
def test_mqar_errors_name_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar_batch(**{"batch": 1, "length": 16, "pairs": 4, "vocab": 10, "generator": seeded()} | arguments)


def test_noise_is_uniform_and_seeded():
    ids, labels = iid_batch(64, 500, 8, seeded())
    assert torch.equal(ids, labels)
    assert labels.data_ptr() != ids.data_ptr()
    assert (torch.bincount(ids.flatten(), minlength=8) / ids.numel() - 1 / 8).abs().max() < 0.01
    assert torch.equal(iid_batch(64, 500, 8, seeded())[0], ids)
