"""``titans train``."""

import math
from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import BadInput, CommandFailed, checking_input, say


def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run, see configs/.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    output: Annotated[str | None, typer.Option(help="Output folder, instead of training.output_dir.")] = None,
) -> int:
    """Train a model: progress bar, metrics.jsonl, pictures, checkpoints, and the final model in OUTPUT/model."""
    with checking_input():
        from titans.training.config import ConfigError, TrainConfig

        settings = TrainConfig.load(config, set_ or [])
        if output is not None:
            with checking_input("--output"):
                settings.training.output_dir = output

        from titans.training.checkpoints import CheckpointError
        from titans.training.finite import NonFiniteError
        from titans.training.folder import is_main_process
        from titans.training.run import train as run  # transformers takes seconds to import
    try:
        result = run(settings, resume=resume)
    except ConfigError as error:
        raise BadInput(str(error)) from error
    except (NonFiniteError, CheckpointError) as error:
        raise CommandFailed(str(error)) from error
    except ImportError as error:  # accelerate, which transformers looks for late
        raise BadInput(str(error)) from error
    if result.signal is not None:
        say(f"stopped at step {result.step}; a checkpoint is saved, go on with --resume")
        return 128 + result.signal
    line = f"step {result.step}" + ("" if math.isnan(result.loss) else f": loss {result.loss:.4f}")
    if result.eval_loss is not None:
        line += f", validation {result.eval_loss:.4f} nats/token, {result.eval_bpb:.4f} bits per byte"
    if is_main_process():  # one of several processes speaks
        typer.echo(f"{line}; model in {result.model_dir}")
    return 0
