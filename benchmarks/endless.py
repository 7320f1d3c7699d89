"""A million tokens through every variant and rule: is everything finite, bounded, and does memory use stay flat?

Small models of random weights read a stream of random ids whose make-up changes every 50,000 tokens. What they keep is
looked at as they go: the largest entry of the state, its bytes, the loss, and the memory of the process. A run that was
stopped goes on from its last state file. Full attention keeps every token by design and is left out.

    python benchmarks/endless.py --tokens 1000000 --output runs/endless
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from titans import MirasConfig, ModelState, TitansConfig, build_model
from titans.files import write_whole

VARIANTS = ("LMM", "MAC", "MAG", "MAL")
RULES = ("steady", "titans", "yaad", "moneta", "memora")
CASES = [(variant, rule) for variant in VARIANTS for rule in RULES] + [("swa", "steady")]
VOCABULARY, PIECE, LOOK = 64, 2_000, 50_000  # tokens of a call, and between two looks
FLAT = 0.02  # by how much the memory of the process may grow after the first fifth
BOUND = 1e6  # no entry of a state may be larger


def model_of(variant: str, rule: str):
    torch.manual_seed(0)
    config = TitansConfig(
        variant=variant, vocab_size=VOCABULARY, d_model=16, n_layers=2, n_heads=2, mem_heads=2, chunk_size=20,
        segment_len=40, window=40, n_persistent=4, miras=getattr(MirasConfig, rule)(),
    )  # fmt: skip
    return build_model(config).eval()


def piece(start: int) -> torch.Tensor:
    """The ids from ``start`` on: the same for every case, and for one that goes on."""
    draw = torch.Generator().manual_seed(start)
    span = 2 + (start // LOOK) * 7 % (VOCABULARY - 2)
    return torch.randint(span, (1, PIECE + 1), generator=draw)


def resident() -> int:
    """Bytes of this process that lie in memory now; the peak, which `resource` tells, never falls."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def largest(state: ModelState) -> float:
    sizes: list[float] = []
    state.map(lambda x: sizes.append(float(x.abs().max()) if x.numel() else 0.0) or x)
    return max(sizes, default=0.0)  # NaN where there is one: `max` of torch keeps it


@torch.no_grad()
def read(variant: str, rule: str, tokens: int, folder: Path) -> list[dict[str, Any]]:
    """The looks at one case, those of an earlier run included."""
    name = f"{variant}-{rule}"
    state_file, record = folder / f"{name}.safetensors", folder / f"{name}.json"
    looks: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    model = model_of(variant, rule)
    state = ModelState.load(state_file) if looks else None
    at, nats = (state.seen[0] if state else 0), 0.0
    looks = [look for look in looks if look["tokens"] <= at]
    while at < tokens:
        ids = piece(at)
        try:
            out = model(ids[:, :PIECE], labels=ids[:, :PIECE], state=state)
        except FloatingPointError as error:
            looks.append({"tokens": at + PIECE, "failure": str(error)})
            break
        state, at, nats = out.state, at + PIECE, nats + float(out.loss)
        if at % LOOK == 0 or at >= tokens:
            look = {
                "tokens": at,
                "largest": largest(state),
                "state_bytes": state.nbytes,
                "resident": resident(),
                "process": os.getpid(),
            }
            looks.append({**look, "nats": nats / max(1, min(LOOK, at) // PIECE)})
            nats = 0.0
            state.save(state_file)
            write_whole(record, lambda aside: aside.write_text(json.dumps(looks, indent=1)))
    write_whole(record, lambda aside: aside.write_text(json.dumps(looks, indent=1)))
    return looks


def complaints(looks: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a case, nothing where all is well."""
    if "failure" in looks[-1]:
        return [f"after {looks[-1]['tokens']:,} tokens: {looks[-1]['failure']}"]
    found = [
        f"largest entry {look['largest']:g} after {look['tokens']:,} tokens"
        for look in looks
        if not look["largest"] < BOUND or not look["nats"] < BOUND
    ]
    # A process that went on from a file begins with other memory than the one before it.
    last = [look for look in looks if look["process"] == looks[-1]["process"]]
    settled = last[len(last) // 5 :]
    if len({look["state_bytes"] for look in settled}) > 1:
        found.append("the state's bytes change")
    if settled[-1]["resident"] > (1 + FLAT) * settled[0]["resident"]:
        found.append(f"memory grows from {settled[0]['resident']:,} to {settled[-1]['resident']:,} bytes")
    return found[:3]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of every case")
    parser.add_argument("--output", type=Path, default=Path("runs/endless"), help="where looks and states are kept")
    parser.add_argument("--only", default="", help="cases whose name holds this, such as MAC or yaad")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bad = 0
    for variant, rule in CASES:
        if given.only not in f"{variant}-{rule}":
            continue
        looks = read(variant, rule, given.tokens, given.output)
        wrong, last = complaints(looks), looks[-1]
        bad += bool(wrong)
        told = (
            "; ".join(wrong) or f"largest {last['largest']:.3g}, {last['state_bytes']:,} bytes, {last['nats']:.3f} nats"
        )
        print(f"{variant}-{rule}: {last['tokens']:,} tokens: {'BAD: ' if wrong else ''}{told}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
