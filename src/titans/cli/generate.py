"""``titans generate``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import CommandFailed, checking_input, write_text
from titans.cli.model import open_memory, open_model


def generate(
    model: Annotated[Path, typer.Option(help="Folder of a saved model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from; empty for the start of a document.")],
    memory: Annotated[Path | None, typer.Option(help="Memory file to start from, see titans memorize.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="Longest continuation in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among this share of mass, in (0, 1].")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = False,
) -> int:
    """Stream the continuation of a prompt to standard output; it ends at the end of a document."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if sys.stdout is None or sys.stdout.closed:
        raise CommandFailed("standard output is closed: there is nowhere to write to")
    with checking_input():
        pieces = _stream(model, prompt, memory, seed, sampling)
        first = next(pieces)  # reads the prompt, so whatever is wrong with the input shows before anything is printed
    write_text((prompt if echo else "") + first)
    for piece in pieces:
        write_text(piece)
    write_text("\n")
    return 0


def _stream(model: Path, prompt: str, memory: Path | None, seed: int, sampling: dict) -> Iterator[str]:
    """Pieces of text, the first one as soon as the prompt is read; never half a character."""
    import torch

    from titans.data import ByteTokenizer
    from titans.data.text_stream import TextStream

    language_model, tokenizer = open_model(model)
    end = tokenizer.separator_id
    ids = torch.tensor([tokenizer.encode(prompt) or [end]])
    state = open_memory(memory, language_model)
    generator = torch.Generator().manual_seed(seed)
    text = TextStream(tokenizer, isinstance(tokenizer, ByteTokenizer))
    tokens = language_model.stream(ids, eos_token_id=end, state=state, generator=generator, **sampling)
    for token in tokens:
        if int(token) != end:
            yield text.push(int(token))
    yield text.finish()
