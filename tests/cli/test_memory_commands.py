"""memorize, ask, trace and what takes --memory: right answers from the right file, one line for what is wrong."""

import io
import json
import re
import sys

import pytest
import torch

from tiny import model_text_and_memory
from titans.cli import main
from titans.cli.ask import Session
from titans.cli.errors import write_text
from titans.data import ByteTokenizer
from titans.models import MemoryFile, load_memory, load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text and its memory."""
    return model_text_and_memory(tmp_path_factory.mktemp("memory"))


def run(*words, code=0):
    assert main([str(word) for word in words]) == code


def refused(capsys, *words):
    capsys.readouterr()
    run(*words, code=2)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("titans: ") and shown.err.count("\n") == 1
    return shown.err


def test_memorize_reads_several_inputs_appends_and_says_what_it_did(place, tmp_path, capsys):
    text = place / "text.txt"
    run("memorize", "--model", place / "model", "--input", text, text, "--output", tmp_path / "two", "--dtype", "int8")
    assert "794 tokens in " in capsys.readouterr().out
    appended = ["--input", text, "--append", place / "memory", "--output", tmp_path / "appended"]
    run("memorize", "--model", place / "model", *appended)
    one, two = (MemoryFile.open(tmp_path / name) for name in ("two", "appended"))
    assert one.inputs == two.inputs and (one.stored, two.stored) == ("int8", "float32") and one.layers == two.layers
    run("memorize", "--model", place / "model", *appended, "--resume")
    capsys.readouterr()
    assert "exists; go on with --resume" in refused(capsys, "memorize", "--model", place / "model", *appended)
    assert "--input" in refused(capsys, "memorize", "--model", place / "model", "--output", tmp_path / "x")
    missing = refused(
        capsys, "memorize", "--model", place / "model", "--input", "/none.txt", "--output", tmp_path / "x"
    )
    assert missing == "titans: /none.txt: No such file\n"


def test_memorize_reads_standard_input(place, tmp_path, monkeypatch):
    with (place / "text.txt").open() as text:
        monkeypatch.setattr(sys, "stdin", text)
        run("memorize", "--model", place / "model", "--input", "-", "--output", tmp_path / "piped")
    piped, known = MemoryFile.open(tmp_path / "piped"), MemoryFile.open(place / "memory")
    assert piped.inputs[0].name == "standard input"
    assert (piped.inputs[0].sha256, piped.layers) == (known.inputs[0].sha256, known.layers)


def test_an_interrupted_memorize_goes_on(place, tmp_path, capsys, monkeypatch):
    from titans.reading import memorize

    monkeypatch.setattr("titans.models.memorize.PIECE", 64)
    words = ["memorize", "--model", place / "model", "--input", place / "text.txt", "--output", tmp_path / "cut"]
    run(*words[:-1], tmp_path / "whole")
    read, calls = memorize.read_piece, []

    def read_piece(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(memorize, "read_piece", read_piece)
    run(*words, code=130)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    half = refused(capsys, "generate", "--model", place / "model", "--memory", tmp_path / "cut", "--prompt", "x")
    assert "is half-read, 128 tokens so far" in half
    run("info", "--memory", tmp_path / "cut")
    assert "128 tokens read, half-read" in capsys.readouterr().out
    run(*words, "--resume")
    whole, cut = (load_memory(tmp_path / name, load_model(place / "model")) for name in ("whole", "cut"))
    assert all(map(torch.equal, whole.layers[0].previous, cut.layers[0].previous))


def test_info_shows_a_memory(place, capsys):
    capsys.readouterr()
    run("info", "--memory", place / "memory")
    shown = capsys.readouterr().out
    assert "memory: 397 tokens read" in shown and "text.txt" in shown and "half-life" in shown and "float32" in shown
    assert str(place) not in shown
    assert "give --config or --memory, got neither" in refused(capsys, "info")
    assert "no titans state" in refused(capsys, "info", "--memory", place / "model" / "model.safetensors")


def ask(monkeypatch, capsys, text, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    run("ask", *words)
    return capsys.readouterr().out


def test_ask_answers_each_question_from_the_memory(place, monkeypatch, capsys):
    capsys.readouterr()
    words = ["--model", place / "model", "--memory", place / "memory", "--max-new-tokens", 12]
    one = ask(monkeypatch, capsys, "who?\n", *words)
    two = ask(monkeypatch, capsys, "what is it?\n", *words)
    assert ask(monkeypatch, capsys, "who?\n\nwhat is it?", *words) == one + "\n" + two  # a line each
    model = load_model(place / "model").eval()
    memory = load_memory(place / "memory", model)
    prompt = torch.tensor([list(b"\nwho?")])
    said = model.generate(prompt, 12, temperature=0, eos_token_id=0, state=memory)[0, 5:]
    assert one == bytes(i for i in said.tolist() if i).decode(errors="replace").lstrip(" ") + "\n"
    other = ask(monkeypatch, capsys, "who?\n", *words, "--template", "Q: {}\\nA:")
    prompt = torch.tensor([list(b"Q: who?\nA:")])
    said = model.generate(prompt, 12, temperature=0, eos_token_id=0, state=memory)[0, prompt.shape[1] :]
    assert other == bytes(i for i in said.tolist() if i).decode(errors="replace").lstrip(" ") + "\n"

    taught = place / "model" / "question.txt"
    taught.write_text("Q: {}\nA:")
    assert ask(monkeypatch, capsys, "who?\n", *words) == other
    assert ask(monkeypatch, capsys, "who?\n", *words, "--template", "\\n{}") == one
    taught.write_text("Q:")
    assert "question.txt: needs {} where the question goes" in refused(capsys, "ask", *words)
    taught.unlink()


def test_ask_keeps_what_it_is_told_to(place, monkeypatch, capsys):
    capsys.readouterr()
    words = ["--model", place / "model", "--memory", place / "memory", "--max-new-tokens", 12]
    before = (place / "memory").read_bytes()
    first, second = (
        ask(monkeypatch, capsys, "who?\n", *words),
        ask(monkeypatch, capsys, "who?\nwhat?\n", *words, "--keep"),
    )
    assert second.startswith(first)
    model = load_model(place / "model").eval()
    memory = load_memory(place / "memory", model)
    said = model.generate(torch.tensor([list(b"\nwho?")]), 12, 0, eos_token_id=0, state=memory)[0].tolist()
    kept = model.memorize(torch.tensor(said[: said.index(0)] if 0 in said else said), state=memory)
    told = model.generate(torch.tensor([list(b"\nwhat?")]), 12, temperature=0, eos_token_id=0, state=kept)[0, 6:]
    assert second[len(first) :] == bytes(i for i in told.tolist() if i).decode(errors="replace").lstrip(" ") + "\n"
    assert (place / "memory").read_bytes() == before


def test_an_interrupt_ends_an_answer_on_a_terminal_and_everything_in_a_pipe(place, capsys):
    model = load_model(place / "model")

    class Interrupted:
        def stream(self, *arguments, **named):
            yield torch.tensor([104])
            raise KeyboardInterrupt

        memorize = model.memorize

    capsys.readouterr()
    session = Session(Interrupted(), ByteTokenizer(), None, "{}", True, {})
    session.answer("hi", live=True)
    assert capsys.readouterr().out == "h …\n"
    assert session.memory.seen == (3,)  # "hi" and what was said
    with pytest.raises(KeyboardInterrupt):
        session.answer("hi", live=False)


def test_evaluate_asks_a_users_questions(place, tmp_path, capsys):
    capsys.readouterr()
    model = load_model(place / "model").eval()
    prompt = torch.tensor([list(b"\nwho?")])
    said = model.generate(prompt, 8, temperature=0, state=load_memory(place / "memory", model))[0, 5:].tolist()
    right = ByteTokenizer().decode(said[:3])
    rows = [{"question": "who?", "answer": right}, {"question": "what is it?", "answer": "no such thing"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", "--model", place / "model", "--memory", place / "memory", "--output", tmp_path / "out"]
    run(*words, "--questions", tmp_path / "q.jsonl")
    assert "| right, of 2 | | 50.0% |" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "questions.json").read_text())
    assert told["accuracy"]["on"] == 0.5 and set(told["accuracy"]) == {"on", "reset", "off"}
    assert told["questions"][0]["on"].startswith(right) and told["questions"][0]["on"] != told["questions"][0]["off"]
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}')
    assert "bad.jsonl, line 1 is not" in refused(capsys, *words, "--questions", tmp_path / "bad.jsonl")
    lines = ['{"question": "x\u2028", "answer": "y"}', '{"question": "x", "answer": "\\ud800"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert "bad.jsonl, line 2 is not" in refused(capsys, *words, "--questions", tmp_path / "bad.jsonl")
    unasked = [*words, "--questions", tmp_path / "q.jsonl", "--template", "Q: "]
    assert "template: needs {} where the question goes, got 'Q: '" in refused(capsys, *unasked)
    alone = ["evaluate", "--model", place / "model", "--output", tmp_path / "x", "--questions", tmp_path / "q.jsonl"]
    assert "--questions: needs --memory" in refused(capsys, *alone)


def test_evaluate_begins_every_sample_with_the_memory(place, tmp_path):
    words = ["evaluate", "--model", place / "model", "--tasks", "ppl", "--lengths", "64", "--samples", "2"]
    words += ["--text", place / "text.txt"]
    text = (place / "text.txt").read_text()
    (tmp_path / "long.txt").write_text(text * 20)
    words[-1] = tmp_path / "long.txt"
    run(*words, "--output", tmp_path / "fresh")
    run(*words, "--output", tmp_path / "read", "--memory", place / "memory")
    fresh, read = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("fresh", "read"))
    assert fresh["cells"][0]["score"] != read["cells"][0]["score"]
    assert "memory" in read["settings"] and "memory" not in fresh["settings"]


def test_trace_writes_a_page_and_a_picture(place, tmp_path, capsys):
    capsys.readouterr()
    words = ["trace", "--model", place / "model", "--input", place / "text.txt", "--output"]
    run(*words, tmp_path / "page.html", "--memory", place / "memory", "--max-tokens", 100)
    assert "100 tokens; page in" in capsys.readouterr().out
    told = re.findall(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"))
    data = json.loads(told[0])
    assert (data["title"], data["start"], len(data["tokens"])) == ("text.txt", 397, 100)
    assert data["about"] == "MAC, 1 layers · the first 100 tokens, after 397 of memory"
    assert (tmp_path / "page.png").exists()
    assert "--output: must end in .html" in refused(capsys, *words, tmp_path / "page.pdf")
    (tmp_path / "empty.txt").write_text("")
    words[4] = tmp_path / "empty.txt"
    assert "holds no text" in refused(capsys, *words, tmp_path / "p.html")


@pytest.mark.parametrize("kind", ["its own input", "a page of somebody", "a picture of somebody", "a folder"])
def test_trace_replaces_nothing_but_an_earlier_trace(place, tmp_path, capsys, kind):
    page, picture, text = tmp_path / "page.html", tmp_path / "page.png", place / "text.txt"
    if kind == "a folder":
        picture.mkdir()
    else:
        (picture if "picture" in kind else page).write_text("<p>a text of mine</p>")
    source = page if kind == "its own input" else text
    words = ["trace", "--model", place / "model", "--input", source, "--output", page]
    assert "--output: " in refused(capsys, *words)
    if kind == "a folder":
        return
    assert (picture if "picture" in kind else page).read_text() == "<p>a text of mine</p>"
    (picture if "picture" in kind else page).unlink()
    for _ in range(2):
        run("trace", "--model", place / "model", "--input", text, "--output", page)


def test_evaluate_replaces_nothing_but_an_earlier_evaluation(place, tmp_path, capsys):
    long = tmp_path / "long.txt"
    long.write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    words = ["evaluate", "--model", place / "model", "--tasks", "ppl", "--lengths", 32, "--text", long, "--output"]
    for name in ("results.json", "table.md", "heatmap.png"):
        (tmp_path / name).write_text("mine")
        assert f"{name} is there, and is not ours to replace" in refused(capsys, *words, tmp_path)
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "cells").exists()
        (tmp_path / name).unlink()
    assert "--output: is empty" in refused(capsys, *words, "")
    for _ in range(2):
        run(*words, tmp_path)


def test_other_encodings_are_named_not_read(place, tmp_path, capsys, monkeypatch):
    for suffix in ("txt", "md"):
        (tmp_path / f"wide.{suffix}").write_bytes("the quick brown fox".encode("utf-16"))
        words = ["memorize", "--model", place / "model", "--input", tmp_path / f"wide.{suffix}"]
        assert "is UTF-16, texts must be UTF-8" in refused(capsys, *words, "--output", tmp_path / "m")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n" + BROKEN), errors="surrogateescape"))
    run("ask", "--model", place / "model", code=2)
    shown = capsys.readouterr()
    assert shown.out == "\n\n" and shown.err.startswith("titans: standard input: not UTF-8 at byte 5;")


BROKEN = b"caf\xe9 au lait\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md", "a"])
def test_a_text_that_is_not_utf8_is_one_line_with_the_byte_in_every_command(place, tmp_path, capsys, name):
    good = b'{"text": "' if name == "a.jsonl" else "é".encode() * 40_000  # the fault lies in a later block
    (text := tmp_path / name).write_bytes(good + BROKEN)
    at = f"{name}: not UTF-8 at byte {len(good) + 3:,};"
    read = ["--model", place / "model", "--input", text, "--output"]
    assert at in refused(capsys, "memorize", *read, tmp_path / "m")
    assert at in refused(capsys, "trace", *read, tmp_path / "t.html", "--max-tokens", 100_000)
    ask_these = ["--memory", place / "memory", "--output", tmp_path / "out", "--questions", text]
    assert at in refused(capsys, "evaluate", "--model", place / "model", *ask_these)
    if name in ("a.txt", "a.jsonl"):
        words = ["--text", text, "--output", tmp_path / "out", "--tasks", "ppl", "--lengths", "64"]
        assert at in refused(capsys, "evaluate", "--model", place / "model", *words)
        (tmp_path / "run.yaml").write_text("model: {vocab_size: 256, d_model: 16, n_layers: 1, chunk_size: 8}\n")
        words = ["--config", tmp_path / "run.yaml", "--set", f"data.source={text}", "--output", tmp_path / "run"]
        assert at in refused(capsys, "train", *words)
    assert {path.name for path in tmp_path.iterdir()} <= {name, "run.yaml"}


def test_what_a_command_cannot_use_is_named(place, tmp_path, capsys):
    read = ["--model", place / "model", "--input", place / "text.txt"]
    assert "--device: meta holds no numbers" in refused(
        capsys, "memorize", *read, "--output", tmp_path / "m", "--device", "meta"
    )
    for device in ("cpu:7", "cpu:"):
        words = ["memorize", *read, "--output", tmp_path / "m", "--device", device]
        assert f"--device: {device} is not there" in refused(capsys, *words)
    asked = ["--model", place / "model", "--memory", place / "memory", "--temperature", "inf"]
    assert "--temperature: must be a finite number" in refused(capsys, "ask", *asked)
    assert "--set: changes a configuration" in refused(capsys, "info", "--memory", place / "memory", "--set", "a=1")
    tokens = ["--max-tokens", "9", "--max-tokens", "1"]
    assert "got 1 (see" in refused(capsys, "trace", *read, "--output", tmp_path / "t.html", *tokens)


def test_what_is_no_regular_file_is_said_to_be_none(place, tmp_path, capsys):
    model = ["--model", place / "model"]
    assert "'/dev/null' is not a regular file" in refused(capsys, "info", "--memory", "/dev/null")
    append = ["--input", place / "text.txt", "--output", tmp_path / "m", "--append", "/dev/null"]
    assert "'/dev/null' is not a regular file" in refused(capsys, "memorize", *model, *append)
    assert "model folder '/dev/null' is not a folder" in refused(capsys, "ask", "--model", "/dev/null")
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 256, d_model: 16, n_layers: 1, chunk_size: 8}\n")
    words = ["--config", tmp_path / "run.yaml", "--set", "data.source=/dev/null", "--output", tmp_path / "run"]
    assert "/dev/null is neither a regular file nor a folder" in refused(capsys, "train", *words)


@pytest.mark.parametrize("live", [True, False])
def test_what_a_model_says_moves_no_cursor_of_a_terminal(monkeypatch, live):
    """Elsewhere it is written as it is."""
    out, said = io.StringIO(), "a\x1b]0;owned\x07\x9b2J\r\n\té\u200d😀"
    monkeypatch.setattr(out, "isatty", lambda: live)
    monkeypatch.setattr(sys, "stdout", out)
    write_text(said)
    assert out.getvalue() == ("a\ufffd]0;owned\ufffd\ufffd2J\ufffd\n\té\u200d😀" if live else said)


def test_a_name_in_a_memory_file_moves_no_cursor(place, tmp_path, capsys):
    (name := tmp_path / "\x1b[2J.txt").write_text("text")
    run("memorize", "--model", place / "model", "--input", name, "--output", tmp_path / "m")
    capsys.readouterr()
    run("info", "--memory", tmp_path / "m")
    assert "?[2J.txt" in capsys.readouterr().out
