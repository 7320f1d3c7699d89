"""A text to hide things in, word lists, two tokenizers, and a stub that has read everything and says as it is told."""

import sys
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import pytest
import torch

from titans.data import ByteTokenizer, HuggingFaceTokenizer
from titans.evaluation.niah import word_lists

NOUNS = ["anchor", "beret", "candle", "door", "engine"]
ADJECTIVES = ["calm", "nasty", "proud", "quiet"]


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Word lists in wonderwords' place, so that the tests need no installation of it."""
    lists = {"nounlist.txt": NOUNS, "adjectivelist.txt": ADJECTIVES}
    module = SimpleNamespace(_get_words_from_text_file=lists.__getitem__)
    monkeypatch.setitem(sys.modules, "wonderwords", SimpleNamespace(random_word=module))
    word_lists.cache_clear()
    yield
    word_lists.cache_clear()


def sentences(seed, count):
    random = Random(seed)
    return " ".join(
        " ".join("".join(random.choices("abcdefghij", k=random.randint(2, 7))) for _ in range(random.randint(3, 12)))
        + "."
        for _ in range(count)
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Path of a folder with a train and a validation split."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(sentences(1, 3000))
    (folder / "validation.txt").write_text(sentences(2, 600))
    return str(folder)


@pytest.fixture(scope="session")
def merging(text, tmp_path_factory):
    """A byte-level BPE tokenizer, whose tokens depend on what stands beside them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([sentences(1, 300), "special magic numbers mentioned in the provided text"], trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return HuggingFaceTokenizer(file)


@pytest.fixture(params=["bytes", "merging"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("merging")


@dataclass
class History:
    """Everything that each row has read, as a state."""

    rows: list

    @property
    def nbytes(self):
        return 10 * len(self.rows)


class Reader(torch.nn.Module):
    """A "model" whose state is the whole text; ``find`` turns it into what it says.

    Args:
        calls_before_death: so many calls, then it is killed as by Ctrl-C.
    """

    def __init__(self, tokenizer, find, calls_before_death=10**9):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.find, self.left = tokenizer, find, calls_before_death
        self.lengths = []

    def forward(self, ids, state=None, attention_mask=None, logits_to_keep=0):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.lengths.append(ids.shape[1])
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        old = [[] for _ in ids] if state is None else state.rows
        rows = [before + new[keep.bool()].tolist() for before, new, keep in zip(old, ids, mask, strict=True)]
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 1), state=History(rows))

    def stream(self, prompt, max_new_tokens, temperature, eos_token_id, state, attention_mask):
        assert temperature == 0 and not self.training
        rows = self(prompt, state=state, attention_mask=attention_mask).state.rows
        said = [self.tokenizer.encode(self.find(self.tokenizer.decode(row)))[:max_new_tokens] for row in rows]
        longest = max(map(len, said)) + 1
        for step in range(longest):
            yield torch.tensor([ids[step] if step < len(ids) else eos_token_id for ids in said])


@pytest.fixture
def reader():
    return Reader
