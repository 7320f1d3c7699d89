"""``titans ask``."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titans.cli.errors import BadInput, CommandFailed, checking_input, say, write_text
from titans.cli.model import TEMPLATE_HELP, open_memory, open_model, question_template

if TYPE_CHECKING:
    from titans.data import Tokenizer
    from titans.models import ModelState, TitansModel

PROMPT = "? "


def ask(
    model: Annotated[Path, typer.Option(help="Folder of a saved model, its tokenizer in it.")],
    memory: Annotated[Path | None, typer.Option(help="Memory file, see titans memorize.")] = None,
    keep: Annotated[bool, typer.Option(help="Read questions and answers into the memory; the file stays.")] = False,
    template: Annotated[str | None, typer.Option(help=TEMPLATE_HELP)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Longest answer in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
) -> int:
    """Answer questions, a line each, from a memory; every question finds it as the file has it.

    Ctrl-C ends an answer, Ctrl-D the session. In a pipe every line of standard input is a question; the answers go to
    standard output one after the other, each with a line break behind it, an empty line's being empty.
    """
    if not isfinite(temperature):
        raise BadInput(f"--temperature: must be a finite number of at least 0, got {temperature}")
    if sys.stdout is None or sys.stdout.closed or sys.stdin is None or sys.stdin.closed:
        raise CommandFailed("standard input or output is closed: there is nobody to answer")
    told = question_template(model, template)
    language_model, tokenizer = open_model(model)
    with checking_input():
        import torch

        generator = torch.Generator().manual_seed(seed)
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "generator": generator}
        session = Session(language_model, tokenizer, open_memory(memory, language_model), told, keep, sampling)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        _greet(session, memory)
    for question in _asked() if live else _lines():
        if question:
            session.answer(question, live)
        elif not live:
            write_text("\n")  # answers stay beside their questions
    return 0


@dataclass
class Session:
    """Questions to one memory.

    Args:
        model, tokenizer: whose memory it is.
        memory: what is remembered; None for nothing.
        template: what is read for a question.
        keep: read questions and answers into the memory.
        sampling: how `TitansModel.stream` draws tokens.
    """

    model: TitansModel
    tokenizer: Tokenizer
    memory: ModelState | None
    template: str
    keep: bool
    sampling: dict[str, Any]

    def answer(self, question: str, live: bool) -> None:
        """Write the answer to standard output as it comes; Ctrl-C on a terminal ends it, elsewhere everything."""
        ids = self.tokenizer.encode(self.template.replace("{}", question)) or [self.tokenizer.separator_id]
        said: list[int] = []
        try:
            for piece in self._pieces(ids, said):
                write_text(piece)
        except KeyboardInterrupt:
            if not live:
                raise
            write_text(" …")
        write_text("\n")
        if self.keep:
            import numpy as np

            self.memory = self.model.memorize([np.array([*ids, *said])], state=self.memory)

    def _pieces(self, ids: list[int], said: list[int]) -> Iterator[str]:
        """The answer's text, never half a character; its tokens go to ``said``."""
        import torch

        from titans.data import ByteTokenizer
        from titans.data.text_stream import TextStream

        end = self.tokenizer.separator_id
        text = TextStream(self.tokenizer, isinstance(self.tokenizer, ByteTokenizer))
        prompt = torch.tensor([ids])
        begun = False
        for token in self.model.stream(prompt, eos_token_id=end, state=self.memory, **self.sampling):
            if int(token) == end:
                break
            said.append(int(token))
            piece = text.push(int(token))
            piece = piece if begun else piece.lstrip(" ")  # what stands between a question and its answer
            begun = begun or bool(piece)
            yield piece
        yield text.finish()


def _lines() -> Iterator[str]:
    """Lines of a pipe, without their ends."""
    raw, begin = getattr(sys.stdin, "buffer", None), 0
    if raw is None:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    for line in raw:
        try:
            yield line.removeprefix(codecs.BOM_UTF8 if not begin else b"").decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            from titans.data.corpora import not_utf8

            at = begin + len(line) - len(error.object) + error.start
            raise BadInput(f"standard input: {not_utf8(at)}") from error
        begin += len(line)


def _asked() -> Iterator[str]:
    """Lines typed at a terminal, some of them empty."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a history and can be edited
    while True:
        try:
            question = input(PROMPT)
        except EOFError:
            write_text("\n")
            return
        except KeyboardInterrupt:
            write_text("\n(Ctrl-D ends)\n")
            continue
        yield question


def _greet(session: Session, memory: Path | None) -> None:
    read = 0 if session.memory is None else session.memory.seen[0]
    name = "nothing read" if memory is None else f"{memory.name}: {read:,} tokens read"
    kept = "questions are read into it" if session.keep else "every question finds it as it is"
    say(f"{name}; {kept}. Ctrl-C ends an answer, Ctrl-D the session.")
