"""Reading in pieces: the same state and the same answers as at once, and no call grows with the length."""

import numpy as np
import pytest
import torch

from titans import TitansConfig, build_model
from titans.data import ByteTokenizer
from titans.evaluation.reading import answer, piece_length, read, rows_at_once

RANDOM = np.random.default_rng(0)


@pytest.fixture(params=["LMM", "MAC", "MAG", "MAL", "swa"])
def model(request):
    torch.manual_seed(0)
    config = TitansConfig(variant=request.param, vocab_size=256, d_model=16, n_layers=1, chunk_size=4, window=8)
    return build_model(config).double().eval()


def prompts(*lengths):
    return [RANDOM.integers(1, 256, size=length) for length in lengths]


@pytest.mark.parametrize("piece", [1, 12, 300])
def test_pieces_leave_the_state_of_the_whole(model, piece):
    ids = torch.from_numpy(np.stack(prompts(50, 50)))
    more = torch.from_numpy(np.stack(prompts(9, 9)))
    with torch.no_grad():
        expected = model(torch.cat((ids, more), 1)).logits[:, 50:]
        found = model(more, state=read(model, ids, piece)).logits
    assert torch.allclose(found, expected, atol=1e-9, rtol=0)


def test_rows_are_answered_as_they_are_alone(model):
    tokenizer = ByteTokenizer()
    asked = prompts(40, 53, 47)
    together, _ = answer(model, tokenizer, asked, 6, lambda row, text: False, piece=12)
    alone = [answer(model, tokenizer, [prompt], 6, lambda row, text: False)[0][0] for prompt in asked]
    assert together == alone
    whole = model.generate(torch.from_numpy(asked[1][None]), max_new_tokens=6, temperature=0, eos_token_id=0)
    said = [i for i in whole[0, 53:].tolist() if i]
    assert together[1] == tokenizer.decode(said)


def test_an_answer_ends_when_it_is_settled(reader):
    tokenizer = ByteTokenizer()
    model = reader(tokenizer, lambda text: "abcdef" if text.startswith("x") else "uvw").eval()
    asked = [np.array(tokenizer.encode(text)) for text in ("x..", "y....")]
    texts, state_bytes = answer(model, tokenizer, asked, 10, lambda row, text: "c" in text)
    assert texts == ["abc", "uvw"] and state_bytes == 10


def test_no_call_grows_with_the_length(reader):
    tokenizer = ByteTokenizer()
    model = reader(tokenizer, lambda text: str(len(text))).eval()
    for length in (100_000, 300_000):
        ids = np.full(length, 65)
        assert answer(model, tokenizer, [ids, ids[:-7]], 10, lambda row, text: False)[0] == [
            str(length),
            str(length - 7),
        ]
    assert max(model.lengths) == piece_length(model, 2) == 2**13


def test_pieces_are_whole_segments():
    model = build_model(TitansConfig(variant="MAC", vocab_size=8, d_model=8, n_layers=1, chunk_size=4, segment_len=12))
    assert piece_length(model, 16) == 2**10 // 12 * 12 and piece_length(model, 10_000) == 12
    assert [rows_at_once(length) for length in (256, 4096, 2**20)] == [16, 16, 1]
