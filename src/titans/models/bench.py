"""How fast a configuration runs here: a step's tokens per second, and its share of what its matrix products allow."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans.models.build import build_model
from titans.models.config import TitansConfig
from titans.models.mixers.parts import make_memory
from titans.ops.memory import pick

What = Literal["memory", "model", "decode"]
Run = Callable[[], object]
Shapes = dict[tuple[int, int, int, int], int]
"""How often a product [b, m, k] x [b, k, n] occurs."""
DECODED = 16  # tokens of a round


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        tokens: of a round.
        seconds: of every round.
        limit: of every round, seconds of what cannot be left out: the matrix products of forward and backward pass
            alone, or in decoding one look at every weight and at the state.
        flops: of a round's matrix products.
        peak_bytes: most memory in use, of the device, or of this process on a CPU.
        by: what computes the memories, and why; in decoding also how a token is read. Empty without either.
    """

    tokens: int
    seconds: tuple[float, ...]
    limit: tuple[float, ...]
    flops: int
    peak_bytes: int
    by: str

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every round, in rising order."""
        return sorted(self.tokens / s for s in self.seconds)

    @property
    def gigaflops(self) -> float:
        """10⁹ operations of matrix products per second."""
        return self.flops / median(self.seconds) / 1e9

    @property
    def share(self) -> float:
        """Of the limit, round by round."""
        return median(limit / s for limit, s in zip(self.limit, self.seconds, strict=True))


@dataclass(frozen=True)
class _Work:
    """A round: its tokens, what it runs, what may not be left out of it, its FLOPs, and by what it is done."""

    tokens: int
    run: Run
    limit: Run
    flops: int
    by: str


def measure_speed(
    what: What, config: TitansConfig, device: torch.device, tokens: int = 1024, batch: int = 1, rounds: int = 5
) -> Speed:
    """Time random weights on random tokens, the step and its limit turn about.

    Args:
        what: "memory": forward and backward pass of one memory layer. "model": those of the model with its loss.
            "decode": one token after another, without gradients.
        config: of the model.
        device: where.
        tokens: per sample; "decode" reads so many before.
        batch: samples.
        rounds: how often.

    Raises:
        ValueError: the configuration has no memory to measure.
    """
    if what == "memory" and not config.has_memory:
        raise ValueError(f"variant {config.variant!r} has no memory to measure")
    torch.manual_seed(0)
    work = {"memory": _memory, "model": _model, "decode": _decode}[what](config, device, tokens, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _seconds(work.run, device)  # what is built, compiled or allocated once
    _seconds(work.run, device)
    peak = _peak(device)
    _seconds(work.limit, device)
    pairs = [(_seconds(work.run, device), _seconds(work.limit, device)) for _ in range(rounds)]
    seconds, limit = zip(*pairs, strict=True)
    return Speed(work.tokens, seconds, limit, work.flops, peak, work.by)


def _memory(config: TitansConfig, device: torch.device, tokens: int, batch: int) -> _Work:
    layer = make_memory(config).to(device)
    x = torch.randn(batch, tokens, config.d_model, device=device, requires_grad=True)
    layer.engine = "chunked"
    shapes = products_of(lambda: layer(x))
    layer.engine = "auto"
    engine, why = pick(layer.engine, layer.miras, device)

    def step() -> None:
        layer(x).square().mean().backward()
        layer.zero_grad()
        x.grad = None

    return _Work(batch * tokens, step, *_training(shapes, device), f"{engine} ({why})")


def _model(config: TitansConfig, device: torch.device, tokens: int, batch: int) -> _Work:
    model, ids = build_model(config).to(device), _ids(config, device, batch, tokens)
    shapes = _counted(model, lambda: model(ids))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad()

    return _Work(batch * tokens, step, *_training(shapes, device), _by(model))


def _decode(config: TitansConfig, device: torch.device, tokens: int, batch: int) -> _Work:
    model = build_model(config).to(device).eval()
    with torch.no_grad():
        out = model(_ids(config, device, batch, tokens), logits_to_keep=1)
    kept: dict[str, Any] = {"state": out.state, "token": out.logits[:, -1].argmax(-1, keepdim=True)}
    shapes = _counted(model, lambda: model(kept["token"], state=kept["state"]))

    @torch.no_grad()
    def steps() -> None:
        for _ in range(DECODED):
            out = model(kept["token"], state=kept["state"].given())
            kept.update(state=out.state, token=out.logits[:, -1].argmax(-1, keepdim=True))

    read: list[Tensor] = [x for x in (*model.parameters(), *tree_leaves(out.state.layers)) if isinstance(x, Tensor)]
    read = [x.detach() for x in read if x.is_floating_point()]

    def limit() -> None:
        for _ in range(DECODED):
            for x in read:
                x.sum()

    return _Work(
        batch * DECODED,
        steps,
        limit,
        DECODED * _flops(shapes),
        _by(model, "decoding: {} ({})".format(*model.decoding())),
    )


def _ids(config: TitansConfig, device: torch.device, batch: int, tokens: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, tokens), device=device)


def _by(model: Any, *told: str) -> str:
    return "; ".join(dict.fromkeys((*told, *(f"{name} ({why})" for name, why in model.engines().values()))))


def _counted(model: Any, run: Run) -> Shapes:
    """Products of one pass by the general engine, whose products a counter sees."""
    model.set_engine("chunked")
    found = products_of(run)
    model.set_engine("auto")
    return found


def products_of(run: Run) -> Shapes:
    """The matrix products of ``run``, without gradients."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Products() as counter:
        run()
    return dict(counter.shapes)


class _Products(TorchDispatchMode):
    """Counts matrix products by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}.get(func.overloadpacket)
        if first is not None:
            x, y = args[first : first + 2]
            self.shapes[(x.shape[0] if x.dim() == 3 else 1, *x.shape[-2:], y.shape[-1])] += 1
        return func(*args, **(kwargs or {}))


def _flops(shapes: Shapes) -> int:
    return sum(2 * b * m * k * n * count for (b, m, k, n), count in shapes.items())


def _training(shapes: Shapes, device: torch.device) -> tuple[Run, int]:
    """The products of a forward pass and the two that each has in the backward pass; and their FLOPs."""
    every: Counter[tuple[int, int, int, int]] = Counter()
    for (b, m, k, n), count in shapes.items():
        for shape in ((b, m, k, n), (b, m, n, k), (b, k, m, n)):
            every[shape] += count
    return _replayed(every, device), _flops(every)


def _replayed(shapes: Shapes, device: torch.device) -> Run:
    """The products alone, one after another; each finds its operands where the last of its shape left them."""
    made = [
        (
            torch.randn(b, m, k, device=device),
            torch.randn(b, k, n, device=device),
            torch.empty(b, m, n, device=device),
            count,
        )
        for (b, m, k, n), count in shapes.items()
    ]

    def run() -> None:
        for x, y, out, count in made:
            for _ in range(count):
                torch.bmm(x, y, out=out)

    return run


def _seconds(run: Run, device: torch.device) -> float:
    """Of the clock, until the device has done all of it."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
