"""The law of math.md §6 on random models and texts: cut, masked, reset, packed, each row gives what it gives alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close
from members import ALGORITHMS, BIASES, NETWORKS, RETENTIONS
from tiny import ALL
from titans import MirasConfig, TitansConfig, build_model

VOCAB, LONGEST = 11, 20
EXAMPLES = 2 * settings.default.max_examples // 5  # of every variant: 40, and 800 at night


@dataclass(frozen=True)
class Text:
    """Rows of one batch, where it is cut, which tokens are padding, which rows begin anew at which cut, and the number
    of every token's document."""

    ids: Tensor
    mask: Tensor
    resets: dict[int, tuple[int, ...]]  # by cut: every cut has an entry
    documents: Tensor

    def pieces(self) -> list[tuple[int, int]]:
        return list(pairwise((0, *sorted(self.resets), self.ids.shape[1])))

    def streams(self, row: int) -> list[tuple[int, int]]:
        """Columns from one beginning of a row to the next."""
        anew = {cut for cut, rows in self.resets.items() if row in rows}
        for start, stop in self.pieces():
            real = [c for c in range(start, stop) if self.mask[row, c]]
            anew |= {c for before, c in pairwise(real) if self.documents[row, c] != self.documents[row, before]}
        return list(pairwise((0, *sorted(anew - {0}), self.ids.shape[1])))

    def real(self, row: int, begin: int, end: int) -> Tensor:
        """The tokens of a row without padding, [1, n]."""
        return self.ids[row : row + 1, begin:end][:, self.mask[row, begin:end]]


@st.composite
def texts(draw) -> Text:
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, LONGEST))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    flags = draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    mask = torch.tensor(flags).view(rows, tokens) if draw(st.booleans()) else torch.ones(rows, tokens, dtype=torch.bool)
    cuts = draw(st.sets(st.integers(1, tokens - 1))) if tokens > 1 else ()
    resets = {cut: tuple(draw(st.sets(st.integers(0, rows - 1)))) for cut in sorted(cuts)}
    changes = draw(st.lists(st.sampled_from([0, 0, 0, 0, 1]), min_size=rows * tokens, max_size=rows * tokens))
    documents = torch.tensor(changes).view(rows, tokens).cumsum(1)
    return Text(torch.randint(VOCAB, (rows, tokens), generator=numbers), mask, resets, documents)


@st.composite
def configurations(draw, variant: str) -> TitansConfig:
    def one_of(members):
        return members[draw(st.sampled_from(sorted(members)))]

    algorithm = one_of(ALGORITHMS)
    networks = {n: m for n, m in NETWORKS.items() if n != "vector"} if algorithm.per_chunk else NETWORKS
    chunk = draw(st.integers(3, 5))
    return TitansConfig(
        variant=variant, vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2, mem_heads=2, chunk_size=chunk,
        segment_len=chunk * draw(st.integers(1, 2)), window=draw(st.integers(1, 6)),
        n_persistent=draw(st.integers(0, 3)), n_memory_tokens=draw(st.integers(0, 2)) if variant == "MAC" else 0,
        conv_kernel=draw(st.sampled_from([0, 4])), use_decay=draw(st.booleans()),
        miras=MirasConfig(
            architecture=one_of(networks), bias=one_of(BIASES), retention=one_of(RETENTIONS), algorithm=algorithm,
            gates=draw(st.sampled_from(["head", "channel"])),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("variant", ALL)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), text=texts())
@torch.no_grad()
def test_pieces_padding_resets_and_documents_give_every_row_what_it_gives_alone(variant, data, text):
    torch.manual_seed(0)
    model = build_model(data.draw(configurations(variant))).double().eval()
    outputs, state = [], None
    for start, stop in text.pieces():
        state = None if state is None else state.reset(text.resets[start])
        ids, mask, documents = (x[:, start:stop] for x in (text.ids, text.mask, text.documents))
        out = model(ids, attention_mask=mask, document_ids=documents, state=state)
        outputs.append(out.logits)
        state = out.state
    logits, more = torch.cat(outputs, 1), text.ids[:, :5]
    assert not logits[~text.mask].any(), "padding has logits of zero"
    further = model(more, state=state).logits
    for row in range(len(more)):
        carried = None
        for begin, end in text.streams(row):
            tokens, carried = text.real(row, begin, end), None
            if tokens.shape[1]:
                alone = model(tokens)
                carried = alone.state
                real = text.mask[row, begin:end]
                assert_close(logits[row, begin:end][real], alone.logits[0], f"row {row}, tokens {begin} to {end}")
        alone = model(more[row : row + 1], state=carried).logits
        assert_close(further[row : row + 1], alone, f"row {row}, going on")
