"""What is refused where people rarely go wrong: one clear error that names what it is about."""

import json

import pytest
import torch

from tiny import ids, small
from titans.data import ByteTokenizer
from titans.evaluation import evaluate
from titans.evaluation.from_memory import ask_questions, read_questions
from titans.evaluation.perplexity import nats_by_position
from titans.evaluation.task import EvaluationError
from titans.models import ModelState
from titans.state import check_place, check_rows, decode, encode, walk
from titans.training.carry import CarriedStates
from titans.training.config import LONGEST_FILE, ConfigError, TrainConfig, read_mapping

QUESTIONS = {
    "no utf-8": (b'{"question": "a", "answer": "b"}\n\xff', "q.jsonl: .*33"),
    "no answer": (b'\n{"question": "a"}\n', "line 2 is not"),
    "a number": (b'{"question": "a", "answer": 3}', "line 1 is not"),
    "half a character": (b'{"question": "a", "answer": "\\ud800"}', "line 1 is not"),
    "too deep": (b"[" * 100_000, "line 1 is not"),
    "nothing": (b" \n\n", "holds none"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(tmp_path, name):
    content, told = QUESTIONS[name]
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(EvaluationError, match=f"questions: .*{told}"):
        read_questions(tmp_path / "q.jsonl")


@pytest.fixture(scope="module")
def model():
    return small("LMM", n_layers=1, vocab_size=256).eval()


@pytest.mark.parametrize(
    ("questions", "template", "told"),
    [([("a", "b")], "x", "template: needs {} where"), ([], "{}", "none given"), ([("a", "b")], "{}", "at least 2 tok")],
)
def test_asking(model, questions, template, told):
    with torch.no_grad(), pytest.raises(EvaluationError, match=told):
        ask_questions(model, ByteTokenizer(), model(ids(1)).state, questions, template)


EVALUATIONS = {
    "no model": ({"model": 3}, "model must be a model, got int"),
    "no tokenizer": ({"tokenizer": "bytes"}, "tokenizer must be a Tokenizer, got str"),
    "no text": ({"text": "TEXT"}, "text: source: .*empty.txt is too small"),
    "a file in the way": ({"output": "TEXT"}, "output: .* is a file"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(model, tmp_path, name):
    (tmp_path / "empty.txt").write_text("  \n")
    changes, told = EVALUATIONS[name]
    changes = {key: str(tmp_path / "empty.txt") if value == "TEXT" else value for key, value in changes.items()}
    given = {"model": model, "tokenizer": ByteTokenizer(), "tasks": ["ppl"], "lengths": [8], "samples": 1, **changes}
    with pytest.raises((EvaluationError, ValueError), match=told):
        evaluate(**given)


@pytest.mark.parametrize(
    ("batches", "more", "told"),
    [([], {}, "at least one batch"), ([ids(1)], {"segment": 0}, "segment must be at least 1, got 0"),
     ([ids(1)], {"memory": "rest"}, "memory must be one of .* did you mean 'reset'")],
)  # fmt: skip
def test_losses_by_position(model, batches, more, told):
    with pytest.raises(ValueError, match=told):
        nats_by_position(model, batches, **{"segment": 4, **more})


@pytest.fixture(scope="module")
def state(model):
    with torch.no_grad():
        return model(ids()).state


def test_states_in_files(state):
    tensors = {}
    tree = encode(state.layers[0], tensors)
    first = next(iter(tensors))
    with pytest.raises(ValueError, match="its tensor is missing"):
        decode(tree, {name: x for name, x in tensors.items() if name != first})
    for change in ({"kind": "Nobody"}, {"fields": {}}, {"fields": None}):
        with pytest.raises(ValueError, match="state: .* is no kind of state, or one of another version"):
            decode({**tree, **change}, tensors)


def test_parts_of_states(state):
    def spoilt(change):
        return walk(lambda leaf, x: change(x), state.layers[0])

    def is_count(x):
        return x.dtype == torch.int64

    with pytest.raises(ValueError, match=r"must have the state's \d rows, got"):
        check_rows(spoilt(lambda x: x if is_count(x) else x[:1]))
    with pytest.raises(ValueError, match="must be counts of at least 0, one per row, got"):
        check_rows(spoilt(lambda x: x - 1000 if is_count(x) else x))
    with pytest.raises(ValueError, match="must be floating point, got torch.int32"):
        check_rows(spoilt(lambda x: x if is_count(x) else x.int()))
    with pytest.raises(ValueError, match="is on meta, the memory on cpu: move it there"):
        check_place(spoilt(lambda x: x.to("meta")), torch.device("cpu"), "the memory")


@pytest.mark.parametrize("path", [3, b"folder", "", None])
def test_paths(path):
    with pytest.raises(ValueError, match="path"):
        ModelState.load(path)


def test_states_of_a_run(model, tmp_path):
    carried = CarriedStates(1, 1)
    with pytest.raises(ConfigError, match="holds the states of 0 processes, this run has 2"):
        carried.load(tmp_path, 0, 2, 5, model, 2)
    with torch.no_grad():
        model(ids()).state.save(tmp_path / "carried-0-0.safetensors")
    for reader, rows, told in (
        (model, 3, "holds states of 2 rows, not 3"),
        (small("LMM", n_layers=2, vocab_size=256), 2, "of a model of another configuration"),
    ):
        with pytest.raises(ConfigError, match=told):
            carried.load(tmp_path, 0, 1, 5, reader, rows)


def test_files_of_a_run(tmp_path):
    (tmp_path / "long.yaml").write_text("a: 1\n" + "#" * LONGEST_FILE)
    with pytest.raises(ConfigError, match="long.yaml: longer than 10,000,000 bytes"):
        read_mapping(tmp_path / "long.yaml")
    for raw in ("x", {"model": "x"}, {"model": [1]}):
        with pytest.raises(ConfigError, match="dict"):
            TrainConfig.parse(raw)
    with pytest.raises(ConfigError, match="no field lies so deep"):
        TrainConfig.parse({}, [".".join("a" * 30) + "=1"])


def test_a_tokenizer_that_nobody_can_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    from titans.data.tokenizers import HuggingFaceTokenizer

    before = transformers.utils.logging.get_verbosity()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read"):
        HuggingFaceTokenizer(tmp_path)
    assert transformers.utils.logging.get_verbosity() == before
