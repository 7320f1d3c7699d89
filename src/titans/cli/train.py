"""``titans train``."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import BadInput, CommandFailed, checking_input


def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run, see configs/.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    output: Annotated[Path | None, typer.Option(help="Output folder, instead of training.output_dir.")] = None,
) -> int:
    """Train a model: progress bar, metrics.jsonl, pictures, checkpoints, and the final model in OUTPUT/model."""
    with checking_input():
        from titans.training.config import ConfigError, TrainConfig

        overrides = [*(set_ or []), *([f"training.output_dir={json.dumps(str(output))}"] if output else [])]
        settings = TrainConfig.load(config, overrides)

        from titans.training.finite import NonFiniteError
        from titans.training.run import train as run  # transformers takes seconds to import
    try:
        result = run(settings, resume=resume)
    except ConfigError as error:
        raise BadInput(str(error)) from error
    except NonFiniteError as error:
        raise CommandFailed(str(error)) from error
    if result.signal is not None:
        typer.echo(f"stopped at step {result.step}; a checkpoint is saved, go on with --resume", err=True)
        return 128 + result.signal
    line = f"step {result.step}: loss {result.loss:.4f}"
    if result.eval_loss is not None:
        line += f", validation {result.eval_loss:.4f} nats/token, {result.eval_bpb:.4f} bits per byte"
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        typer.echo(f"{line}; model in {result.model_dir}")
    return 0
