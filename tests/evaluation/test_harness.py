"""The whole evaluation: who finds everything, who finds nothing, and going on after a kill."""

import json
import math
import re

import pytest
import torch

from titans import TitansConfig, build_model
from titans.cli import main
from titans.data import ByteTokenizer
from titans.evaluation import TASKS, EvaluationError, evaluate
from titans.evaluation import harness as module
from titans.evaluation.plots import plot_accuracy_by_state
from titans.evaluation.report import table
from titans.evaluation.task import depth_of, mean_score

NIAH = ("niah", "niah_multikey")


def finds(prompt):
    """The value of the key that a prompt of niah asks for."""
    key = re.search(r"for (\S+) mentioned in the provided text is$", prompt)[1]
    value = re.search(rf"for {key} is: (\S+?)\.", prompt)[1]
    return f" It is {value.upper()}."


def misses(prompt):
    return " 1234"


def run(model, text, output=None, tasks=NIAH, lengths=(600, 1500), samples=4, seed=0):
    return evaluate(model, ByteTokenizer(), tasks, lengths, samples, seed, output, text=text)


@pytest.fixture
def few_rows(monkeypatch):
    """Two samples are read side by side, so that a cell has several groups."""
    monkeypatch.setattr(module, "rows_at_once", lambda length: 2)


@pytest.mark.parametrize(("find", "score"), [(finds, 1.0), (misses, 0.0)])
def test_who_finds_the_needle_gets_everything_and_who_does_not_nothing(find, score, reader, text, tokenizer):
    results = evaluate(reader(tokenizer, find), tokenizer, NIAH, [600, 1500], 12, text=text)
    assert len(results["cells"]) == 12
    for cell in results["cells"]:
        assert cell["score"] == score and cell["standard_error"] == 0
        assert len(cell["by_depth"]) == 11 and set(cell["by_depth"].values()) == {score}
        assert cell["length"] - 310 < cell["tokens"] <= cell["length"]


def test_a_killed_run_goes_on(reader, text, tmp_path, few_rows):
    whole = run(reader(ByteTokenizer(), finds), text)
    died = reader(ByteTokenizer(), finds, calls_before_death=7)
    with pytest.raises(KeyboardInterrupt):
        run(died, text, tmp_path)
    assert died.training and not (tmp_path / "results.json").exists()
    kept = {path: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    # Two calls a group: one cell is finished, the next has its first group.
    assert sorted(len(cell["records"]) for cell in kept.values()) == [2, 4]
    again = reader(ByteTokenizer(), finds)
    resumed = run(again, text, tmp_path)
    assert len(again.lengths) == 2 * 2 * 12 - 6
    for first, second in zip(whole["cells"], resumed["cells"], strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert json.loads((tmp_path / "results.json").read_text()) == resumed
    third = reader(ByteTokenizer(), finds)
    assert run(third, text, tmp_path)["cells"] == resumed["cells"] and third.lengths == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: now 1, but .*cells/niah_single_1-600.json was made with 0; choose another output"),
        ({"samples": 5}, "samples: now 5, but .* was made with 4"),
    ],
)
def test_a_changed_setting_is_refused_by_name(change, message, reader, text, tmp_path):
    run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_1"], [600])
    with pytest.raises(EvaluationError, match=message):
        run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_1"], [600], **change)


def test_other_weights_texts_and_tokenizers_are_refused(reader, text, tmp_path, merging):
    run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_2"], [600])
    other = reader(ByteTokenizer(), finds)
    torch.nn.init.ones_(other.weight)
    with pytest.raises(EvaluationError, match="weights: now"):
        run(other, text, tmp_path, ["niah_single_2"], [600])
    with pytest.raises(EvaluationError, match="text: now 'stdlib'"):
        run(reader(ByteTokenizer(), finds), "stdlib", tmp_path, ["niah_single_2"], [600])
    with pytest.raises(EvaluationError, match="tokenizer: now '401 ids|tokenizer: now '400 ids"):
        evaluate(reader(merging, finds), merging, ["niah_single_2"], [600], 4, output=tmp_path, text=text)
    more = run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_1", "niah_single_2"], [600, 700])
    assert len(more["cells"]) == 4, "more tasks and lengths are added to what is there"
    (tmp_path / "cells" / "niah_single_2-600.json").write_text("{")
    with pytest.raises(EvaluationError, match="is no cell of an evaluation"):
        run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_2"], [600])


@pytest.mark.parametrize(
    "content",
    ["", "[" * 99_999, "[]", "5", '{"settings": 5, "records": []}', '{"settings": {}, "records": 5}',
     '{"settings": {}, "records": [{}]}', '{"settings": {}, "records": [5]}', b"\xff"],
)  # fmt: skip
def test_a_file_that_is_no_cell_is_named(reader, text, tmp_path, content):
    file = tmp_path / "cells" / "niah_single_2-600.json"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=r"niah_single_2-600\.json is no cell of an evaluation"):
        run(reader(ByteTokenizer(), finds), text, tmp_path, ["niah_single_2"], [600])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["needle"]}, "tasks: 'needle' is none of niah, "),
        ({"tasks": []}, "tasks: none given"),
        ({"lengths": []}, "lengths: .* got none"),
        ({"lengths": [600, 1]}, "lengths: .* got 600, 1"),
        ({"samples": 0}, "samples: must be at least 1, got 0"),
        ({"lengths": [50]}, "no cell can be measured; niah_single_1 at 50 tokens: skipped, 50 tokens are too few"),
    ],
)
def test_what_cannot_be_done_is_named(change, message, reader, text):
    with pytest.raises(EvaluationError, match=message):
        run(reader(ByteTokenizer(), finds), text, **change)


def test_depths_are_even_and_scores_are_means():
    assert [depth_of(i, 25) for i in (0, 5, 10, 11)] == [0.0, 0.5, 1.0, 0.0]
    assert [depth_of(i, 3) for i in range(3)] == [0.0, 0.5, 1.0] and depth_of(0, 1) == 0.5
    figures = mean_score([{"score": s, "depth": d} for s, d in ((1, 0.0), (0, 0.0), (1, 1.0), (1, 1.0))])
    assert figures["score"] == 0.75 and figures["by_depth"] == {"0.000": 0.5, "1.000": 1.0}
    assert figures["standard_error"] == pytest.approx(0.25)


def test_the_table_says_what_is_missing(reader, text):
    results = run(reader(ByteTokenizer(), finds), text, tasks=["niah_single_1"], lengths=[50, 1024])
    shown = table(results)
    assert "| 50 | 1k |" in shown and "| niah_single_1 | – | 100.0 ± 0.0 |" in shown
    assert "- niah_single_1 at 50: skipped, 50 tokens are too few" in shown


def test_accuracy_against_state_is_drawn_for_what_was_measured(reader, text, tmp_path):
    run_of_one = run(reader(ByteTokenizer(), finds), text, tasks=["niah_single_1"], lengths=[50, 600])
    plot_accuracy_by_state({"finds": run_of_one}, "niah_single_1", tmp_path / "state.png")
    assert (tmp_path / "state.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="task: no run has measured 'mqar_zoology'"):
        plot_accuracy_by_state({"finds": run_of_one}, "mqar_zoology", tmp_path / "none.png")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=16, n_persistent=2)).save_pretrained(
        folder
    )
    return folder


def test_the_command(model_dir, text, tmp_path, capsys):
    words = ["evaluate", "--model", model_dir, "--tasks", "niah,babilong,mqar,ppl", "--lengths", "256,512"]
    words = [str(word) for word in [*words, "--samples", 3, "--output", tmp_path, "--text", text, "--device", "cpu"]]
    assert main(words) == 0
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text())
    assert printed.out.startswith((tmp_path / "table.md").read_text())
    assert len(printed.err.splitlines()) == len(results["cells"]) == 2 * 11
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    measured = {(cell["task"], cell["length"]): cell for cell in results["cells"] if "skipped" not in cell}
    assert {task for task, _ in measured} == {
        name for name in TASKS if not re.search("multikey|published|zoology", name)
    }
    ppl = measured["ppl", 512]
    assert 6 < ppl["score"] < 12 and ppl["memory"]["on"]["perplexity"] == pytest.approx(2 ** ppl["score"])
    assert all(cell["state_bytes"] > 0 and math.isfinite(cell["score"]) for cell in measured.values())
    assert main(words) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "niahh"], "--tasks: 'niahh' is none of niah"),
        (["--lengths", "1k,4q"], "--lengths: expected numbers such as 1k,4k,1m, got '4q'"),
        (["--text", "/nowhere"], "--text: "),
        (["--device", "abacus"], "--device: abacus"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--samples", "0"], "got 0"),
    ],
)
def test_the_command_names_what_is_wrong(words, message, model_dir, tmp_path, capsys):
    given = {"--model": str(model_dir), "--output": str(tmp_path / "out"), **dict([words])}
    assert main(["evaluate", *(word for pair in given.items() for word in pair)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err
    assert not (tmp_path / "out").exists()
