"""Worlds: every answer follows from the facts, which keep their order among the background."""

import re
import sys
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import pytest
import torch

from titans.data import ByteTokenizer
from titans.evaluation import EvaluationError, training_batch, worlds
from titans.evaluation.babilong import Babilong, PublishedBabilong, only_label
from titans.evaluation.running_text import running_text
from titans.evaluation.task import NotMeasurable
from titans.evaluation.worlds import GIVERS, OPPOSITE, STORIES, THINGS

MOVE = re.compile(r"(\w+) (?:went|went back|moved|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+) there\.")
DROP = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
LIES = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")


class Solver:
    """Reads facts and follows them, by other means than the worlds themselves."""

    def __init__(self, facts):
        self.person, self.trail, self.carried, self.given, self.lies = {}, {}, {}, [], set()
        for fact in facts:
            self.read(fact)

    def read(self, fact):
        if found := MOVE.fullmatch(fact):
            who, where = found.groups()
            assert self.person.get(who) != where, "nobody goes where they are"
            self.person[who] = where
            for thing in (thing for thing, holder in self.carried.items() if holder == who):
                self.trail[thing].append(where)
        elif found := TAKE.fullmatch(fact):
            who, thing = found.groups()
            assert thing not in self.carried, "nobody takes what somebody has"
            place = self.person.get(who, "where all began")
            trail = self.trail.setdefault(thing, [place])
            assert trail[-1] == place, "what is taken lies there"
            self.carried[thing] = who
        elif found := DROP.fullmatch(fact):
            who, thing = found.groups()
            assert self.carried.pop(thing) == who
        elif found := GIVE.fullmatch(fact):
            who, thing, whom = found.groups()
            assert self.carried[thing] == who != whom and self.person.get(who) == self.person.get(whom)
            self.carried[thing] = whom
            self.given.append((who, thing, whom))
        else:
            a, direction, b = LIES.fullmatch(fact).groups()
            self.lies |= {(a, direction, b), (b, OPPOSITE[direction], a)}

    def answers(self, question):
        """All answers that are right."""
        if found := re.fullmatch(r"Where is the (\w+)\?", question):
            return {self.trail[found[1]][-1]}
        if found := re.fullmatch(r"Where is (\w+)\?", question):
            return {self.person[found[1]]}
        if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
            trail = [
                place for i, place in enumerate(self.trail[found[1]]) if i == 0 or place != self.trail[found[1]][i - 1]
            ]
            return {a for a, b in pairwise(trail) if b == found[2]}
        if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
            return {a for a, direction, b in self.lies if (direction, b) == found.groups()}
        if found := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
            return {b for a, direction, b in self.lies if (a, direction) == found.groups()}
        giver, thing, taker = self.given[-1]
        return {
            f"What did {giver} give to {taker}?": {thing},
            f"Who gave the {thing} to {taker}?": {giver},
            f"Who did {giver} give the {thing} to?": {taker},
            f"Who gave the {thing}?": {giver},
            f"Who received the {thing}?": {taker},
        }[question]


@pytest.mark.parametrize("world", STORIES)
def test_the_answer_follows_from_the_facts(world):
    questions = set()
    for seed in range(300):
        story = STORIES[world](Random(seed))
        assert Solver(story.facts).answers(story.question) == {story.answer}
        assert story.answer in story.labels
        assert only_label(story.answer, f" {story.answer}", story.question, story.labels)
        assert STORIES[world](Random(seed)) == story
        questions.add((story.question, story.answer))
    assert len(questions) >= 18  # all that qa2 can ask


def prompt_of(world, text, tokenizer, length=3000, seed=0):
    sample = Babilong(f"babilong_{world}", running_text(text)).sample(tokenizer, length, Random(seed), 0.5)
    return sample, tokenizer.decode(sample.ids)


@pytest.mark.parametrize("world", STORIES)
def test_facts_keep_their_order_among_the_background(world, text, tokenizer):
    fact = re.compile("|".join(pattern.pattern for pattern in (MOVE, TAKE, DROP, GIVE, LIES)))
    for seed in range(5):
        sample, prompt = prompt_of(world, text, tokenizer, seed=seed)
        assert 3000 - 200 < len(sample.ids) <= 3000
        assert prompt.endswith(f"\nQuestion: {sample.question}\nAnswer:")
        facts = [found[0] for found in fact.finditer(prompt)]
        assert Solver(facts).answers(sample.question) == {sample.answer}
        background = fact.split(prompt.split("\nQuestion")[0])
        assert sum(len(piece.strip()) > 0 for piece in background if piece) > 1
    assert prompt_of(world, text, tokenizer)[1] == prompt_of(world, text, tokenizer)[1]


def test_short_lengths_get_the_shorter_stories(text):
    sample, prompt = prompt_of("qa1", text, ByteTokenizer(), length=150)
    assert 2 <= len(MOVE.findall(prompt)) <= 4 and len(sample.ids) <= 150
    with pytest.raises(NotMeasurable, match="20 tokens are too few"):
        prompt_of("qa1", text, ByteTokenizer(), length=20)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" kitchen", True),
        (" Kitchen.", True),
        (" in the kitchen, before the garden", True),  # the question names the garden
        (" kitchen or office", False),
        (" office. kitchen", False),
        (" kitchen. office", True),
        (" kitche", False),
        ("", False),
    ],
)
def test_the_metric_of_babilong(output, right):
    places = ("kitchen", "garden", "office")
    assert only_label("kitchen", output, "Where was the apple before the garden?", places) == right


def test_training_batches_hold_the_answer(text, tokenizer):
    ids, labels = training_batch("babilong_qa1", tokenizer, 4, 600, torch.Generator().manual_seed(0), text=text)
    for row, asked in zip(ids, labels):
        start = int((asked >= 0).nonzero()[0])
        prompt, said = tokenizer.decode(row[:start].tolist()), asked[asked >= 0].tolist()
        facts = [found[0] for found in MOVE.finditer(prompt)]
        (answer,) = Solver(facts).answers(re.search(r"Question: (.*\?)", prompt)[1])
        assert tokenizer.decode(said[:-1]) == f" {answer}" and said[-1] == tokenizer.separator_id


def test_the_published_set_is_read_where_it_can_be_reached(monkeypatch):
    rows = [{"input": "Mary went home.", "question": "Where is Mary?", "target": "kitchen"}] * 3
    asked = []

    def load_dataset(*words):
        asked.append(words)
        return {"qa1": rows}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task, tokenizer = PublishedBabilong("babilong_published_qa1"), ByteTokenizer()
    assert task.count(tokenizer, 4096, 25) == 3
    (sample,) = task.samples(tokenizer, 2**20, [2], 3, 0)
    assert asked == [("RMT-team/babilong", "4k"), ("RMT-team/babilong", "1M")]
    assert tokenizer.decode(sample.ids) == "Mary went home.\nQuestion: Where is Mary?\nAnswer:"
    assert task.score(sample, " kitchen") == 1 and task.score(sample, " office") == 0
    with pytest.raises(NotMeasurable, match="not 1000"):
        task.count(tokenizer, 1000, 1)
    with pytest.raises(EvaluationError, match="train on babilong_qa1"):
        training_batch(task.name, tokenizer, 1, 500, torch.Generator())


def test_an_unreachable_set_is_one_clear_error(monkeypatch):
    def load_dataset(*words):
        raise OSError("no\nnetwork")

    task = PublishedBabilong("babilong_published_qa1")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(EvaluationError, match=r"RMT-team/babilong 4k could not be loaded \(no network\)"):
        task.count(ByteTokenizer(), 4096, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match="needs datasets"):
        task.count(ByteTokenizer(), 4096, 1)


def test_a_world_in_which_nothing_can_be_given_any_more_begins_anew(monkeypatch):
    """Seed 732: everything is dropped where all began, and everybody has left."""
    move = worlds.World.move

    def counted(self):
        assert len(self.facts) < 1000, "without end"
        return move(self)

    monkeypatch.setattr(worlds.World, "move", counted)
    story = STORIES["qa5"](Random(732))
    assert len(story.facts) < worlds.LOST and story.answer in GIVERS + THINGS
