"""What a model costs, measured on a forward pass of one of its blocks: parameters, FLOPs per token, bytes of state."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans.layers.attention import Attention
from titans.layers.feedforward import FeedForward
from titans.layers.neural_memory import NeuralMemory
from titans.layers.persistent_memory import PersistentMemory
from titans.models.build import build_model
from titans.models.config import TitansConfig
from titans.names import TooLong

# A parameter, and the products of a module's own forward, belong to the innermost of these types around it.
PARTS: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    Attention: "attention projections",
    NeuralMemory: "memory projections, initial weights",
    PersistentMemory: "persistent tokens",
    FeedForward: "feed-forward",
}
HEAD = "output projection"
MIXING = "memory and attention products"
OTHER = "norms and other maps"
LONGEST = 2**16  # tokens of a pass that takes no hours
TABLES = (PARTS[nn.Embedding], HEAD)  # one row per token id


@dataclass(frozen=True)
class Part:
    """One kind of layer over the whole model."""

    name: str
    parameters: int
    flops_per_token: float


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        parts: by kind of layer; their sums are the totals.
        state_bytes: of one stream's state after the pass, its open chunk and segment as full as they get.
        tokens: length of the pass.
    """

    parts: tuple[Part, ...]
    state_bytes: int
    tokens: int

    @property
    def parameters(self) -> int:
        """Learned numbers, shared ones once."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Of the matrix products of one forward pass, over its tokens."""
        return sum(part.flops_per_token for part in self.parts)


def measure_cost(config: TitansConfig, longest: int = 1024) -> Cost:
    """Run one sequence through a block of each kind with a vocabulary of one, count, and scale to the whole model.

    Blocks of a kind are alike, so this is exact, and the largest preset takes seconds.

    Args:
        config: the model, of any size.
        longest: bound on the tokens of the pass, which with the persistent tokens that the memory reads first are one
            less than a whole number of segments or chunks, as many as are within it and ``config.max_seq_len``.

    Raises:
        TooLong: with the persistent tokens, or one chunk or segment, they are more than `LONGEST`.
    """
    unit = config.segment if config.variant == "MAC" else config.chunk_size
    before = config.n_persistent % unit if config.has_memory and config.variant != "MAC" else 0
    tokens = max(unit, min(longest, config.max_seq_len) // unit * unit, 2) - 1 - before
    tokens += unit if tokens < 1 else 0
    if (whole := tokens + config.n_persistent) > LONGEST:
        raise TooLong(f"n_persistent, chunk_size, segment_len: a pass over {whole:,} tokens is too long to be measured")
    kinds = Counter(config.mixer(layer) for layer in range(config.n_layers))
    times = [kinds.pop(config.variant, 0), *kinds.values()]  # blocks like the model's i-th
    alike = {"n_layers": len(times), "vocab_size": 1, "memory_layers": (0,) if kinds else None}
    with torch.random.fork_rng(devices=[]):
        block = build_model(config.model_copy(update=alike))
    block.eval().requires_grad_(False).set_engine("chunked")  # the only one whose products the counter sees
    # Only the plain form of attention is made of products that the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = block(torch.zeros((1, tokens), dtype=torch.int64))
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = _parts(config, block, counts, times, tokens)
    state_bytes = sum(n * layer.nbytes for n, layer in zip(times, out.state.layers, strict=True))
    return Cost(parts, state_bytes=state_bytes, tokens=tokens)


def _parts(
    config: TitansConfig, block: nn.Module, counts: dict[str, int], blocks: list[int], tokens: int
) -> tuple[Part, ...]:
    """Parameters and FLOPs by part.

    ``counts`` has the FLOPs of each module that was called, with everything below it, by its path, and ``blocks`` how
    often each block counts; what is left of a block after linear maps and convolutions is the mixing itself.
    """
    parameters: Counter[str] = Counter()
    products: Counter[str] = Counter({MIXING: sum(n * counts.get(f"blocks.{i}", 0) for i, n in enumerate(blocks))})
    counted: set[nn.Parameter] = set()

    def visit(module: nn.Module, path: str, part: str) -> None:
        part = HEAD if path == "head" else PARTS.get(type(module), part)
        inside = path.startswith("blocks.")
        times = blocks[int(path.split(".")[1])] if inside else config.vocab_size if part in TABLES else 1
        own = set(module.parameters(recurse=False)) - counted
        counted.update(own)
        parameters[part] += times * sum(p.numel() for p in own)
        if not any(module.children()):
            products[part] += times * counts.get(path, 0)
            products[MIXING] -= times * counts.get(path, 0) if inside else 0
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, part)

    visit(block, "", OTHER)
    names = (*PARTS.values(), HEAD, MIXING, OTHER)
    parts = (Part(name, parameters[name], products[name] / tokens) for name in names)
    return tuple(part for part in parts if part.parameters or part.flops_per_token)
