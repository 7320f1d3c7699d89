"""Random programs over states: whatever is done to it, a row gives what its own history gives in one call."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from helpers import assert_close
from tiny import ALL, VOCAB, small
from titans.models import ModelState

NUMBER = settings.default.max_examples
EXAMPLES = 3 if NUMBER == 100 else -(-5 * NUMBER // len(ALL))  # of every variant: 3, and 10,000 together at night
MOST_ROWS, LONGEST = 3, 40
SLOTS = st.sampled_from(["left", "right"])
CHANGES = ({}, {"conv_kernel": 0, "n_persistent": 0, "n_heads": 1, "mem_heads": 1}, {"chunk_size": 3, "segment_len": 6})


@cache
def model(variant, change):
    return small(variant, n_layers=1, **CHANGES[change]).eval()


class Programs(RuleBasedStateMachine):
    """Two states and, for each of their rows, the tokens it has read, (id, is it written) each."""

    variant = ""

    @initialize(change=st.integers(0, len(CHANGES) - 1), rows=st.integers(1, MOST_ROWS), seed=st.integers(0, 2**31))
    def begin(self, change, rows, seed):
        self.model = model(self.variant, change)
        self.draw = torch.Generator().manual_seed(seed)
        self.states: dict[str, ModelState | None] = {"left": None, "right": None}
        self.histories = {"left": [[] for _ in range(rows)], "right": [[]]}
        self.exact = {"left": True, "right": True}

    @rule(slot=SLOTS, tokens=st.integers(1, 9), masked=st.booleans(), unwritten=st.booleans())
    @torch.no_grad()
    def call(self, slot, tokens, masked, unwritten):
        rows = len(self.histories[slot])
        ids = torch.randint(VOCAB, (rows, tokens), generator=self.draw)
        mask, store = (
            torch.rand(rows, tokens, generator=self.draw) < (0.7 if some else 1.1) for some in (masked, unwritten)
        )
        given = {"attention_mask": mask} if masked else {}
        out = self.model(ids, state=self.states[slot], store_mask=store if unwritten else None, **given)
        self.states[slot] = out.state
        for row, history in enumerate(self.histories[slot]):
            real = mask[row]
            history += zip(ids[row][real].tolist(), store[row][real].tolist(), strict=True)
            if real.any():
                expected = self.alone(history)[0, -int(real.sum()) :]
                self.compare(slot, out.logits[row][real], expected, f"row {row}")

    def alone(self, history):
        ids, store = zip(*history, strict=True)
        return self.model(torch.tensor([ids]), store_mask=torch.tensor([store])).logits

    def compare(self, slot, found, expected, what):
        if self.exact[slot]:
            assert_close(found, expected, what)
        else:  # the state went through float32
            assert_close(found, expected, what, tolerance=1e-3)

    @precondition(lambda self: any(self.states.values()))
    @rule(data=st.data(), slot=SLOTS)
    def reset(self, data, slot):
        if self.states[slot] is not None:
            rows = sorted(data.draw(st.sets(st.integers(0, self.states[slot].rows - 1))))
            self.states[slot] = self.states[slot].reset(rows)
            for row in rows:
                self.histories[slot][row] = []
            assert all(self.states[slot].seen[row] == 0 for row in rows)

    @precondition(lambda self: any(self.states.values()))
    @rule(data=st.data(), slot=SLOTS)
    def select(self, data, slot):
        if self.states[slot] is not None:
            numbers = st.integers(0, self.states[slot].rows - 1)
            rows = data.draw(st.lists(numbers, min_size=1, max_size=MOST_ROWS))
            self.states[slot] = self.states[slot].select(rows)
            self.histories[slot] = [list(self.histories[slot][row]) for row in rows]

    @precondition(lambda self: any(self.states.values()))
    @rule(slot=SLOTS, copies=st.integers(1, 2))
    def fork(self, slot, copies):
        if self.states[slot] is not None and copies * self.states[slot].rows <= MOST_ROWS:
            self.states[slot] = self.states[slot].fork(copies)
            self.histories[slot] = [list(history) for history in self.histories[slot] for _ in range(copies)]

    @precondition(lambda self: all(self.states.values()))
    @rule(data=st.data())
    def put(self, data):
        left, right = self.states["left"], self.states["right"]
        n = data.draw(st.integers(1, min(left.rows, right.rows)))
        target = data.draw(st.permutations(range(left.rows)))[:n]
        source = data.draw(st.permutations(range(right.rows)))[:n]
        self.states["left"] = left.put(target, right.select(source))
        self.exact["left"] &= self.exact["right"]
        for to, of in zip(target, source, strict=True):
            self.histories["left"][to] = list(self.histories["right"][of])

    @precondition(lambda self: any(self.states.values()))
    @rule(slot=SLOTS)
    def save_and_load(self, slot):
        if self.states[slot] is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.states[slot].save(Path(folder, "s.st"))
                self.states[slot] = ModelState.load(Path(folder, "s.st"))

    @precondition(lambda self: any(self.states.values()))
    @rule(slot=SLOTS)
    def through_float32(self, slot):
        if self.states[slot] is not None:
            self.states[slot] = self.states[slot].to(torch.float32).to(torch.float64)
            self.exact[slot] = False

    @precondition(lambda self: any(self.states.values()))
    @rule(slot=SLOTS)
    def seen(self, slot):
        if self.states[slot] is not None:
            assert list(self.states[slot].seen) == [len(history) for history in self.histories[slot]]


@pytest.mark.parametrize("variant", ALL)
def test_a_row_gives_what_its_history_gives_whatever_is_done_to_the_state(variant):
    machine = type(f"Programs{variant}", (Programs,), {"variant": variant})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=14))
