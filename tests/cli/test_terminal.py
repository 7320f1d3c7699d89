"""At a terminal: questions that are typed, answers that Ctrl-C ends, one line of progress that changes."""

import io
import sys

import pytest

from tiny import model_text_and_memory
from titans.cli import main
from titans.cli.memorize import Meter
from titans.reading import Progress


class Terminal(io.StringIO):
    """What is typed, ^C being Ctrl-C, or what is shown."""

    def isatty(self):
        return True

    def readline(self, *limit):
        line = super().readline(*limit)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_text_and_memory(tmp_path_factory.mktemp("terminal"))


def ask(monkeypatch, place, typed, *words, kind=Terminal):
    """What is shown on standard output."""
    shown = kind()
    monkeypatch.setattr(sys, "stdin", kind(typed))
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["ask", "--model", str(place / "model"), "--max-new-tokens", "5", *words]) == 0
    return shown.getvalue()


def test_a_session_at_a_terminal(place, monkeypatch, capsys):
    """An empty line is no question, Ctrl-C no end; the answers are those that a pipe gets."""
    shown = ask(monkeypatch, place, "who?\n\n^C\nwhat?\n")
    told = "nothing read; every question finds it as it is. Ctrl-C ends an answer, Ctrl-D the session.\n"
    assert capsys.readouterr().err == told
    who, what = ask(monkeypatch, place, "who?\nwhat?\n", kind=io.StringIO).splitlines(keepends=True)
    assert shown == f"? {who}? ? \n(Ctrl-D ends)\n? {what}? \n"


def test_ctrl_c_ends_an_answer_and_not_the_session(place, monkeypatch, capsys):
    from titans.cli.ask import Session

    def pieces(self, ids, said):
        said.append(97)
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_pieces", pieces)
    shown = ask(monkeypatch, place, "who?\nwhat?\n", "--memory", str(place / "memory"), "--keep")
    assert shown == "? a …\n? a …\n? \n"
    assert capsys.readouterr().err.startswith("memory: 397 tokens read; questions are read into it. Ctrl-C")


def test_progress_is_one_line_that_changes_at_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    meter = Meter()
    for step, left in ((0.0, 73840), (0.1, 73000), (1.0, 610), (1.0, 54)):
        now[0] += step
        meter.tell(Progress(tokens=12344, seconds=10.0, bytes=100, left=left))
    meter.close()
    meter.close()
    start = "12,344 tokens, 1,234 tokens/s, "
    first, second = f"{start}0%, 2 h 3 min left", f"{start}14%, 1 min 1 s left"
    third = f"{start}65%, 5 s left".ljust(len(second))
    assert sys.stderr.getvalue() == f"\r{first}\r{second.ljust(len(first))}\r{third}\n"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    meter = Meter()
    for step in (9.0, 2.0, 2.0):
        now[0] += step
        meter.tell(Progress(tokens=12344, seconds=10.0, bytes=100, left=None))
    meter.close()
    assert sys.stderr.getvalue() == "12,344 tokens, 1,234 tokens/s\n"
