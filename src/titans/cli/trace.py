"""``titans trace``."""

from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import BadInput, checking_input
from titans.cli.model import open_memory, open_model


def trace(
    model: Annotated[Path, typer.Option(help="Folder of a saved model, its tokenizer in it.")],
    input_: Annotated[str, typer.Option("--input", metavar="FILE", help="Text, .jsonl, .parquet, or -.")],
    output: Annotated[Path, typer.Option(help="HTML page to write; a picture of the same name goes beside it.")],
    memory: Annotated[Path | None, typer.Option(help="Memory file to read on from.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, max=2**20, help="Read so many tokens at most.")] = 20_000,
    text_field: Annotated[str, typer.Option(help="Key or column of .jsonl and .parquet rows.")] = "text",
) -> int:
    """Show what every token of a text does to the memory: a page and a picture of surprise, inner loss and gates."""
    if output.suffix not in (".html", ".htm"):
        raise BadInput(f"--output: must end in .html, got {output}")
    picture = output.with_suffix(".png")
    with checking_input():
        from titans.reading.page import check_page

        check_page(output, picture)
    language_model, tokenizer = open_model(model)
    state = open_memory(memory, language_model)
    with checking_input(f"--input {input_}"):
        import matplotlib  # noqa: F401  to say now what is not installed
        import numpy as np

        from titans.data.streams import TextInput, token_blocks
        from titans.reading import plot_trace, trace_text, write_page

        source, held, count = TextInput(input_, text_field), [], 0
        for ids in token_blocks(source.documents(), tokenizer):
            held.append(ids)
            count += len(ids)
            if count > max_tokens:
                break
        if not count:
            raise ValueError("holds no text")
        ids = np.concatenate(held)[:max_tokens]
    with checking_input(f"--model {model}"):
        found = trace_text(language_model, ids, state)
    config = language_model.config
    first = "" if count <= max_tokens else "the first "
    about = f"{config.variant}, {config.n_layers} layers · {first}{len(ids):,} tokens"
    about += f", after {found.start:,} of {memory.name}" if memory is not None else ""
    write_page(found, tokenizer, output, source.shown_name, about)
    plot_trace(found, picture, f"{source.shown_name} ({about})")
    typer.echo(f"{len(ids):,} tokens; page in {output}, picture in {picture}")
    return 0
