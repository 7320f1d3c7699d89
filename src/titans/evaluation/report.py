"""What an evaluation leaves behind: results.json, table.md and heatmap.png."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titans.evaluation.plots import plot_heat_maps
from titans.evaluation.task import shown_length
from titans.files import write_whole


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write all three; each appears whole."""
    text = json.dumps(results, indent=1) + "\n"
    write_whole(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_whole(folder / "table.md", lambda path: path.write_text(table(results), encoding="utf-8"))
    if any("score" in cell and cell["task"] != "ppl" for cell in results["cells"]):
        write_whole(folder / "heatmap.png", lambda path: plot_heat_maps(results, path))


def table(results: dict[str, Any]) -> str:
    """Markdown: accuracy, perplexity by position, state, what was skipped, and what the figures compare with."""
    cells = results["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    found = [cell for cell in cells if "skipped" not in cell]
    samples = results["settings"]["samples"]
    parts = []
    scored = [cell for cell in cells if cell["task"] != "ppl"]
    if scored:
        heading = [f"accuracy in %, ± standard error, {samples} samples each", *map(shown_length, lengths)]
        rows = [[task, *(_accuracy(scored, task, length) for length in lengths)] for task in _names(scored)]
        parts.append(markdown_table(heading, rows))
    for cell in (cell for cell in found if cell["task"] == "ppl"):
        parts.append(_perplexity(cell))
    states = [[task, *(_state(found, task, length) for length in lengths)] for task in _names(found)]
    parts.append(markdown_table(["bytes of state per stream", *map(shown_length, lengths)], states))
    notes = []
    for note in dict.fromkeys(results["notes"].values()):
        notes.append(f"- {', '.join(task for task, own in results['notes'].items() if own == note)}: {note}")
    notes += [f"- {c['task']} at {c['length']:,}: skipped, {c['skipped']}" for c in cells if "skipped" in c]
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    return "\n\n".join([*parts, "\n".join(notes), f"Settings: {settings}."]) + "\n"


def _names(cells: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["task"] for cell in cells))


def _at(cells: Iterable[dict[str, Any]], task: str, length: int) -> dict[str, Any]:
    return next((cell for cell in cells if (cell["task"], cell["length"]) == (task, length)), {})


def _accuracy(cells: Iterable[dict[str, Any]], task: str, length: int) -> str:
    cell = _at(cells, task, length)
    if "score" not in cell:
        return "–"
    error = f" ± {100 * cell['standard_error']:.1f}" if "standard_error" in cell else ""
    return f"{100 * cell['score']:.1f}{error}"


def _state(cells: Iterable[dict[str, Any]], task: str, length: int) -> str:
    cell = _at(cells, task, length)
    return f"{cell['state_bytes']:,.0f}" if cell else "–"


def _perplexity(cell: dict[str, Any]) -> str:
    modes = list(cell["memory"])
    heading = [f"ppl at {shown_length(cell['length'])}, {cell['samples']} windows, stride {cell['stride']:,}"]
    heading += [f"bits per byte, memory {mode}" for mode in modes] + [f"perplexity, memory {mode}" for mode in modes]
    rows = [(f"positions {span}", figures) for span, figures in cell["by_position"].items()] + [("all", cell["memory"])]
    return markdown_table(
        heading,
        [
            [
                name,
                *(f"{figures[mode]['bits_per_byte']:.3f}" for mode in modes),
                *(f"{figures[mode]['perplexity']:.2f}" for mode in modes),
            ]
            for name, figures in rows
        ],
    )


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heading, ["---", *("--:" for _ in heading[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
