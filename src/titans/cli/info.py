"""``titans info``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from titans.cli.errors import checking_input


def info(
    config: Annotated[Path, typer.Option(help="YAML or JSON file: a run's, or a model's alone; or a model's folder.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
) -> int:
    """Show what a model costs: parameters by part, FLOPs per token, bytes of state."""
    with checking_input(str(config)):
        from titans.models import load_model
        from titans.models.cost import measure_cost
        from titans.models.folder import CONFIG, foreign_reader
        from titans.training.config import load_model_config

        config = config / CONFIG if config.is_dir() else config
        if config.name == CONFIG and config.is_file() and foreign_reader(config.parent) is not None:
            return _grafted(load_model(config.parent))
        model = load_model_config(config, set_ or [])
    cost = measure_cost(model)
    rows = [("part", "parameters", "share", "FLOPs per token")]
    for part in cost.parts:
        share = f"{part.parameters / cost.parameters:.1%}"
        rows.append((part.name, f"{part.parameters:,}", share, f"{part.flops_per_token:,.0f}"))
    rows.append(("all", f"{cost.parameters:,}", "", f"{cost.flops_per_token:,.0f}"))
    typer.echo(f"{config.name}: {model.variant}, width {model.d_model}, {model.n_layers} layers")
    typer.echo()
    for line in _table(rows):  # whatever the width of the terminal: a number cut short would be another number
        typer.echo(line)
    typer.echo()
    typer.echo(f"FLOPs: one forward pass over {cost.tokens:,} tokens, matrix products only; backward twice that.")
    typer.echo(f"State of one stream after {cost.tokens:,} tokens: {cost.state_bytes:,} bytes.")
    return 0


def _grafted(model: Any) -> int:
    """The same of a decoder with memories (`titans.evaluation.grafted.GraftedModel`), as far as it is ours to know."""
    import torch

    from titans.models import count_parameters
    from titans.models.graft import grafts

    memories, tokens = grafts(model), model.config.chunk_size - 1 or 1
    with torch.no_grad():
        state = model(torch.zeros((1, tokens), dtype=torch.int64), logits_to_keep=1).state
    beside = count_parameters(memories)
    typer.echo(f"{type(model.model).__name__} with memories beside layers {', '.join(memories)}")
    typer.echo(f"parameters: {count_parameters(model) - beside:,} of the decoder, {beside:,} of the memories")
    typer.echo(
        f"State of one stream after {tokens:,} tokens: {state.nbytes:,} bytes; keys and values grow with the text."
    )
    return 0


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns, the first one to the left; a rule below the head and above the sum."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
