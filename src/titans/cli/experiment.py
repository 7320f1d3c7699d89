"""``titans experiment``: the door to the experiments, which the repository holds and the wheel does not."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from titans.cli.errors import BadInput, Terminated, checking_input, named_folder, say
from titans.names import suggestion

Scale = Literal["tiny", "small", "medium", "large"]


def experiment(
    name: Annotated[
        str | None,
        typer.Argument(help="Which one, or a Python file that defines an EXPERIMENT; without it they are listed."),
    ] = None,
    scale: Annotated[Scale, typer.Option(help="Size of models and training; see experiments/README.md.")] = "tiny",
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Seeds, with commas between.")] = "0",
    output: Annotated[
        Path | None,
        typer.Option(
            parser=named_folder,
            metavar="PATH",
            help="Output folder; default runs/experiments/NAME-SCALE. A second run goes on there.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(exists=True, help="Corpus: a local file or folder.")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, help="Folder of a saved model.")] = None,
    max_context: Annotated[int | None, typer.Option(min=2, help="Tokens of the longest text that is read.")] = None,
    row: Annotated[str | None, typer.Option(help="Run one row of this name, as --set says.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=512, help="CPU threads of torch.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments and what they ask.")] = False,
) -> int:
    """Run an experiment: results.json, table.md, figure.png, and a record of every finished unit."""
    _open_repository()
    with checking_input():
        import torch
        from rich.console import Console
        from rich.markdown import Markdown

        from experiments import EXPERIMENTS
        from experiments.framework import Stopped, load, markdown, plan, run
        from titans.training import ConfigError
    if list_ or name is None:
        width = max(map(len, EXPERIMENTS))
        for known in EXPERIMENTS.values():
            typer.echo(f"{known.name:{width}}  {known.purpose}")
        return 0
    if name not in EXPERIMENTS and not name.endswith(".py"):
        hint = suggestion(name, EXPERIMENTS)
        raise BadInput(f"NAME: {name!r} is none of {', '.join(EXPERIMENTS)}, and no .py file{hint}")
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds):
        raise BadInput(f"--seeds: expected numbers with commas between, such as 0,1,2, got {seeds}")
    if row is not None and not re.fullmatch(r"\w[\w.-]*", row):
        raise BadInput(f"--row: expected letters, digits, -, _ and ., got {row!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    options = {"data": data, "model": model, "max_context": max_context, "row": row, "set": tuple(set_ or ())}
    inputs = {option: value for option, value in options.items() if value}
    with checking_input():
        chosen = EXPERIMENTS[name] if name in EXPERIMENTS else load(Path(name))
        folder = output or Path("runs") / "experiments" / f"{chosen.name}-{scale}"
        work = plan(chosen, scale, [int(seed) for seed in seeds.split(",")], folder, inputs)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        report = run(work)
    except ConfigError as error:
        raise BadInput(str(error)) from error
    except (Stopped, KeyboardInterrupt, Terminated) as stop:
        say("stopped; what is finished is kept, the same command goes on from there")
        return 128 + (stop.signal if isinstance(stop, Stopped) else getattr(stop, "number", 2))
    Console().print(Markdown(markdown(report)))
    typer.echo(f"results.json, table.md and figure.png in {folder}")
    return 0


def _open_repository() -> None:
    """Let ``experiments`` be imported from where Python looks already, the working directory, or an editable install.

    Raises:
        BadInput: it is at none of these.
    """
    for root in (*sys.path, Path.cwd(), Path(__file__).parents[3]):
        if Path(root, "experiments", "framework", "__init__.py").is_file():
            sys.path.insert(0, str(root))
            return
    raise BadInput(
        "experiment: the experiments are in the repository, not in the installed package: "
        "run this in the folder of a checkout, or install the checkout with pip install -e '.[train]'"
    )
