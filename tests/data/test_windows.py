"""Windows: which tokens they hold, where they come from, and that nothing but seed and index decides it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from titans.data import ByteTokenizer, StreamDataset, TokenDocuments, WindowDataset, bits_per_byte, evaluation_windows

TEXTS = ["a" * 100, "", "b" * 3, "c" * 40, "d" * 2, "e" * 300]
corpora = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def documents_of(texts):
    return TokenDocuments.from_texts(texts, ByteTokenizer())


def numbered(lengths):
    """Documents that each repeat their own byte, so that a token tells which document it is from."""
    return documents_of([chr(1 + i) * length for i, length in enumerate(lengths)])


def text_of(item):
    return bytes(item["input_ids"].tolist())


def test_a_long_document_fills_its_windows_alone():
    dataset = WindowDataset(documents_of(TEXTS), length=50, seed=1, n_windows=2000)
    starts = set()
    for item in (dataset[i] for i in range(len(dataset))):
        ids = item["input_ids"]
        assert ids.dtype == item["document_ids"].dtype == torch.int64
        assert ids.shape == item["document_ids"].shape == (50,)
        assert item["labels"].data_ptr() != ids.data_ptr()
        inner = set(text_of(item).strip(b"\0"))
        starts.add(chr(ids[1]))
        if chr(ids[1]) in "ae":
            assert inner == {int(ids[1])}
            assert torch.equal(ids, item["labels"])
            assert len(set(item["document_ids"].tolist())) == 1
    assert starts == set("abcde")


def test_short_documents_are_joined_and_told_apart():
    dataset = WindowDataset(documents_of(TEXTS), length=50, seed=1, n_windows=2000)
    windows = {chr(dataset[i]["input_ids"][1]): dataset[i] for i in range(len(dataset))}
    item = windows["b"]
    assert text_of(item) == b"\0bbb\0" + b"\0" + b"c" * 40 + b"\0" + b"\0dd"
    assert item["document_ids"].tolist() == [1] * 5 + [2] * 42 + [3] * 3
    # Nothing before it tells the first token of a document; everything else is a target.
    assert (item["labels"] == -100).nonzero().flatten().tolist() == [5, 47]
    kept = item["labels"] != -100
    assert torch.equal(item["labels"][kept], item["input_ids"][kept])
    assert text_of(windows["d"]) == b"\0dd\0" + b"\0" + b"e" * 45


def test_a_corpus_shorter_than_the_window_goes_round():
    item = WindowDataset(documents_of(["ab"]), length=10)[0]
    assert text_of(item) == b"\0ab\0\0ab\0\0a"
    assert item["document_ids"].tolist() == [0] * 4 + [1] * 4 + [2] * 2


def test_documents_are_drawn_by_length_and_windows_show_their_ends():
    documents = numbered([998, 2998])
    dataset = WindowDataset(documents, length=100, seed=0, n_windows=8000)
    starts = np.array([dataset.start(i) for i in range(8000)])
    assert abs((starts < 1000).mean() - 0.25) < 0.02
    inside = starts[starts >= 1000] - 1000
    assert inside.max() == 2900
    # `titans generate --prompt ''` goes on from the separator before a document: training must have seen what follows.
    assert abs((inside == 0).mean() - 50 / 3000) < 0.006
    assert abs((inside == 2900).mean() - 50 / 3000) < 0.006
    between = inside[(inside > 0) & (inside < 2900)]
    assert abs(between.mean() - 1450) < 50
    assert abs(between.std() - 2900 / math.sqrt(12)) < 40


@given(corpora, st.integers(2, 30), st.integers(-5, 5), st.integers(0, 10**9))
def test_every_window_starts_inside_one_document(lengths, length, seed, index):
    documents = numbered(lengths)
    start = WindowDataset(documents, length, seed, n_windows=index + 1).start(index)
    assert start == WindowDataset(documents, length, seed, n_windows=10**10).start(index)
    begin, end = next((b, e) for b, e in pairwise(documents.offsets.tolist()) if b <= start < e)
    assert start + length <= end if end - begin >= length else start == begin


def test_windows_depend_on_seed_and_index_alone():
    documents = documents_of(TEXTS)
    dataset = WindowDataset(documents, length=50, seed=3)
    expected = torch.stack([dataset[i]["input_ids"] for i in range(len(dataset))])
    assert len(dataset) == len(documents.tokens) // 50
    loader = DataLoader(WindowDataset(documents, length=50, seed=3), batch_size=4, num_workers=2)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), expected)
    other = WindowDataset(documents, length=50, seed=4)
    assert [dataset.start(i) for i in range(9)] != [other.start(i) for i in range(9)]
    # A published run must find the same windows under every version of this package.
    assert [WindowDataset(documents, 50, 3, 4).start(i) for i in range(4)] == [21, 107, 107, 163]


@given(corpora, st.integers(2, 30), st.integers(0, 10**9))
def test_document_ids_change_at_every_first_token(lengths, length, index):
    documents = numbered(lengths)
    dataset = WindowDataset(documents, length, n_windows=index + 1)
    item, start = dataset[index], dataset.start(index)
    assert item["input_ids"].tolist() == documents.window(start, length).tolist()
    begins = set(documents.offsets[:-1].tolist())
    firsts = [t for t in range(1, length) if (start + t) % len(documents.tokens) in begins]
    ids = item["document_ids"]
    assert (1 + (ids[1:] != ids[:-1]).nonzero().flatten()).tolist() == firsts
    assert (item["labels"] == -100).nonzero().flatten().tolist() == firsts


@given(corpora, st.integers(2, 30))
def test_evaluation_scores_every_token_once(lengths, length):
    documents = numbered(lengths)
    total = len(documents.tokens)
    if total < length:
        with pytest.raises(ValueError, match=f"length: {length} is more than the {total} tokens"):
            evaluation_windows(documents, length)
        return
    windows = evaluation_windows(documents, length)
    scored = np.zeros(total, dtype=int)
    n_bytes = 0
    for item, spans in zip((windows[i] for i in range(len(windows))), windows.spans, strict=True):
        positions = np.concatenate([np.arange(start, stop) for start, stop in spans])
        assert item["input_ids"].tolist() == documents.tokens[positions].tolist()
        ids = item["document_ids"]
        assert ids.tolist() == (np.searchsorted(documents.offsets, positions, side="right") - 1).tolist()
        # What a model scores that starts afresh where the document changes, and no other target than the labels'.
        targets = 1 + (ids[1:] == ids[:-1]).nonzero().flatten()
        assert targets.tolist() == (1 + (item["labels"][1:] != -100).nonzero().flatten()).tolist()
        # Each target follows its own predecessor.
        assert all(positions[t] == positions[t - 1] + 1 for t in targets)
        np.add.at(scored, positions[targets], 1)
        assert item["bytes"].dtype == torch.int64 and item["bytes"].shape == ()
        assert item["bytes"] == documents.byte_lengths[positions[targets]].sum() == len(targets)
        n_bytes += int(item["bytes"])
    assert scored.max() == 1
    assert not scored[documents.offsets[:-1]].any()
    left_out = total - len(documents) - scored.sum()
    assert left_out < length
    assert n_bytes == documents.bytes - left_out


def test_evaluation_windows_of_a_known_corpus():
    windows = evaluation_windows(documents_of(TEXTS), 50)
    items = [windows[i] for i in range(len(windows))]
    assert [text_of(item) for item in items[:3]] == [
        b"\0" + b"a" * 49,
        b"a" * 50,
        # The last two a's, from the one before them on, then the next documents; the cut one goes on afresh.
        b"aaa\0" + b"\0bbb\0" + b"\0" + b"c" * 40,
    ]
    assert items[2]["document_ids"].tolist() == [0] * 4 + [1] * 5 + [2] * 41
    assert items[2]["bytes"] == 3 + 4 + 40
    assert [text_of(item) for item in items[3:]] == [b"\0" + b"e" * 49] + [b"e" * 50] * 5
    assert windows.spans[3][0][0] == documents_of(TEXTS).offsets[4]


def test_evaluation_windows_are_spread_when_fewer_are_asked():
    documents = numbered([98] * 10)
    assert [spans[0][0] for spans in evaluation_windows(documents, 100, n=5).spans] == [0, 200, 400, 600, 800]
    assert len(evaluation_windows(documents, 100, n=10**6)) == 10


def test_bytes_are_those_of_the_scored_tokens():
    class Words(ByteTokenizer):
        vocab_size = 100_000

        def encode_with_bytes(self, text):
            words = text.split()
            return np.full(len(words), 70_000), np.array([len(word) for word in words])

    documents = TokenDocuments.from_texts(["one three", "seventeen " * 10 + "x" * 300], Words())
    windows = evaluation_windows(documents, 4)
    assert [int(windows[i]["bytes"]) for i in range(len(windows))] == [3 + 5 + 1, 27, 27, 27, 9 + 300 + 1]
    assert evaluation_windows(documents, 4, n=1)[0]["bytes"] == 9


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), tokens=10, bytes=40) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="bytes: 0"):
        bits_per_byte(1.0, 1, 0)


def test_errors_name_the_field():
    documents = documents_of(TEXTS)
    for build in (WindowDataset, evaluation_windows):
        with pytest.raises(ValueError, match="length: 1 must be an integer of at least 2"):
            build(documents, 1)
    with pytest.raises(ValueError, match="n_windows: 0"):
        WindowDataset(documents, 10, n_windows=0)
    with pytest.raises(ValueError, match="n: 0"):
        evaluation_windows(documents, 10, n=0)
    with pytest.raises(IndexError, match="index: 4 is outside"):
        WindowDataset(documents, 10, n_windows=4)[4]


def test_streams_go_on_where_they_stopped():
    documents = documents_of(["a" * 1000, "b" * 3, "c" * 90, "d" * 700])
    dataset = StreamDataset(documents, length=50, streams=3, fresh=0.1, seed=5, n_windows=600)
    places = [dataset.place(i) for i in range(600)]
    assert all(fresh for _, fresh in places[:3])
    went_on = 0
    for (before, _), (now, fresh) in zip(places, places[3:], strict=False):
        document = int(np.searchsorted(documents.offsets, before, side="right"))
        has_more = before + 100 <= documents.offsets[document]
        assert fresh or (has_more and now == before + 50)
        went_on += has_more and not fresh
    possible = sum(
        p[0] + 100 <= documents.offsets[np.searchsorted(documents.offsets, p[0], side="right")] for p in places
    )
    assert 0.85 < went_on / possible < 0.95
    assert dataset[7]["fresh"].item() == places[7][1]
    for index in range(3, 600):
        if not places[index][1]:
            # The stream's document goes on: the state is carried over the cut, and nothing starts afresh inside.
            assert len({*dataset[index]["document_ids"].tolist(), int(dataset[index - 3]["document_ids"][-1])}) == 1
    assert torch.equal(dataset[8]["input_ids"], documents.window(places[8][0], 50))


@given(seed=st.integers(0, 2**32), streams=st.integers(1, 7), asked=st.lists(st.integers(0, 99), max_size=20))
def test_a_stream_window_is_a_function_of_seed_and_index(seed, streams, asked):
    def make():
        return StreamDataset(documents_of(TEXTS), 20, streams, 0.2, seed, n_windows=100)

    dataset, in_order = make(), make()
    expected = [in_order.place(i) for i in range(100)]
    assert [dataset.place(i) for i in asked] == [expected[i] for i in asked]


def test_only_fresh_starts_are_the_random_windows():
    documents = documents_of(TEXTS)
    streams = StreamDataset(documents, 20, 4, 1.0, seed=3, n_windows=50)
    plain = WindowDataset(documents, 20, seed=3, n_windows=50)
    assert [streams.place(i) for i in range(50)] == [(plain.start(i), True) for i in range(50)]


def test_streams_out_of_range():
    for changes, message in (
        ({"streams": 0}, "streams: 0"),
        ({"fresh": 1.5}, "fresh: 1.5"),
        ({"fresh": -1}, "fresh: -1"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamDataset(documents_of(TEXTS), 20, **{"streams": 2, "fresh": 0.1, **changes})
