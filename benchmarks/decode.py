"""Decoding: milliseconds per token of the four models, from short contexts to long ones.

A context is read by one forward pass that returns the state; then single tokens are fed with that state. All models
and contexts take turns in one process. The tokens of the turns together cover whole memory chunks, so that the steps in
which a chunk closes are in the figures: the median is the ordinary step, the mean includes the closings. Flatness is
the longest context's median over a shorter one's, turn by turn; contexts below the window still have a growing cache.
Run ``python benchmarks/decode.py --help``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from statistics import median

import harness
from harness import BenchmarkError, note, spread

TOLERANCE = 1e-3


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
            start = time.perf_counter()
            out = self.model(self.token, state=self.state)
            self.token, self.state = out.logits[:, -1].argmax(-1, keepdim=True), out.state
            self.seconds.append(time.perf_counter() - start)


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
    """Read a context in one forward pass."""
    import torch

    note(f"reading {context:,} tokens: {variant}")
    ids = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(2))
    out = model(ids, logits_to_keep=1)
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
        for turn in range(options.rounds):
            for stream in streams:
                stream.advance(options.tokens)
            note(f"round {turn + 1} of {options.rounds}")
    longest = {s.variant: s for s in streams if s.context == options.contexts[-1]}
    record = [
        {
            "variant": s.variant,
            "context": s.context,
            "milliseconds": milliseconds(s),
            "longest_context_over_this": flatness(longest[s.variant], s, options.tokens),
            "seconds": s.seconds,
        }
        for s in streams
    ]
    print(
        f"Decoding, ms per token (median; mean in brackets), width {options.width}, {options.layers} layers, batch 1\n"
    )
    print(decode_table(streams, options.contexts, options.tokens))
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    info = {"torch": torch.__version__, "error_against_forward": errors, "peak_rss_bytes": harness.peak_rss_bytes()}
    harness.save(options.output, {"settings": settings, "info": info, "streams": record})


def milliseconds(stream: Stream) -> dict:
    """Median, range and mean per token."""
    values = [1e3 * s for s in stream.seconds]
    return {**spread(values), "mean": sum(values) / len(values)}


def decode_table(streams: list[Stream], contexts: list[int], tokens: int) -> str:
    """Models down, contexts across, then how much slower the longest context is than each shorter one."""
    *shorter, longest = contexts
    head = ["context", *(f"{c:,}" for c in contexts), *(f"{longest:,} / {c:,}" for c in shorter)]
    rows = []
    for variant in dict.fromkeys(s.variant for s in streams):
        mine = {s.context: s for s in streams if s.variant == variant}
        figures = {c: milliseconds(mine[c]) for c in contexts}
        cells = [f"{figures[c]['median']:.2f} ({figures[c]['mean']:.2f})" for c in contexts]
        rows.append([variant, *cells, *(f"{flatness(mine[longest], mine[c], tokens)['median']:.2f}" for c in shorter)])
    return harness.table(head, rows)


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
    harness.add_common_options(result)
    return result


if __name__ == "__main__":
    harness.main(run, parser())
