"""Hostile cases of memories and evaluations on the command line: what is there already, and what was read."""

import json
import shutil

import pytest
import torch

from tiny import model_and_text
from titans import load_model
from titans.cli import main
from titans.data import ByteTokenizer
from titans.evaluation import EvaluationError, evaluate
from titans.evaluation.from_memory import check_answers
from titans.reading import Job, memorize_files, trace_text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a text and its memory, to be copied."""
    folder = model_and_text(tmp_path_factory.mktemp("made"))
    assert main(memorize(folder)) == 0
    return folder


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def memorize(place, *more, text="text.txt", output="memory"):
    words = ["memorize", "--model", place / "model", "--input", place / text, "--output", place / output, *more]
    return [str(word) for word in words]


def refused(capsys, words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("titans: ") and shown.err.count("\n") == 1
    return shown.err


def test_a_finished_memory_is_of_what_was_read(place, capsys):
    assert main(memorize(place, "--resume")) == 0
    (place / "other").mkdir()
    (place / "other" / "text.txt").write_text("another text of the same name")
    told = refused(capsys, memorize(place, "--resume", text="other/text.txt"))
    assert "--input" in told and "other/text.txt is not what" in told
    assert "--dtype: int8, but" in refused(capsys, memorize(place, "--resume", "--dtype", "int8"))
    assert main(memorize(place, output="second")) == 0
    told = refused(capsys, memorize(place, "--resume", "--append", place / "second"))
    assert "--append" in told and "did not start from that" in told
    appended = memorize(place, "--append", place / "second", output="third")
    assert main(appended) == main([*appended, "--resume"]) == 0
    assert "did not start from that" in refused(capsys, memorize(place, "--resume", output="third"))
    with (place / "text.txt").open("a") as file:
        file.write("one word more")
    assert "has changed since" in refused(capsys, memorize(place, "--resume"))


def test_a_job_is_checked_before_anything_is_read(place):
    with pytest.raises(ValueError, match="inputs must be a tuple of file names, got str 't.txt'"):
        Job("t.txt", place / "new")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, got 'fp4'"):
        Job(("t.txt",), place / "new", dtype="fp4")
    with pytest.raises(ValueError, match="model must be a model of titans, no grafted decoder, got Linear"):
        memorize_files(torch.nn.Linear(1, 1), ByteTokenizer(), Job((str(place / "text.txt"),), place / "new"))
    model = load_model(place / "model")
    for ids in (torch.ones(3), [1, 2], "text"):
        with pytest.raises(ValueError, match="ids must be a non-empty array of integers"):
            trace_text(model, ids)
    with pytest.raises(ValueError, match="model must be a model of titans"):
        trace_text(torch.nn.Linear(1, 1), torch.ones(3).numpy())


@pytest.mark.parametrize("content", ['{"question": "what?", "answer": "x"}\n', '{"mine": 1}', "[1]", "text", ""])
@pytest.mark.parametrize("name", ["questions.json", "questions.md"])
def test_answers_replace_answers_alone(place, capsys, name, content):
    """A user's questions, which may have the name of what is written, too."""
    (place / name).write_text(content)
    (place / "q.jsonl").write_text('{"question": "what?", "answer": "x"}\n')
    asked = place / name if content.startswith('{"question"') else place / "q.jsonl"
    words = [
        "evaluate",
        "--model",
        place / "model",
        "--memory",
        place / "memory",
        "--questions",
        asked,
        "--output",
        place,
    ]
    assert f"{name} is there, and is not ours to replace" in refused(capsys, words)
    assert (place / name).read_text() == content


def test_answers_may_be_given_again(place):
    (place / "questions.json").write_text(
        json.dumps({"accuracy": {}, "columns": {}, "questions": [], "tokens_read": 1})
    )
    (place / "questions.md").write_text("| question |")
    check_answers(place)
    check_answers(place / "new")


def evaluated(model, output=None):
    return evaluate(model, ByteTokenizer(), ["ppl"], [64], 2, 0, output, text="stdlib")


def test_a_folder_called_cells_makes_no_evaluation(place):
    model = load_model(place / "model")
    output = place / "out"
    (output / "cells").mkdir(parents=True)
    (output / "results.json").write_text("mine")
    with pytest.raises(EvaluationError, match=r"results\.json is there, and is not ours to replace"):
        evaluated(model, output)


def test_a_cell_is_what_a_cell_holds(place):
    model, output = load_model(place / "model"), place / "out"
    wanted = evaluated(model, output)["cells"]
    (file,) = (output / "cells").iterdir()
    kept = json.loads(file.read_text())
    first = kept["records"][0]
    without = {name: value for name, value in first.items() if name != "nats"}
    for records in (
        [first, without], [first, {**first, "index": 1, "nats": 3}], [first, {**first, "index": 1, "tokens": "many"}],
        [first, first], kept["records"] * 2, [{**first, "bytes_per_token": 0}],
    ):  # fmt: skip
        file.write_text(json.dumps({**kept, "records": records}))
        with pytest.raises(EvaluationError, match="is no cell of an evaluation"):
            evaluated(model, output)
    file.write_text(json.dumps({**kept, "records": [first]}))
    assert evaluated(model, output)["cells"][0]["score"] == pytest.approx(wanted[0]["score"])


def test_a_model_of_no_numbers_has_no_score(place):
    model = load_model(place / "model")
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(EvaluationError, match=r"model: norm\.weight has entries that are not finite"):
        evaluated(model)
    with pytest.raises(EvaluationError, match="model must be a model, got function"):
        evaluated(lambda ids: ids)


def test_a_trace_of_a_file_of_any_name(place):
    text = place / "a$b_$.txt"
    text.write_text("hello there")
    words = ["trace", "--model", place / "model", "--input", text, "--output", place / "t.html"]
    assert main([str(word) for word in words]) == 0 and (place / "t.png").is_file()
