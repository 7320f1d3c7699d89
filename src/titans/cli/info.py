"""``titans info``."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from titans.cli.errors import BadInput, checking_input


def info(
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file: a run's, or a model's alone; or a model's folder.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field.")] = None,
    memory: Annotated[Path | None, typer.Option(help="Memory file, instead of a configuration.")] = None,
) -> int:
    """Show what a model costs (parameters by part, FLOPs per token, bytes of state), or what a memory file holds."""
    if (config is None) == (memory is None):
        raise BadInput(f"give --config or --memory, got {'neither' if config is None else 'both'}")
    if memory is not None and set_:
        raise BadInput(f"--set: changes a configuration, not what --memory holds, got {set_[0]}")
    if memory is not None:
        lines = _memory(memory)
    else:
        assert config is not None
        lines = _cost(config, set_ or [])
    for line in lines:  # whatever the width of the terminal: a number cut short would be another number
        typer.echo("".join(c if c.isprintable() else "?" for c in line))  # names from a file: nothing moves the cursor
    return 0


def _cost(config: Path, overrides: list[str]) -> list[str]:
    with checking_input(str(config)):
        from titans.models import load_model
        from titans.models.cost import measure_cost
        from titans.models.folder import CONFIG, foreign_reader
        from titans.training.config import load_model_config

        config = config / CONFIG if config.is_dir() else config
        if config.name == CONFIG and config.exists() and not config.is_file():  # a pipe's other end may never come
            raise BadInput(f"{config}: is not a file")
        if config.name == CONFIG and config.is_file() and foreign_reader(config.parent) is not None:
            if overrides:
                raise BadInput(f"--set: changes a configuration of ours, not a grafted decoder, got {overrides[0]}")
            return _grafted(load_model(config.parent))
        model = load_model_config(config, overrides)
    cost = measure_cost(model)
    rows = [("part", "parameters", "share", "FLOPs per token")]
    for part in cost.parts:
        share = f"{part.parameters / cost.parameters:.1%}"
        rows.append((part.name, f"{part.parameters:,}", share, f"{part.flops_per_token:,.0f}"))
    total = ("all", f"{cost.parameters:,}", "", f"{cost.flops_per_token:,.0f}")
    table = _table([*rows, total], rule_above_last=True)
    return [
        f"{config.name}: {model.variant}, width {model.d_model}, {model.n_layers} layers",
        "",
        *table,
        "",
        f"FLOPs: one forward pass over {cost.tokens:,} tokens, matrix products only; backward twice that.",
        f"State of one stream after {cost.tokens:,} tokens: {cost.state_bytes:,} bytes.",
    ]


def _grafted(model: Any) -> list[str]:
    """The same of a decoder with memories (`titans.evaluation.grafted.GraftedModel`), as far as it is ours to know."""
    import torch

    from titans.models import count_parameters
    from titans.models.graft import grafts

    memories, tokens = grafts(model), model.config.chunk_size - 1 or 1
    with torch.no_grad():
        state = model(torch.zeros((1, tokens), dtype=torch.int64), logits_to_keep=1).state
    beside = count_parameters(memories)
    return [
        f"{type(model.model).__name__} with memories beside layers {', '.join(memories)}",
        f"parameters: {count_parameters(model) - beside:,} of the decoder, {beside:,} of the memories",
        f"State of one stream after {tokens:,} tokens: {state.nbytes:,} bytes; keys and values grow with the text.",
    ]


def _memory(path: Path) -> list[str]:
    with checking_input(f"--memory {path}"):
        from titans.models import MemoryFile

        file = MemoryFile.open(path)
    state = file.state
    half = "" if file.unfinished is None else ", half-read: titans memorize --resume goes on"
    streams = "" if state.rows == 1 else f", {state.rows} streams"
    stored = f"{path.stat().st_size:,} bytes as {file.stored or 'they were'}, {state.nbytes:,} in use"
    lines = [
        f"{path.name}: {file.tokens:,} tokens read{streams}{half}",
        f"stored: {stored}",
        f"made by: configuration {state.origin.fingerprint}, weights {state.origin.weights[:16]}",
    ]
    if file.inputs:
        rows = [(i.name, f"{i.bytes:,}", f"{i.tokens:,}", i.sha256[:16]) for i in file.inputs]
        lines += ["", *_table([("input", "bytes", "tokens", "sha256"), *rows])]
    if file.layers:
        rows = []
        for number, layer in enumerate(file.layers):
            half_life = "-" if layer.half_life is None else " ".join(map(_tokens, layer.half_life))
            rows.append((f"{number}", f"{layer.moved:.3f}", f"{layer.norm:.3f}", half_life))
        head = ("memory", "|A - A_0| / |A_0|", "|A| / |A_0|", "half-life in tokens, by head")
        lines += ["", *_table([head, *rows])]
    return lines


def _tokens(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:,.0f}" if count >= 10 else f"{count:.2g}"


def _table(rows: list[tuple[str, ...]], rule_above_last: bool = False) -> list[str]:
    """Aligned columns, the first one to the left; a rule below the head and, if asked for, above the sum."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:-1], *([rule] if rule_above_last else []), lines[-1]]
