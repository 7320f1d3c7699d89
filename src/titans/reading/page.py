"""A trace as one HTML page that needs nothing else, and as a picture."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from titans.data import ByteTokenizer, Tokenizer
from titans.data.text_stream import TextStream
from titans.files import write_whole
from titans.reading.trace import QUANTITIES, TextTrace

TEMPLATE = Path(__file__).with_name("page.html")
SIGN = b"<title>Memory trace</title>"  # near the beginning of every page
OPEN = 2**16 - 1  # the code of what has no value
NAMES = {
    "surprise": "surprise",
    "loss": "inner loss",
    "after": "inner loss after",
    "theta": "θ",
    "eta": "η",
    "alpha": "α",
    "nats": "model's loss",
}
MODEL_LOSS = "nats that the model itself had to pay for the token"


def check_page(path: Path, picture: Path) -> None:
    """Raise a ValueError where something that is no page or picture of an earlier trace stands in the way."""
    for place in (path, picture):
        if place.is_dir():
            raise ValueError(f"--output: {place} is a folder")
    if path.exists():
        with path.open("rb") as file:
            if SIGN not in file.read(1000):
                raise ValueError(f"--output: {path} is there and no page of titans trace; give another name")
    elif picture.exists():
        raise ValueError(f"--output: {picture} is there, and its page is not; give another name")


def write_page(trace: TextTrace, tokenizer: Tokenizer, path: str | Path, title: str, about: str = "") -> None:
    """Write the page: the text coloured by any quantity of any layer and head, numbers where one points.

    Args:
        trace: of `titans.reading.trace_text`.
        tokenizer: gives the tokens' text.
        path: HTML file, replaced when complete.
        title, about: the heading and what stands beside it.
    """
    told = json.dumps(page_data(trace, tokenizer, title, about), ensure_ascii=False, separators=(",", ":"))
    told = told.replace("<", "\\u003c")  # nothing in a text can end the script it stands in
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA</script>", told + "</script>", 1)
    write_whole(path, lambda aside: aside.write_text(page, encoding="utf-8", errors="replace"))


def page_data(trace: TextTrace, tokenizer: Tokenizer, title: str, about: str = "") -> dict[str, Any]:
    """What the page holds: every value in 16 bits between the least and the greatest of its layer and head."""
    quantities = [_quantity(name, trace.values[name], QUANTITIES[name]) for name in QUANTITIES if name in trace.values]
    quantities.append(_quantity("nats", trace.nats[None, None], MODEL_LOSS))
    return {
        "title": title,
        "about": about,
        "start": trace.start,
        "tokens": token_texts(trace.ids, tokenizer),
        "layers": [name.removeprefix("blocks.") for name in trace.layers],
        "heads": trace.values["surprise"].shape[1],
        "quantities": quantities,
    }


def token_texts(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each token; that of a character of several tokens stands at its last one."""
    stream = TextStream(tokenizer, isinstance(tokenizer, ByteTokenizer))
    texts = [stream.push(int(i)) for i in ids]
    texts[-1] += stream.finish()
    return texts


def _quantity(key: str, values: np.ndarray, meaning: str) -> dict[str, Any]:
    layers, heads, tokens = values.shape
    rows = values.reshape(layers * heads, tokens).astype(np.float64)
    known = ~np.isnan(rows)
    low = np.where(known, rows, np.inf).min(1, keepdims=True)
    high = np.where(known, rows, -np.inf).max(1, keepdims=True)
    low, high = (np.where(np.isfinite(x), x, 0) for x in (low, high))
    shares = (rows - low) / np.where(high > low, high - low, 1)
    codes = np.where(known, np.rint(np.nan_to_num(shares) * (OPEN - 1)), OPEN).astype("<u2")
    return {
        "key": key,
        "name": NAMES[key],
        "meaning": meaning,
        "layers": layers,
        "heads": heads,
        "ranges": np.concatenate((low, high), 1).tolist(),
        "codes": base64.b64encode(codes.tobytes()).decode(),
    }


def plot_trace(trace: TextTrace, path: str | Path, title: str, bins: int = 160) -> None:
    """A panel for every quantity: its mean over heads against the position, a line for every layer.

    Args:
        trace: of `titans.reading.trace_text`.
        path: PNG file, replaced when complete.
        title: above the picture.
        bins: most points of a line, each a mean of neighbours.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = {name: trace.values[name].mean(1) for name in QUANTITIES if name in trace.values}
    panels["nats"] = trace.nats[None]
    figure = Figure(figsize=(9, 1.55 * len(panels) + 0.8), layout="constrained")
    colors = colormaps["viridis"](np.linspace(0.1, 0.85, len(trace.layers)))
    rows = figure.subplots(len(panels), 1, sharex=True)
    edges = np.linspace(0, len(trace.ids), min(bins, len(trace.ids)) + 1).astype(int)
    places = trace.start + (edges[:-1] + edges[1:]) / 2
    for axes, (name, values) in zip(rows, panels.items(), strict=True):
        for layer, (line, color) in enumerate(zip(values, colors)):
            means = [_mean(line[begin:end]) for begin, end in pairwise(edges)]
            label = f"layer {trace.layers[layer].removeprefix('blocks.')}" if name == "surprise" else None
            axes.plot(places, means, color="0.35" if name == "nats" else color, linewidth=1.1, label=label)
        axes.set_ylabel(NAMES[name].replace(" after", "\nafter").replace("'s ", "'s\n"), size=9)
        axes.grid(alpha=0.25)
        axes.margins(x=0)
        axes.tick_params(labelsize=8)
    rows[0].set_title(title, size=11, parse_math=False)
    rows[-1].set_xlabel("tokens read", size=9)
    if len(trace.layers) > 1:
        figure.legend(loc="outside lower center", ncols=min(6, len(trace.layers)), fontsize=8, frameon=False)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
