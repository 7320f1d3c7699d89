"""``titans bench``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from titans.cli.errors import checking_input
from titans.cli.model import place_of

LIMITS = {
    "memory": "matrix products alone",
    "model": "matrix products alone",
    "decode": "one look at all weights and the state",
}


def bench(
    what: Annotated[
        Literal["memory", "model", "decode"],
        typer.Argument(help="A training step of one memory layer or of the model, or one token after another."),
    ],
    config: Annotated[Path, typer.Option(help="YAML or JSON file: a run's, or a model's alone; or a model's folder.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Per sample; decode: read before.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, max=2**20, help="Samples.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=2**20, help="Timed steps, of decode 16 tokens each.")] = 5,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> int:
    """Show how fast random weights run here: tokens/s, peak memory, GFLOP/s, share of the limit."""
    with checking_input(str(config)):
        import torch

        from titans.models.bench import measure_speed
        from titans.models.folder import CONFIG
        from titans.training.config import load_model_config

        model = load_model_config(config / CONFIG if config.is_dir() else config, set_ or [])
        if what == "memory" and not model.has_memory:
            raise ValueError(f"variant {model.variant!r} has no memory to measure")
    place = place_of(device)
    speed = measure_speed(what, model, place, tokens, batch, rounds)
    kind = f"after {tokens:,} tokens" if what == "decode" else f"forward and backward, {tokens:,} tokens"
    threads = f", threads: {torch.get_num_threads()}" if place.type == "cpu" else ""
    lines = [
        f"{what} of {config.name}: {model.variant}, width {model.d_model}, {model.n_layers} layers",
        f"{kind}, batch {batch}, float32, on {place}{threads}; median of {rounds}",
        f"tokens/s      {speed.rates[len(speed.rates) // 2]:,.0f} ({speed.rates[0]:,.0f} to {speed.rates[-1]:,.0f})",
        f"peak memory   {speed.peak_bytes / 1e9:.2f} GB",
        f"GFLOP/s       {speed.gigaflops:,.1f} of matrix products",
        f"of the limit  {speed.share:.2f} ({LIMITS[what]}, timed here)",
    ]
    lines += [f"by            {speed.by}"] if speed.by else []
    for line in lines:
        typer.echo(line)
    return 0
