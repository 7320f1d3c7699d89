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


def test_documents_are_flat_and_end_in_a_separator():
    documents = documents_of(["ab", "", "é"])
    assert documents.tokens.tolist() == [97, 98, 0, 0xC3, 0xA9, 0]
    assert documents.tokens.dtype == np.uint16
    assert len(documents) == 2
    assert documents.document(1).tolist() == [0xC3, 0xA9]
    assert documents.bytes == 6
    assert documents.bytes_per_token == 1.0
    with pytest.raises(ValueError, match="texts: no document"):
        documents_of(["", ""])


def test_large_vocabulary_and_bytes_per_token():
    class Words(ByteTokenizer):
        vocab_size = 100_000
        separator_id = 99_999

        def encode_array(self, text):
            return np.full(len(text.split()), 70_000, dtype=np.int32)

    documents = TokenDocuments.from_texts(["four letter word here"], Words())
    assert documents.tokens.dtype == np.int32
    assert documents.tokens.tolist() == [70_000] * 4 + [99_999]
    assert documents.bytes_per_token == 22 / 5


def test_a_long_document_fills_its_windows_alone():
    dataset = WindowDataset(documents_of(TEXTS), length=50, seed=1, n_windows=2000)
    firsts = set()
    for item in (dataset[i] for i in range(len(dataset))):
        ids = item["input_ids"]
        assert ids.dtype == torch.int64
        assert ids.shape == (50,)
        assert torch.equal(ids, item["labels"])
        assert item["labels"].data_ptr() != ids.data_ptr()
        first = chr(ids[0])
        firsts.add(first)
        if first in "ae":
            assert set(ids[:-1].tolist()) == {ord(first)}
            assert ids[-1] in (ord(first), 0)
    assert firsts == set("abcde")


def test_short_documents_are_joined_by_the_separator():
    dataset = WindowDataset(documents_of(TEXTS), length=50, seed=1, n_windows=2000)
    windows = {chr(dataset[i]["input_ids"][0]): dataset[i]["input_ids"] for i in range(len(dataset))}
    assert bytes(windows["b"].tolist()) == b"bbb\0" + b"c" * 40 + b"\0" + b"dd\0" + b"ee"
    assert bytes(windows["d"].tolist()) == b"dd\0" + b"e" * 47


def test_a_corpus_shorter_than_the_window_goes_round():
    item = WindowDataset(documents_of(["ab"]), length=8)[0]
    assert bytes(item["input_ids"].tolist()) == b"ab\0ab\0ab"


def test_documents_are_drawn_by_length_and_starts_are_uniform():
    documents = numbered([999, 2999])
    dataset = WindowDataset(documents, length=100, seed=0, n_windows=4000)
    starts = np.array([dataset.start(i) for i in range(4000)])
    assert abs((starts < 1000).mean() - 0.25) < 0.03
    inside = starts[starts >= 1000] - 1000
    assert inside.min() < 20
    assert inside.max() > 2880
    assert inside.max() <= 2900
    assert abs(inside.mean() - 1450) < 60


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
    assert [WindowDataset(documents, 50, 3, 4).start(i) for i in range(4)] == [179, 105, 227, 207]


@given(corpora, st.integers(2, 30))
def test_evaluation_windows_do_not_overlap_and_miss_only_remainders(lengths, length):
    documents = numbered(lengths)
    total = len(documents.tokens)
    if total < length:
        with pytest.raises(ValueError, match=f"length: {length} is more than the {total} tokens"):
            evaluation_windows(documents, length)
        return
    windows = evaluation_windows(documents, length)
    starts = windows.starts
    assert all(later - earlier >= length for earlier, later in pairwise(starts))
    assert starts[-1] + length <= total
    for begin, end in pairwise(documents.offsets.tolist()):
        inside = [start for start in starts if begin <= start < end]
        if end - begin >= length:
            # Only the part that a joined window of shorter documents took, and less than one window, may be missing.
            assert all(start + length <= end for start in inside)
        else:
            assert inside in ([], [begin])
    for start, item in zip(starts, windows):
        assert item["input_ids"].tolist() == documents.tokens[start : start + length].tolist()


def test_evaluation_windows_of_a_known_corpus():
    windows = evaluation_windows(documents_of(TEXTS), 50)
    texts = [bytes(windows[i]["input_ids"].tolist()) for i in range(len(windows))]
    assert texts[:2] == [b"a" * 50] * 2
    assert texts[2] == b"bbb\0" + b"c" * 40 + b"\0" + b"dd\0" + b"ee"
    assert texts[3:] == [b"e" * 50] * 5


def test_evaluation_windows_are_spread_when_fewer_are_asked():
    documents = numbered([999] * 10)
    assert evaluation_windows(documents, 100, n=5).starts == [0, 2000, 4000, 6000, 8000]
    assert len(evaluation_windows(documents, 100, n=10**6)) == 100


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), tokens=10, bytes=40) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="bytes: 0"):
        bits_per_byte(1.0, 1, 0)


def test_errors_name_the_field():
    documents = documents_of(TEXTS)
    for build in (WindowDataset, evaluation_windows):
        with pytest.raises(ValueError, match="length: 1 must be at least 2"):
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
