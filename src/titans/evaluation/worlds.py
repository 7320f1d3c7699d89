"""Small worlds in the style of bAbI: people move about, take, drop and hand over things; where does that leave them?

Every world is written down in short sentences, in the order in which things happen, and asked one question that has
exactly one answer. The sentences follow Weston et al. 2015 (bAbI, tasks 1 to 5); the stories are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
LOST = 200
"""Facts after which a world in which nothing was given begins anew: all things may lie where its people began, and none
of them ever goes back there."""
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

MOVES = ("went to", "went back to", "moved to", "journeyed to", "travelled to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
GIVES = ("gave", "handed", "passed")


@dataclass(frozen=True)
class Story:
    """Facts in order, a question about them, its answer, which is one of ``labels``, and all other questions of its
    kind that the facts answer, each with its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str
    labels: tuple[str, ...]
    further: tuple[tuple[str, str], ...] = ()


def _story(world: World, asked: tuple[str, str], possible: Sequence[tuple[str, str]], labels: tuple[str, ...]) -> Story:
    """``asked`` and all ``possible`` questions with their answers."""
    return Story(tuple(world.facts), *asked, labels, tuple(other for other in possible if other[0] != asked[0]))


class World:
    """Where everybody and everything is, and what has happened so far.

    Args:
        random: source of what happens next.
        people: who there is.
        start: where all of them are before the first fact; None where the facts do not say.
    """

    def __init__(self, random: Random, people: tuple[str, ...], start: str | None = None):
        self.random, self.people = random, people
        self.place: dict[str, str | None] = dict.fromkeys(people, start)
        self.holder: dict[str, str | None] = dict.fromkeys(THINGS)
        self.trail: dict[str, list[str]] = {thing: [] for thing in THINGS}
        self.facts: list[str] = []
        self.given: tuple[str, str, str] | None = None

    def happen(self, *kinds: Callable[[], bool]) -> None:
        """One of these events, or a move where that one is not possible."""
        if not self.random.choice(kinds)():
            self.move()

    def move(self) -> bool:
        person = self.random.choice(self.people)
        place = self.random.choice([place for place in PLACES if place != self.place[person]])
        self.place[person] = place
        self.facts.append(f"{person} {self.random.choice(MOVES)} the {place}.")
        for thing in self._held(person):
            self._now_at(thing, place)
        return True

    def take(self) -> bool:
        """Somebody picks up a thing that lies where they are, or that nobody has spoken of yet."""
        able = [
            (person, thing)
            for person, place in self.place.items()
            for thing in THINGS
            if place is not None and self.holder[thing] is None and self.trail[thing][-1:] in ([], [place])
        ]
        if not able:
            return False
        person, thing = self.random.choice(able)
        self.holder[thing] = person
        self._now_at(thing, self.place[person])
        self.facts.append(f"{person} {self.random.choice(TAKES)} the {thing} there.")
        return True

    def drop(self) -> bool:
        held = [(person, thing) for thing, person in self.holder.items() if person is not None]
        if not held:
            return False
        person, thing = self.random.choice(held)
        self.holder[thing] = None
        self.facts.append(f"{person} {self.random.choice(DROPS)} the {thing}.")
        return True

    def give(self) -> bool:
        able = [
            (giver, thing, taker)
            for thing, giver in self.holder.items()
            for taker in self.people
            if giver is not None and taker != giver and self.place[taker] == self.place[giver]
        ]
        if not able:
            return False
        giver, thing, taker = self.given = self.random.choice(able)
        self.holder[thing] = taker
        self.facts.append(f"{giver} {self.random.choice(GIVES)} the {thing} to {taker}.")
        return True

    def _held(self, person: str) -> list[str]:
        return [thing for thing, holder in self.holder.items() if holder == person]

    def _now_at(self, thing: str, place: str | None) -> None:
        if place is not None and self.trail[thing][-1:] != [place]:
            self.trail[thing].append(place)


def where_is_the_person(random: Random) -> Story:
    """qa1: "Mary went to the garden." "Where is Mary?" - "garden"."""
    world = World(random, PEOPLE)
    for _ in range(random.randint(2, 10)):
        world.move()
    possible = [(f"Where is {person}?", place) for person, place in world.place.items() if place is not None]
    return _story(world, random.choice(possible), possible, PLACES)


def where_is_the_thing(random: Random) -> Story:
    """qa2: "Mary went to the garden. Mary took the apple there." "Where is the apple?" - "garden"."""
    world = World(random, PEOPLE)
    events = random.randint(3, 12)
    while len(world.facts) < events or not any(world.trail.values()):
        world.happen(world.move, world.move, world.take, world.drop)
    possible = [(f"Where is the {thing}?", trail[-1]) for thing, trail in world.trail.items() if trail]
    return _story(world, random.choice(possible), possible, PLACES)


def where_was_the_thing(random: Random) -> Story:
    """qa3: "Mary took the apple there. Mary went to the office." "Where was the apple before the office?" - "garden".

    The place that is asked about is one in which the thing was only once.
    """
    world = World(random, PEOPLE)
    events = random.randint(4, 16)
    while len(world.facts) < events or not _visits(world):
        world.happen(world.move, world.move, world.take, world.drop)
    possible = [(f"Where was the {thing} before the {place}?", before) for thing, before, place in _visits(world)]
    return _story(world, random.choice(possible), possible, PLACES)


def _visits(world: World) -> list[tuple[str, str, str]]:
    trails = world.trail.items()
    return [(t, a, b) for t, trail in trails for a, b in pairwise(trail) if trail.count(b) == 1]


def what_lies_there(random: Random) -> Story:
    """qa4: "The office is north of the garden. The kitchen is east of the garden." "What is north of the garden?"."""
    centre, *around = random.sample(PLACES, 3)
    directions = random.sample(tuple(OPPOSITE), 2)
    facts = [
        random.choice(
            (f"The {place} is {direction} of the {centre}.", f"The {centre} is {OPPOSITE[direction]} of the {place}.")
        )
        for place, direction in zip(around, directions)
    ]
    possible = [
        (question, place)
        for place, direction in zip(around, directions)
        for question in (f"What is {direction} of the {centre}?", f"What is the {centre} {OPPOSITE[direction]} of?")
    ]
    asked = random.choice(possible)
    others = tuple(other for other in possible if other != asked)
    return Story(tuple(random.sample(facts, 2)), *asked, PLACES, others)


def who_gave_what(random: Random) -> Story:
    """qa5: "Fred took the milk there. Fred gave the milk to Jeff." "Who did Fred give the milk to?" - "Jeff".

    The question is about the last time that anything was given; all begin in one place.
    """
    world = World(random, GIVERS, start="")
    events = random.randint(2, 10)
    while len(world.facts) < events or world.given is None:
        if len(world.facts) == LOST:
            world = World(random, GIVERS, start="")
        world.happen(world.move, world.take, world.give, world.drop)
    giver, thing, taker = world.given
    possible = (
        (f"What did {giver} give to {taker}?", thing),
        (f"Who gave the {thing} to {taker}?", giver),
        (f"Who did {giver} give the {thing} to?", taker),
        (f"Who gave the {thing}?", giver),
        (f"Who received the {thing}?", taker),
    )
    return _story(world, random.choice(possible), possible, GIVERS + THINGS)


STORIES: dict[str, Callable[[Random], Story]] = {
    "qa1": where_is_the_person,
    "qa2": where_is_the_thing,
    "qa3": where_was_the_thing,
    "qa4": what_lies_there,
    "qa5": who_gave_what,
}
