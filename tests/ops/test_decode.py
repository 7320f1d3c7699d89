"""The step of fixed shapes: token by token equal to the reference scan, rows at their own places, there and back."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from members import ALGORITHMS, NETWORKS, RETENTIONS, pairwise
from scan_cases import BATCH, HEADS, cut, make, pick, run, state_tensors
from titans.ops.memory import Gates, Rule, Tokens
from titans.ops.memory.decode import begin, end, step, unstepped
from titans.ops.place import Place

TOKENS, READ, CHUNK, OFFSET = 13, (5, 2), 4, 3  # rows begin the steps at different places of their chunks
CASES = pairwise(
    network=list(NETWORKS), retention=list(RETENTIONS), algorithm=list(ALGORITHMS),
    bias=["l2", "huber_mixture_learned"], forgetting=[True, False], norm=[True, False],
)  # fmt: skip


def legal(case):
    return not (ALGORITHMS[case["algorithm"]].per_chunk and case["network"] == "vector")


def take(tensors, columns):
    """One token of every row, at a column of its own, [B, 1, ...]."""
    rows = torch.arange(BATCH)
    return pick(tensors, lambda x: x[rows, torch.tensor(columns)].unsqueeze(1))


def row(tensors, number):
    return pick(tensors, lambda x: x[number : number + 1])


def steps(tensors, miras, state, idle=()):
    """Outputs of every row and the state after its tokens, one by one; at the steps ``idle`` row 0 takes none."""
    rule = Rule(miras, tensors["weights"], CHUNK, tensors["norm"], tensors["steps"])
    read, outputs = list(READ), ([], [])
    buffers = begin(rule, state, [n + OFFSET for n in READ])
    shapes = [x.shape for x in state_tensors(buffers)]
    for number in range(TOKENS - min(READ)):
        active = torch.tensor([read[0] < TOKENS and number not in idle, read[1] < TOKENS])
        now = take(tensors, [min(n, TOKENS - 1) for n in read])
        gates = Gates(now["theta"], now["eta"], now["alpha"], None)
        tokens = Tokens(now["q"], now["k"], now["v"], gates, now["delta"])
        place = Place(torch.tensor(read), None if bool(active.all()) else active, torch.device("cpu"))
        y, buffers = step(rule, tokens, buffers, place, OFFSET)
        assert [x.shape for x in state_tensors(buffers)] == shapes
        for b in range(BATCH):
            if active[b]:
                outputs[b].append(y[b])
                read[b] += 1
    assert read == [TOKENS] * BATCH and place.after.tolist() == read
    return outputs, end(buffers, [n + OFFSET for n in read])


@pytest.mark.parametrize("case", [c for c in CASES if legal(c)], ids=lambda c: "-".join(map(str, c.values())))
@torch.no_grad()
def test_steps_equal_the_reference_wherever_a_row_stands(case):
    tensors, miras = make(**case, tokens=OFFSET + TOKENS, seed=3)
    # The memory's own first tokens are no tokens of the stream (persistent ones in models).
    before = [run(cut(row(tensors, b), 0, OFFSET + n), miras, CHUNK, engine="reference") for b, n in enumerate(READ)]
    wider = before[0][1].select([0, 0]).put([1], before[1][1])
    outputs, state = steps(cut(tensors, OFFSET, OFFSET + TOKENS), miras, wider, idle=(2, 3))
    y, expected = run(tensors, miras, CHUNK, engine="reference")
    for b, n in enumerate(READ):
        assert_close(torch.cat(outputs[b]), y[b, OFFSET + n :], f"row {b}")
    assert state.count == expected.count
    for i, (a, b) in enumerate(zip(state_tensors(state), state_tensors(expected), strict=True)):
        assert_close(a, b, f"state tensor {i}")


@torch.no_grad()
def test_there_and_back_is_the_same_state_with_unstored_tokens_too():
    tensors, miras = make(tokens=6)
    store = torch.tensor([[True, True, True, True, False, True], [True] * 6])
    _, state = run(tensors, miras, CHUNK, store_mask=store)
    rule = Rule(miras, tensors["weights"], CHUNK, tensors["norm"])
    back = end(begin(rule, state, state.count), state.count)
    for a, b in zip(state_tensors(back), state_tensors(state), strict=True):
        assert torch.equal(a, b)


def test_channel_gates_have_no_step():
    assert "per channel" in unstepped(make(gates="channel")[1]) and unstepped(make()[1]) is None


def test_the_state_that_steps_begin_from_does_not_change():
    tensors, miras = make(tokens=6)
    with torch.no_grad():
        _, state = run(tensors, miras, CHUNK)
        before = [x.clone() for x in state_tensors(state)]
        rule = Rule(miras, tensors["weights"], CHUNK, tensors["norm"])
        buffers, now = begin(rule, state, state.count), take(tensors, [0, 0])
        tokens = Tokens(now["q"], now["k"], now["v"], Gates(now["theta"], now["eta"], now["alpha"], None))
        for read in range(6, 9):
            place = Place(torch.tensor([read] * BATCH), None, torch.device("cpu"), appends=True)
            _, buffers = step(rule, tokens, buffers, place)
    assert buffers.tokens.shape[:3] == (BATCH, HEADS, CHUNK)
    for a, b in zip(state_tensors(state), before, strict=True):
        assert torch.equal(a, b)
