"""Decoding: milliseconds per token of the four models, from short contexts to long ones.

A context is read by forward passes that hand the state on; then single tokens are fed with that state. All models
and contexts take turns in one process. The tokens of the turns together cover whole memory chunks, so that the steps in
which a chunk closes are in the figures: the median is the ordinary step, the mean includes the closings. Flatness is
the longest context's median over a shorter one's, turn by turn; contexts below the window still have a growing cache.
Run ``python benchmarks/decode.py --help``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import harness
from harness import BenchmarkError, note, spread

TOLERANCE = 1e-3
PIECE = 8192  # tokens of a context that one pass reads: its memory, not the result, depends on it


@dataclass
class Stream:
    """A model that stands at the end of its context."""

    variant: str
    context: int
    model: object
    token: object
    state: object
    seconds: list[float] = field(default_factory=list)

    def advance(self, steps: int) -> None:
        """Feed single tokens, each the likeliest after the one before."""
        for _ in range(steps):
            start = time.process_time()
            out = self.model(self.token, state=given(self.state))
            self.token, self.state = out.logits[:, -1].argmax(-1, keepdim=True), out.state
            self.seconds.append(time.process_time() - start)


def given(state):
    """The state as ``generate`` passes it on; an earlier checkout's knows no other way."""
    return state.given() if hasattr(state, "given") else state


class Rival:
    """The same stream in an earlier checkout, in a process of its own."""

    def __init__(self, variant: str, context: int, options: argparse.Namespace):
        settings = {k: v for k, v in vars(options).items() if k not in ("before", "output")}
        path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(options.before / "src")
        contestant = harness.Contestant(variant, f"{variant} of {options.before}", {})
        self.worker = harness.Worker(contestant, Path(__file__), options.threads)
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
        self.worker.ask("build", settings={**settings, "variant": variant, "context": context})
        self.seconds: list[float] = []

    def advance(self) -> None:
        """A turn; of its tokens the median is kept."""
        self.seconds.append(self.worker.ask("step")["seconds"])


def build(settings: dict) -> tuple[harness.Step, dict]:
    """A rival's side: one step is a turn, and tells the median of its tokens."""
    import torch

    options = argparse.Namespace(**settings)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    stream = open_stream(options.variant, make_model(options.variant, options), options.context)
    stream.advance(options.warmup)

    def step() -> float:
        stream.seconds.clear()
        stream.advance(options.tokens)
        return median(stream.seconds)

    return step, {}


def make_model(variant: str, options: argparse.Namespace):
    """A model with random weights; decoding costs the same as with trained ones."""
    import torch

    import titans

    torch.manual_seed(0)
    config = titans.TitansConfig(
        variant=variant, vocab_size=256, d_model=options.width, n_layers=options.layers, mem_layers=2,
        chunk_size=options.chunk, window=options.window,
    )  # fmt: skip
    return titans.build_model(config).eval()


def check_against_forward(model, options: argparse.Namespace) -> float:
    """Largest relative difference between the logits of token-by-token decoding and of one forward pass."""
    import torch
    from ours import relative_error

    ids = torch.randint(256, (1, 3 * options.chunk // 2), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    pieces, state = [], None
    for token in ids.unbind(1):
        out = model(token.unsqueeze(1), state=state)
        pieces.append(out.logits)
        state = out.state
    error = relative_error((torch.cat(pieces, 1),), (expected,))
    if not error <= TOLERANCE:
        raise BenchmarkError(
            f"token by token differs from one pass by {error:.1e} (allowed: {TOLERANCE:.0e}); no report"
        )
    return error


def open_stream(variant: str, model, context: int) -> Stream:
    """Read a context."""
    import torch

    note(f"reading {context:,} tokens: {variant}")
    ids = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(2))
    state = None
    for piece in ids.split(PIECE, 1):
        out = model(piece, state=state, logits_to_keep=1)
        state = out.state
    return Stream(variant, context, model, out.logits[:, -1].argmax(-1, keepdim=True), out.state)


def run(options: argparse.Namespace) -> None:
    """Check, read the contexts, take turns, report."""
    import torch

    torch.set_num_threads(options.threads)
    with torch.no_grad():
        options.contexts.sort()
        models = {variant: make_model(variant, options) for variant in options.models}
        errors = {variant: check_against_forward(model, options) for variant, model in models.items()}
        streams = [open_stream(v, m, context) for v, m in models.items() for context in options.contexts]
        for stream in streams:
            stream.advance(options.warmup)
            stream.seconds.clear()
        rivals = {}
        if options.before is not None:
            rivals = {
                s.variant: Rival(s.variant, s.context, options) for s in streams if s.context == options.contexts[-1]
            }
        for turn in range(options.rounds):
            for stream in streams:
                stream.advance(options.tokens)
            for rival in rivals.values():
                rival.advance()
            note(f"round {turn + 1} of {options.rounds}")
    longest = {s.variant: s for s in streams if s.context == options.contexts[-1]}
    record = [
        {
            "variant": s.variant,
            "context": s.context,
            "milliseconds": milliseconds(s),
            "longest_context_over_this": flatness(longest[s.variant], s, options.tokens),
            "earlier_over_this": gain(rivals, s, options.tokens),
            "seconds": s.seconds,
        }
        for s in streams
    ]
    print(
        f"Decoding, ms per token (median; mean in brackets), width {options.width}, {options.layers} layers, batch 1\n"
    )
    print(decode_table(streams, rivals, options))
    settings = {k: str(v) if k == "before" else v for k, v in vars(options).items() if k != "output"}
    info = {"torch": torch.__version__, "error_against_forward": errors, "peak_rss_bytes": harness.peak_rss_bytes()}
    harness.save(options.output, {"settings": settings, "info": info, "streams": record})


def milliseconds(stream: Stream) -> dict:
    """Median, range and mean per token."""
    values = [1e3 * s for s in stream.seconds]
    return {**spread(values), "mean": sum(values) / len(values)}


def decode_table(streams: list[Stream], rivals: dict[str, Rival], options: argparse.Namespace) -> str:
    """Models down, contexts across; how much slower the longest context is than each shorter one, and than before."""
    *shorter, longest = contexts = options.contexts
    head = ["context", *(f"{c:,}" for c in contexts), *(f"{longest:,} / {c:,}" for c in shorter)]
    head += ["earlier / now"] if rivals else []
    rows = []
    for variant in dict.fromkeys(s.variant for s in streams):
        mine = {s.context: s for s in streams if s.variant == variant}
        figures = {c: milliseconds(mine[c]) for c in contexts}
        cells = [f"{figures[c]['median']:.2f} ({figures[c]['mean']:.2f})" for c in contexts]
        flat = [flatness(mine[longest], mine[c], options.tokens)["median"] for c in shorter]
        gained = gain(rivals, mine[longest], options.tokens)
        rows.append([variant, *cells, *(f"{x:.2f}" for x in (*flat, *([gained["median"]] if gained else [])))])
    return harness.table(head, rows)


def gain(rivals: dict[str, Rival], stream: Stream, tokens: int) -> dict | None:
    """Of each turn the rival's median over the stream's; None where it has no rival."""
    rival = rivals.get(stream.variant)
    if rival is None or len(rival.seconds) * tokens != len(stream.seconds):
        return None
    turns = range(0, len(stream.seconds), tokens)
    mine = [median(stream.seconds[i : i + tokens]) for i in turns]
    return spread([theirs / ours for theirs, ours in zip(rival.seconds, mine, strict=True)])


def flatness(longest: Stream, shorter: Stream, tokens: int) -> dict:
    """Ratio of the medians of each turn."""
    turns = range(0, len(longest.seconds), tokens)
    return spread([median(longest.seconds[i : i + tokens]) / median(shorter.seconds[i : i + tokens]) for i in turns])


def parser() -> argparse.ArgumentParser:
    """Options."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--models", nargs="+", default=["LMM", "MAC", "MAG", "MAL"])
    result.add_argument("--contexts", nargs="+", type=int, default=[64, 1024, 4096, 16384])
    result.add_argument("--width", type=int, default=256)
    result.add_argument("--layers", type=int, default=4)
    result.add_argument("--chunk", type=int, default=64)
    result.add_argument("--window", type=int, default=512, help="of MAG and MAL (default: %(default)s)")
    result.add_argument("--tokens", type=int, default=16, help="tokens per turn (default: %(default)s)")
    result.add_argument("--rounds", type=int, default=8, help="turns of each (default: %(default)s)")
    result.add_argument("--warmup", type=int, default=4, help="untimed tokens of each (default: %(default)s)")
    result.add_argument("--before", type=Path, help="root of an earlier checkout to race against")
    harness.add_common_options(result)
    return result


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        harness.serve(build, lambda settings: {})
    else:
        harness.main(run, parser())
