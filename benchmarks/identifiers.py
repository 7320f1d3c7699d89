"""Does a text model complete a name that stood only far back in the file? With the memory, without it, and with nothing
read.

Held-out source files of the standard library are read up to the line in question, then the line up to a name's fourth
letter is the prompt, and the likeliest bytes must be the rest of the name and nothing more. A name has at least eight
letters, stood in the file before, and not in the last 200 bytes; it is new where it stands nowhere in the training
files. Beside the shares of right answers stand the bits that a byte of the missing letters costs. ``on``: the memory
of the text before the line; ``reset``: the same with the memory's weights back at their first values, while the
attention's window goes on; ``off``: the prompt alone.
``python benchmarks/identifiers.py --model models/reader``
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from titans.data import ByteTokenizer, load_documents
from titans.models import load_model
from titans.training.data import load_saved_tokenizer

NAME = re.compile(rb"(?<![A-Za-z0-9_])[A-Za-z_][A-Za-z0-9_]{7,}(?![A-Za-z0-9_])")
TYPED, FAR, LONGEST = 4, 200, 2**15  # bytes: of a name in the prompt, without the name, of a file that are read
COLUMNS = ("on", "reset", "off")


@dataclass(frozen=True)
class Question:
    """A name at ``place``, in a line that begins at ``line``; it last ended ``distance`` bytes before."""

    line: int
    place: int
    name: bytes
    distance: int


def questions(text: bytes) -> Iterator[Question]:
    """Every name that stood before, but not near."""
    ends: dict[bytes, int] = {}
    for found in NAME.finditer(text):
        name, place = found[0], found.start()
        if name in ends and name not in text[max(0, place - FAR) : place]:
            line = text.rfind(b"\n", 0, place) + 1
            if line:
                yield Question(line, place, name, place - ends[name])
        ends[name] = found.end()


@torch.no_grad()
def ask(model: Any, state: Any, text: bytes, question: Question) -> tuple[list[str], list[float]]:
    """What each column says, as many bytes as are missing and one more; and the bits of a missing byte."""
    prompt = torch.tensor([list(text[question.line : question.place + TYPED])])
    rows = state.fork(3).put([1], state.forget()).reset([2])
    rest = torch.tensor([list(question.name[TYPED:])])
    out = model.generate(prompt.expand(3, -1), state=rows, max_new_tokens=rest.shape[1] + 1, temperature=0)
    said = [ByteTokenizer().decode(row) for row in out[:, prompt.shape[1] :].tolist()]
    whole = torch.cat((prompt, rest), 1).expand(3, -1)
    logits = model(whole, state=rows, logits_to_keep=rest.shape[1] + 1).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rest.expand(3, -1), reduction="none").mean(1)
    return said, (nats / math.log(2)).tolist()


def right(said: str, question: Question) -> bool:
    """The rest of the name, and its end."""
    rest = question.name[TYPED:].decode()
    return said.startswith(rest) and not re.match(r"[A-Za-z0-9_]", said[len(rest) :])


def measure(model: Any, texts: list[bytes], known: set[bytes], most: int) -> list[dict[str, Any]]:
    """At most ``most`` questions of each file."""
    draw, found = Random(0), []
    for number, text in enumerate(texts):
        every = list(questions(text))
        chosen = sorted(draw.sample(every, min(most, len(every))), key=lambda q: q.line)
        state, read = None, 0
        for question in chosen:
            ids = np.frombuffer(text[read : question.line], dtype=np.uint8)
            ids = np.concatenate((np.zeros(int(not read), dtype=np.uint8), ids))  # the separator, as in training
            if len(ids):
                state = model.memorize(ids, state=state)
            read = question.line
            said, bits = ask(model, state, text, question)
            told = {"file": number, "place": question.place, "distance": question.distance}
            told |= {"name": question.name.decode(), "new": question.name not in known}
            told |= {c: [s, right(s, question), round(b, 3)] for c, s, b in zip(COLUMNS, said, bits, strict=True)}
            found.append(told)
    return found


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of right answers and bits of a byte, of new and of known names, by distance."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        far = next((f"to {end:,}" for end in (500, 1_000, 2_000, 8_000) if one["distance"] < end), "beyond")
        for distance in ("all", far):
            groups["new" if one["new"] else "known", distance].append(one)
    return [
        {"names": names, "distance": distance, "questions": len(group)}
        | {column: [sum(one[column][i] for one in group) / len(group) for i in (1, 2)] for column in COLUMNS}
        for (names, distance), group in sorted(groups.items(), reverse=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model that reads bytes")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--most", type=int, default=12, help="questions of a file")
    parser.add_argument("--output", help="also write every answer as JSON")
    given = parser.parse_args()
    if not isinstance(load_saved_tokenizer(given.model), ByteTokenizer):
        parser.error(f"--model: {given.model} does not read bytes")
    known = {name for text in load_documents("stdlib", "train") for name in NAME.findall(text.encode())}
    texts = [text.encode()[:LONGEST] for text in load_documents("stdlib", "validation")][: given.files]
    found = measure(load_model(given.model).eval(), texts, known, given.most)
    rows, files = table(found), len({one["file"] for one in found})
    print(f"{len(found)} questions in {files} files")
    for row in rows:
        shares = "  ".join("{} {:6.1%} {:.2f}".format(column, *row[column]) for column in COLUMNS)
        print(f"{row['names']:5}  {row['distance']:8}  {row['questions']:4} questions  {shares}")
    if given.output:
        Path(given.output).write_text(json.dumps({"files": files, "rows": rows, "answers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
