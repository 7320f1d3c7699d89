"""transformers' generation over a state: what it gives with the cache is what it gives without, and by itself."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from helpers import assert_close
from tiny import VARIANTS
from titans.data import ByteTokenizer
from titans.hf import TitansCache
from titans.miras import MirasConfig
from titans.training.data import save_tokenizer

RULES = {
    "steady": MirasConfig.steady, "titans": MirasConfig.titans, "yaad": MirasConfig.yaad, "moneta": MirasConfig.moneta,
    "memora": MirasConfig.memora,
}  # fmt: skip
BASELINES = [("transformer", None), ("swa", None)]
# Quick are every variant and every rule once; every variant with every rule is for the night.
QUICK = [("LMM", "steady"), ("MAC", "titans"), ("MAG", "yaad"), ("MAL", "moneta"), ("MAC", "memora"), *BASELINES]
MODELS = [*((v, name) for v in VARIANTS for name in RULES), *BASELINES]
every_model = pytest.mark.parametrize(
    ("variant", "rule"), [pytest.param(*m, marks=[] if m in QUICK else pytest.mark.slow) for m in MODELS]
)
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 4},
}


def made(make, variant, rule):
    """In float64: some untrained memories magnify float32's rounding until another token is drawn."""
    return make(variant=variant, miras=None if rule is None else RULES[rule]()).double()


@pytest.mark.parametrize("way", sorted(WAYS))
@every_model
def test_with_the_state_as_without(make, ids, variant, rule, way):
    """12 new tokens cross chunks and a segment; a state of the wrong beam would show."""
    model = made(make, variant, rule)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **WAYS[way]))
    assert torch.equal(*found) and found[0].shape == (2, 33)


@every_model
def test_a_left_padded_row_is_the_row_alone(make, ids, mask, variant, rule):
    model = made(make, variant, rule)
    for way in (WAYS["greedy"], WAYS["beams"]):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=10, **way)
        alone = model.generate(ids[:1, 6:], max_new_tokens=10, **way)
        assert torch.equal(both[0, 21:], alone[0, 15:])


def test_a_row_that_ends_in_padding_is_refused(make, ids, mask):
    """transformers goes on from the last column, whatever it holds."""
    with pytest.raises(ValueError, match="attention_mask: row 0 ends in padding"):
        make().generate(ids, attention_mask=mask.flip(1), max_new_tokens=2)


@every_model
def test_a_returned_cache_goes_on_as_one_call_would(make, ids, mask, variant, rule):
    """With several new tokens, and padding before the first ones."""
    model = made(make, variant, rule)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, do_sample=False)
    assert out.past_key_values.get_seq_length() == 26  # the last token is not read yet
    text = torch.cat((out.sequences, ids[:, :4]), 1)
    whole = torch.cat((mask, torch.ones(2, 10, dtype=torch.long)), 1)
    given = {"attention_mask": whole, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(text, past_key_values=out.past_key_values, **given), model.generate(text, **given)
    )


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_document_is_read_once_and_asked_often(make, ids, way):
    model = make()
    document, question = ids[:, :17], ids[:, 17:]
    state = model(document).state
    expected = model.generate(ids, max_new_tokens=6, **WAYS[way])[:, 21:]
    for _ in range(2):
        assert torch.equal(model.generate(question, state=state, max_new_tokens=6, **WAYS[way])[:, 4:], expected)
    assert state.seen == (17, 17)


def test_the_callers_cache_is_not_spread_over_beams(make, ids):
    model = make()
    cache = model(ids[:, :17]).past_key_values
    model.generate(ids, past_key_values=cache, max_new_tokens=3, num_beams=2)
    assert cache.state.rows == 2 and cache.get_seq_length() == 17


def test_a_cache_with_less_text_than_it_has_read_is_refused(make, ids):
    model = make()
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="whole text so far, more than the 21 tokens of past_key_values, got 3"):
        model.generate(ids[:, :3], past_key_values=cache, max_new_tokens=2)


def test_it_is_the_models_own_generation(make, ids, mask):
    model = make()
    own = model.model.generate(ids, attention_mask=mask, max_new_tokens=9, temperature=0)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False), own)
    embedded = model.generate(inputs_embeds=model.model.embedding(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(embedded, model.generate(ids, max_new_tokens=5, do_sample=False)[:, 21:])


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"max_length": 25}, (2, 25)),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, (2, 24)),
        ({"max_new_tokens": 3, "num_return_sequences": 3, "do_sample": True}, (6, 24)),
        ({"max_new_tokens": 3, "num_return_sequences": 2, "num_beams": 4, "do_sample": True}, (4, 24)),
        ({"max_new_tokens": 3, "repetition_penalty": 1.2, "min_p": 0.1, "do_sample": True, "pad_token_id": 0}, (2, 24)),
        ({"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(23)])}, (2, 23)),
        ({"max_new_tokens": 3, "logits_processor": []}, (2, 24)),
    ],
)
def test_arguments_of_transformers(make, ids, arguments, shape):
    torch.manual_seed(0)
    assert make().generate(ids, **arguments).shape == shape


def test_any_of_several_tokens_ends_a_row(make, ids):
    model = make()
    free = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 21:]
    ends = [int(free[0, 3]), int(free[1, 6])]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0)[:, 21:]
    for row, expected in zip(out, free, strict=True):
        stop = int(torch.isin(expected, torch.tensor(ends)).nonzero()[0]) + 1
        assert torch.equal(row[:stop], expected[:stop]) and not row[stop:].any()


def test_scores_and_hidden_states_are_returned(make, ids):
    out = make().generate(
        ids, max_new_tokens=3, output_scores=True, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(out.scores) == 3 and len(out.hidden_states) == 3 and isinstance(out.past_key_values, TitansCache)


def test_streamers_and_the_pipeline_give_the_same_text(tmp_path, make):
    model = make(vocab_size=256)
    model.save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("to be", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
    streamer = TextIteratorStreamer(tokenizer)
    model.generate(**prompt, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer) == expected
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    one = generator("to be", max_new_tokens=6, do_sample=False)
    two = generator(["to be", "or not to be"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert one[0]["generated_text"] == two[0][0]["generated_text"] == expected
    stopped = model.generate(**prompt, max_new_tokens=6, do_sample=False, stop_strings=["o be"], tokenizer=tokenizer)
    assert stopped.shape[1] <= 11


def test_the_caches_rows_can_be_moved(make, ids):
    model = make()
    last = model(ids).logits[:, -1:]
    cache = model(ids[:, :20]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_close(model(ids[[1, 0], 20:], past_key_values=cache).logits, last[[1, 0]])
    cache.reset()
    assert_close(model(ids, past_key_values=cache).logits[:, -1:], last)
