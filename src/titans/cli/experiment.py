"""``titans experiment``."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from titans.cli.errors import BadInput, checking_input

Scale = Literal["tiny", "small", "medium", "large"]


def experiment(
    name: Annotated[str | None, typer.Argument(help="Which one; without it they are listed.")] = None,
    scale: Annotated[Scale, typer.Option(help="Size of models and training; see experiments/README.md.")] = "tiny",
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Seeds, with commas between.")] = "0",
    output: Annotated[
        Path | None,
        typer.Option(help="Output folder; default runs/experiments/NAME-SCALE. A second run goes on there."),
    ] = None,
    data: Annotated[Path | None, typer.Option(exists=True, help="Corpus: a local file or folder.")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, help="eval-perplexity: folder of a saved model.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments and what they ask.")] = False,
) -> int:
    """Run an experiment: results.json, table.md, figure.png, and a record of every finished unit."""
    with checking_input():
        import torch
        from rich.console import Console

        from titans.experiments import EXPERIMENTS, Stopped, plan, rich_table, run
        from titans.training import ConfigError
    if list_ or name is None:
        width = max(map(len, EXPERIMENTS))
        for known in EXPERIMENTS.values():
            typer.echo(f"{known.name:{width}}  {known.purpose}")
        return 0
    if name not in EXPERIMENTS:
        raise BadInput(f"NAME: {name!r} is none of {', '.join(EXPERIMENTS)}")
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds):
        raise BadInput(f"--seeds: expected numbers with commas between, such as 0,1,2, got {seeds}")
    if threads is not None:
        torch.set_num_threads(threads)
    inputs = {option: path for option, path in (("data", data), ("model", model)) if path is not None}
    folder = output or Path("runs") / "experiments" / f"{name}-{scale}"
    with checking_input():
        work = plan(EXPERIMENTS[name], scale, [int(seed) for seed in seeds.split(",")], folder, inputs)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        report = run(work)
    except ConfigError as error:
        raise BadInput(str(error)) from error
    except (Stopped, KeyboardInterrupt) as stop:
        typer.echo("stopped; what is finished is kept, the same command goes on from there", err=True)
        return 128 + (stop.signal if isinstance(stop, Stopped) else 2)
    Console().print(rich_table(report))
    for line in report.failures:
        typer.echo(f"failed: {line}")
    typer.echo(f"results.json, table.md and figure.png in {folder}")
    return 0
