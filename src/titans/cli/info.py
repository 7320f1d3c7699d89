"""``titans info``."""

from pathlib import Path
from typing import Annotated

import typer

from titans.cli.errors import checking_input


def info(
    config: Annotated[Path, typer.Option(help="YAML or JSON file: a run's, or a model's alone.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
) -> int:
    """Show what a model costs: parameters by part, FLOPs per token, bytes of state."""
    with checking_input(str(config)):
        from rich.console import Console
        from rich.table import Table

        from titans.models.cost import measure_cost
        from titans.training.config import load_model_config

        model = load_model_config(config, set_ or [])
    cost = measure_cost(model)
    table = Table(title=f"{config.name}: {model.variant}, width {model.d_model}, {model.n_layers} layers")
    for heading in ("part", "parameters", "share", "FLOPs per token"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in cost.parts:
        share = f"{part.parameters / cost.parameters:.1%}"
        table.add_row(part.name, f"{part.parameters:,}", share, f"{part.flops_per_token:,.0f}")
    table.add_section()
    table.add_row("all", f"{cost.parameters:,}", "", f"{cost.flops_per_token:,.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"FLOPs: one forward pass over {cost.tokens:,} tokens, matrix products only; backward is about twice that."
    )
    console.print(f"State of one stream after {cost.tokens:,} tokens: {cost.state_bytes:,} bytes.", highlight=False)
    return 0
