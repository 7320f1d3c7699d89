"""``titans evaluate``."""

import re
from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import BadInput, checking_input

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of a saved model, its tokenizer in it.")],
    output: Annotated[Path, typer.Option(help="Output folder; a second run goes on there.")],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="niah, niah_multikey, babilong, babilong_published, mqar, ppl, or one of their tasks.",
        ),
    ] = "niah,babilong,ppl",
    lengths: Annotated[str, typer.Option(metavar="1k,4k", help="Tokens of a sample; k is 1,024, m 1,048,576.")] = (
        "1k,4k"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task at each length.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    text: Annotated[
        str, typer.Option(metavar="stdlib|essays|PATH", help="Running text of haystacks, background and perplexity.")
    ] = "stdlib",
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; default cuda if there is one.")] = None,
) -> int:
    """Measure a saved model on tasks of the field: results.json, table.md and heatmap.png."""
    with checking_input(f"--model {model}"):
        import torch

        from titans.evaluation import EvaluationError
        from titans.evaluation import evaluate as measure
        from titans.evaluation.report import table
        from titans.models import load_model
        from titans.training.data import load_saved_tokenizer

        tokenizer = load_saved_tokenizer(model)
        language_model = load_model(model)
        if tokenizer.vocab_size > language_model.config.vocab_size:
            raise ValueError(
                f"its tokenizer has {tokenizer.vocab_size} ids, the model knows {language_model.config.vocab_size}"
            )
    try:
        language_model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device: {device}: {error}") from error
    names = [name.strip() for name in tasks.split(",")]
    counts = [_tokens(length.strip()) for length in lengths.split(",")]
    try:
        results = measure(language_model, tokenizer, names, counts, samples, seed, output, text=text, say=_tell)
    except EvaluationError as error:
        raise BadInput(f"--{error}") from error
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, the same command goes on from there", err=True)
        return 130
    typer.echo(table(results))
    typer.echo(f"results.json, table.md and heatmap.png in {output}")
    return 0


def _tokens(length: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([km]?)", length.lower())
    if found is None:
        raise BadInput(f"--lengths: expected numbers such as 1k,4k,1m, got {length!r}")
    return int(found[1]) * UNITS[found[2]]


def _tell(line: str) -> None:
    typer.echo(line, err=True)
