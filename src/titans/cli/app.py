"""The list of commands. Their modules import what they need when they are called, so that ``--help`` is quick."""

import typer

from titans.cli.ask import ask
from titans.cli.bench import bench
from titans.cli.evaluate import evaluate
from titans.cli.experiment import experiment
from titans.cli.generate import generate
from titans.cli.info import info
from titans.cli.memorize import memorize
from titans.cli.trace import trace
from titans.cli.train import train

app = typer.Typer(
    name="titans",
    help="Sequence models that learn to memorize at test time.",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (train, memorize, ask, generate, evaluate, info, bench, trace, experiment):
    app.command()(command)
