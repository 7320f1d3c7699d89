"""``titans evaluate``."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from titans.cli.errors import BadInput, Terminated, checking_input, named_folder, say
from titans.cli.model import TEMPLATE_HELP, open_memory, open_model, question_template

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of a saved model, its tokenizer in it.")],
    output: Annotated[
        Path, typer.Option(parser=named_folder, metavar="PATH", help="Output folder; a second run goes on there.")
    ],
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
    memory: Annotated[Path | None, typer.Option(help="Memory file that every sample begins with.")] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help='Ask the memory instead: a .jsonl file of {"question": "…", "answer": "…"}.'),
    ] = None,
    template: Annotated[str | None, typer.Option(help=TEMPLATE_HELP)] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; default cuda if there is one.")] = None,
) -> int:
    """Measure a saved model on tasks of the field (results.json, table.md, heatmap.png), or on your own questions."""
    with checking_input():
        import torch

        from titans.evaluation import EvaluationError, FromMemory
        from titans.evaluation import evaluate as measure
        from titans.evaluation.report import table
    asked = question_template(model, template)
    language_model, tokenizer = open_model(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state = open_memory(memory, language_model)
    if questions is not None:
        return _questions(language_model, tokenizer, state, questions, asked, output)
    names = [name.strip() for name in tasks.split(",")]
    counts = [_tokens(length.strip()) for length in lengths.split(",")]
    measured = language_model if state is None else FromMemory(language_model, state)
    try:
        results = measure(measured, tokenizer, names, counts, samples, seed, output, text=text, say=say)
    except EvaluationError as error:
        raise BadInput(f"--{error}") from error
    except (KeyboardInterrupt, Terminated) as stop:
        say("stopped; what is finished is kept, the same command goes on from there")
        return 128 + getattr(stop, "number", 2)
    typer.echo(table(results))
    picture = " and heatmap.png" if (Path(output) / "heatmap.png").exists() else ""
    typer.echo(f"results.json, table.md{picture} in {output}")
    return 0


def _questions(model: Any, tokenizer: Any, memory: Any, file: Path, template: str, output: Path) -> int:
    """A user's own questions to a memory: questions.json and questions.md."""
    from titans.evaluation.from_memory import (
        ANSWERS,
        ANSWERS_TABLE,
        ask_questions,
        check_answers,
        questions_table,
        read_questions,
    )
    from titans.evaluation.task import EvaluationError
    from titans.files import write_whole

    if memory is None:
        raise BadInput("--questions: needs --memory, a file of titans memorize")
    try:
        check_answers(output)
    except EvaluationError as error:
        raise BadInput(f"--{error}") from error
    with checking_input(f"--questions {file}"):
        results = ask_questions(model, tokenizer, memory, read_questions(file), template)
    table, told = questions_table(results), json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    write_whole(output / ANSWERS, lambda path: path.write_text(told, encoding="utf-8"))
    write_whole(output / ANSWERS_TABLE, lambda path: path.write_text(table, encoding="utf-8"))
    typer.echo(table)
    typer.echo(f"questions.json and questions.md in {output}")
    return 0


def _tokens(length: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([km]?)", length.lower())
    if found is None:
        raise BadInput(f"--lengths: expected numbers such as 1k,4k,1m, got {length!r}")
    return int(found[1]) * UNITS[found[2]]
