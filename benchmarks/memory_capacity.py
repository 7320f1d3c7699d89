"""How many pairs does a memory rule hold? Random unit keys with random values, each written once, then all asked.

    python benchmarks/memory_capacity.py --pairs 512 1024 --widths 64 128 256

For every network and width its numbers and, at the best of several step sizes, without momentum and forgetting: the
share of the older and of the newer half of the pairs whose value is the nearest of all values, and the mean cosine of
value and read.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.miras import MLP, Matrix, MirasConfig
from titans.ops.memory import memory_scan

NETWORKS = {"mlp, hidden 1": MLP(expansion=1), "mlp, hidden 4": MLP(expansion=4), "matrix": Matrix()}
STEPS = tuple(2.0**-power for power in range(0, 14))
STREAMS, CHUNK = 2, 16


def recalled(rule: MirasConfig, width: int, pairs: int, step: float) -> tuple[float, float, float]:
    """Shares of the older and the newer half that are found, and the mean cosine."""
    generator = torch.Generator().manual_seed(1)
    keys = F.normalize(torch.randn(STREAMS, pairs, 1, width, generator=generator), dim=-1)
    values = torch.randn(STREAMS, pairs, 1, width, generator=generator)
    torch.manual_seed(0)
    weights = tuple(rule.retention.initial(w) for w in rule.architecture.initial(width, 1))
    settings = {"weights": weights, "miras": rule, "chunk_size": CHUNK}

    def gate(value: float) -> Tensor:
        return torch.full((STREAMS, pairs, 1), value)

    still = gate(0.0)
    _, state = memory_scan(keys, keys, values, gate(step), still, gate(1e-9), **settings)
    nothing = torch.zeros(STREAMS, pairs, dtype=torch.bool)
    read, _ = memory_scan(keys, keys, values, still, still, gate(1e-9), state=state, store_mask=nothing, **settings)
    near = F.normalize(read.squeeze(2), dim=-1) @ F.normalize(values.squeeze(2), dim=-1).mT
    found = (near.argmax(-1) == torch.arange(pairs)).float()
    older, newer = found.split(pairs // 2, 1)[:2]
    return older.mean().item(), newer.mean().item(), near.diagonal(dim1=1, dim2=2).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for pairs in options.pairs:
        for width in options.widths:
            for name, network in NETWORKS.items():
                rule = MirasConfig.steady(network)
                found = {step: recalled(rule, width, pairs, step) for step in STEPS}
                step = max(found, key=lambda step: found[step][0] + found[step][1])
                older, newer, cosine = (round(x, 3) for x in found[step])
                numbers = sum(w.numel() for w in network.initial(width, 1))
                row = {"pairs": pairs, "width": width, "network": name, "numbers": numbers, "step": step}
                print(json.dumps({**row, "older": older, "newer": newer, "cosine": cosine}), flush=True)


if __name__ == "__main__":
    main()
