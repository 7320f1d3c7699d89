"""Memorizing in pieces is memorizing at once, to the bit; what a memory file says is true; forks are what each is."""

import dataclasses

import numpy as np
import pytest
import torch

from helpers import assert_close
from tiny import VARIANTS, ids, small, tensors
from titans import load_memory
from titans.layers.neural_memory import NeuralMemory
from titans.models import MemoryFile, ModelState, TitansConfig, build_model
from titans.models import memorize as memorizing
from titans.models.memory_file import Forgetting, Input, changes


def same_bits(one, two):
    return one.seen == two.seen and all(map(torch.equal, tensors(one), tensors(two)))


def single(variant, **changes):
    return small(variant, **changes).float().eval()


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(memorizing, "PIECE", 20)  # 16 with segments of 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_any_size_give_the_bits_of_the_text_at_once(variant, tmp_path):
    model, text = single(variant), ids(1, 83)[0]
    whole = model.memorize(text)
    draw = np.random.default_rng(0)
    for _ in range(4):
        cuts = np.sort(draw.integers(0, 84, size=draw.integers(0, 9)))
        assert same_bits(whole, model.memorize(np.split(text.numpy(), cuts)))
    assert_close(model(ids(1, 3), state=whole).logits, model(ids(1, 3), state=model(text[None]).state).logits)
    half = model.memorize(text[:48])  # 48 is where a piece ends
    half.save(tmp_path / "half")
    assert same_bits(whole, model.memorize(text[48:], state=load_memory(tmp_path / "half", model)))


@pytest.mark.parametrize("position", [0, 5, 16, 37])
def test_calls_end_at_fixed_places_and_lose_nothing(position):
    model, text = single("MAC"), np.arange(83)
    for step in (1, 7, 16, 83):
        pieces = list(memorizing.on_grid((text[at : at + step] for at in range(0, 83, step)), position, model))
        assert np.concatenate(pieces).tolist() == text.tolist()
        ends = position + np.cumsum([len(piece) for piece in pieces])
        assert ends.tolist() == [*(n for n in range(16, position + 83, 16) if n > position), position + 83]


@pytest.mark.parametrize("variant", ["LMM", "MAC"])
def test_a_text_cut_elsewhere_is_the_same_but_for_the_last_bits(variant):
    model, text = small(variant), ids(2, 83)
    whole, parts = model.memorize(text), model.memorize(text[:, 30:], state=model.memorize(text[:, :30]))
    assert whole.seen == parts.seen == (83, 83)
    for one, two in zip(tensors(whole), tensors(parts), strict=True):
        assert_close(two, one)


def test_strings_need_a_tokenizer_unless_ids_are_bytes():
    model = single("LMM")
    with pytest.raises(ValueError, match="text needs tokenizer=: the model's 11 ids"):
        model.memorize("text")

    class Digits:
        def encode(self, text):
            return [int(c) for c in text]

    assert same_bits(model.memorize("123", Digits()), model.memorize(torch.tensor([1, 2, 3])))
    bytes_ = build_model(TitansConfig(variant="LMM", vocab_size=256, d_model=8, n_layers=1, chunk_size=4))
    assert same_bits(bytes_.memorize("é!"), bytes_.memorize(torch.tensor([0xC3, 0xA9, 33])))
    for wrong in ("", torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="holds no token"):
            bytes_.memorize(wrong)
    with pytest.raises(ValueError, match=r"text must be integers \(int64\)"):
        bytes_.memorize(torch.zeros(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sixty_four_questions_in_a_batch_are_each_alone(variant):
    model = small(variant)
    memory, questions = model.memorize(ids(1, 61)[0]), ids(64, 9, seed=2)
    forks = memory.fork(64)
    before = [x.clone() for x in tensors(memory)]
    together = model.generate(questions, 6, temperature=0, state=forks)
    logits = model(questions, state=forks).logits
    for row in range(0, 64, 7):
        alone = questions[row : row + 1]
        assert torch.equal(model.generate(alone, 6, temperature=0, state=memory), together[row : row + 1])
        assert_close(model(alone, state=memory).logits, logits[row : row + 1])
    assert all(map(torch.equal, before, tensors(memory)))
    other = model.memorize(ids(1, 40, seed=5)[0])
    merged = memory.fork(2).put([1], other)  # two memories as one batch
    assert_close(model(questions[:2], state=merged).logits[1:], model(questions[1:2], state=other).logits)
    assert_close(model(questions[:2], state=merged.reset([0])).logits[:1], model(questions[:1]).logits)


@pytest.mark.parametrize(
    ("dtype", "error", "size"), [("float32", 0, 1.1), ("bfloat16", 0.02, 0.6), ("int8", 0.05, 0.4)]
)
def test_stored_dtypes_round_and_shrink(tmp_path, dtype, error, size):
    model = build_model(TitansConfig(variant="MAC", vocab_size=256, d_model=32, n_layers=2, chunk_size=8)).eval()
    memory = model.memorize(torch.arange(203) * 7 % 256)
    memory.save(tmp_path / "memory", dtype)
    assert (tmp_path / "memory").stat().st_size < size * memory.nbytes + 8000
    loaded = load_memory(tmp_path / "memory", model)
    assert [x.dtype for x in tensors(loaded)] == [x.dtype for x in tensors(memory)]
    for one, two in zip(tensors(memory), tensors(loaded), strict=True):
        assert_close(two, one, tolerance=error)
    assert loaded.seen == memory.seen
    assert same_bits(memory, loaded) == (dtype == "float32")


def test_a_dtype_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, got 'int4'"):
        small("LMM")(ids()).state.save(tmp_path / "x", "int4")
    assert not list(tmp_path.iterdir())


def test_a_memory_file_says_what_it_is(tmp_path):
    model = small("MAC", mem_heads=2)
    forgetting = Forgetting()
    with forgetting.watch(model):
        memory = model.memorize(ids(1, 83)[0])
    assert not any(m._forward_hooks for m in model.modules())
    layers = tuple(changes(model, memory, forgetting.told))
    read = (Input("book.txt", 83, "00", 83),)
    MemoryFile(memory, read, layers, forgetting.told, None, "bfloat16").save(tmp_path / "memory")
    found = MemoryFile.open(tmp_path / "memory")
    expected = MemoryFile(memory, read, layers, forgetting.told, None, "bfloat16")
    assert dataclasses.replace(found, state=memory) == expected
    assert found.tokens == 83
    memories = [m for m in model.modules() if isinstance(m, NeuralMemory)]
    states = [layer.memory.memory for layer in memory.layers]
    for change, layer, state in zip(layers, memories, states, strict=True):
        start, now = (torch.cat([w.flatten() for w in maps]) for maps in (layer.initial_weights, state.weights))
        assert change.moved == pytest.approx(((now - start).norm() / start.norm()).item())
        assert change.norm == pytest.approx((now.norm() / start.norm()).item())
        assert len(change.half_life) == 2
    memory.save(tmp_path / "plain")
    plain = MemoryFile.open(tmp_path / "plain")
    assert (plain.tokens, plain.inputs, plain.layers, plain.unfinished) == (83, (), (), None)


def test_half_lives_are_those_of_the_gates():
    model = small("LMM", n_persistent=0)
    forgetting = Forgetting()
    with forgetting.watch(model):
        memory = model.memorize(ids(1, 30)[0])
    trace = model.blocks[0].mixer.branch.memory.trace(model.blocks[0].mixer_norm(model.embedding(ids(1, 30))))
    expected = np.log(2) / (-torch.log1p(-trace.alpha)).mean((0, 1))
    assert changes(model, memory, forgetting.told)[0].half_life == pytest.approx(expected.tolist())
    unforgetting = small("LMM", use_decay=False)
    with (watched := Forgetting()).watch(unforgetting):
        memory = unforgetting.memorize(ids(1, 30)[0])
    assert changes(unforgetting, memory, watched.told)[0].half_life is None


def test_the_memory_of_another_model_or_half_of_one_is_refused_by_name(tmp_path):
    model = small("MAC")
    memory = model.memorize(ids(1, 20)[0])
    memory.save(tmp_path / "m.st")
    assert same_bits(memory, load_memory(tmp_path / "m.st", model))
    other = small("MAC")
    with torch.no_grad():
        other.norm.weight += 1
    for wrong, message in ((other, "other weights"), (small("MAC", chunk_size=8), "another configuration")):
        with pytest.raises(ValueError, match=f"m.st.*{message}"):
            load_memory(tmp_path / "m.st", wrong)
    MemoryFile(memory, unfinished={"tokens": 3}).save(tmp_path / "half.st")
    with pytest.raises(ValueError, match="half.st.*is half-read, 20 tokens so far"):
        load_memory(tmp_path / "half.st", model)
    memory.save(tmp_path / "odd.st", about={"inputs": [{"nam": 1}]})
    with pytest.raises(ValueError, match="odd.st.*is damaged"):
        MemoryFile.open(tmp_path / "odd.st")
    assert ModelState.load(tmp_path / "odd.st").seen == (20,)
    with pytest.raises(FileNotFoundError, match="none"):
        load_memory(tmp_path / "none", model)


def test_ids_in_one_array_are_read_as_in_one_tensor():
    model = small("MAC")
    read = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint16)
    one, two = (model.memorize(text) for text in (read, torch.from_numpy(read.astype(np.int64))))
    assert one.seen == two.seen == (3, 3)
    assert torch.equal(model(ids(), state=one).logits, model(ids(), state=two).logits)
