"""Memory files: a state's file that also says what was read, and what that did to every layer's memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.layers.gates import MemoryGates
from titans.layers.neural_memory import NeuralMemory
from titans.models.language_model import TitansModel
from titans.models.state import ModelState
from titans.models.stored import Dtype
from titans.ops.memory.state import memories


@dataclass(frozen=True)
class Input:
    """What was read, without a word of it.

    Attributes:
        name: of the file, without its folder.
        bytes, sha256: of its content.
        tokens: read from it, separators included.
    """

    name: str
    bytes: int
    sha256: str
    tokens: int


@dataclass(frozen=True)
class LayerChange:
    """What reading did to one layer's memory.

    Attributes:
        moved: ‖A - A_0‖ over ‖A_0‖, Frobenius norms over all maps.
        norm: ‖A‖ over ‖A_0‖.
        half_life: of each head, the tokens after which forgetting alone halves a weight, ln 2 / mean(-ln(1 - α)) over
            what was read; None without α, inf where nothing is forgotten.
    """

    moved: float
    norm: float
    half_life: tuple[float, ...] | None


@dataclass(frozen=True)
class MemoryFile:
    """A memory file's content.

    Attributes:
        state: in the dtype it had, whatever it is stored as; its ``origin`` tells which model made it.
        inputs: what was read, in order; empty where the file does not say (`ModelState.save` alone).
        layers: one per layer with a memory; empty where the file does not say.
        forgotten: see `Forgetting`.
        unfinished: where a reading stands that has not come to its end; None for all others.
        stored: the dtype of the file's tensors; None and "float32" keep every bit.
    """

    state: ModelState
    inputs: tuple[Input, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    forgotten: tuple[tuple[float, ...], ...] = ()
    unfinished: dict[str, Any] | None = None
    stored: Dtype | None = None

    @property
    def tokens(self) -> int:
        """Tokens read, of the longest row."""
        return max(self.state.seen)

    def save(self, path: str | Path) -> None:
        """Write it, as `ModelState.save`."""
        about = {
            "inputs": [asdict(item) for item in self.inputs],
            "layers": [asdict(layer) for layer in self.layers],
            "forgotten": self.forgotten,
            "unfinished": self.unfinished,
            "stored": self.stored,
        }
        self.state.save(path, self.stored, about=about)

    @classmethod
    def open(cls, path: str | Path) -> MemoryFile:
        """Read a file of ``titans memorize`` or of `ModelState.save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of ours, is damaged, or is of another format version or semantics.
        """
        state, words = ModelState.load_with_words(path)
        try:
            told = json.loads(words.get("about", "{}"))
            return cls(
                state,
                tuple(Input(**item) for item in told.get("inputs", ())),
                tuple(LayerChange(**_tuples(layer)) for layer in told.get("layers", ())),
                tuple(map(tuple, told.get("forgotten", ()))),
                _checked(told.get("unfinished")),
                told.get("stored"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"memory file {str(path)!r} is damaged: {error}") from error


def _checked(unfinished: Any) -> dict[str, Any] | None:
    """Where a reading stands, as `titans.reading` writes it."""
    if unfinished is not None and not isinstance(unfinished, dict):
        raise ValueError(f"unfinished must be a mapping, got {unfinished!r}")
    return unfinished


def load_memory(path: str | Path, model: TitansModel) -> ModelState:
    """What a memory file remembers, checked to be of ``model`` and on its device: ``fork`` it, ask it, read on from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no memory file, is damaged, half-read, of other semantics, or of another model; named.
    """
    file = MemoryFile.open(path)
    if file.unfinished is not None:
        raise ValueError(
            f"memory file {str(path)!r} is half-read, {file.tokens:,} tokens so far: finish it with titans memorize "
            "--resume"
        )
    return claimed(file.state, model, path)


def claimed(state: ModelState, model: TitansModel, path: str | Path) -> ModelState:
    """A file's state as one that ``model`` made, on its device.

    Raises:
        ValueError: another model made it.
    """
    if not hasattr(model, "check_state"):
        raise ValueError(f"model must be a TitansModel, got {type(model).__name__}")
    device = model.embedding.weight.device
    try:
        model.check_state(state)
        state = replace(state.to(device), origin=model.origin)
        with torch.no_grad():
            like = model(torch.zeros((1, 1), dtype=torch.int64, device=device)).state
        like.put([0], state.select([0]))  # refuses what has other parts or shapes than the model's own
        state.map(_finite)
    except ValueError as error:
        raise ValueError(f"memory file {str(path)!r}: {error}") from error
    return state


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("its tensors are not finite")
    return x


class Forgetting:
    """Sums of -ln(1 - α) per layer and head over what is read while `watch` is open, and the tokens they are over.

    Args:
        before: rows as of :attr:`told`, to go on from.
    """

    def __init__(self, before: Sequence[Sequence[float]] = ()):
        self._sums: list[list[float]] = [list(row) for row in before]

    @property
    def told(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer the sums of its heads and, last, the tokens; empty without α."""
        return tuple(map(tuple, self._sums))

    @contextmanager
    def watch(self, model: TitansModel) -> Iterator[None]:
        """Look at every gate that is computed; code that is compiled as a whole would not tell."""
        found = [m for m in model.modules() if isinstance(m, NeuralMemory)]
        plain = [m.gates for m in found if m.use_decay and m.engine != "compiled"]
        if len(plain) < len(found) or not found:
            self._sums = []
            yield
            return
        if len(self._sums) != len(plain):
            self._sums = [[0.0] * (gates.heads + 1) for gates in plain]
        handles = [g.register_forward_hook(_adder(sums)) for g, sums in zip(plain, self._sums, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adder(sums: list[float]) -> Any:
    def add(gates: MemoryGates, args: Any, output: Any) -> None:
        alpha = output[0].alpha
        parts = alpha if isinstance(alpha, tuple) else (alpha,)
        rates = [-torch.log1p(-a.detach().double()) for a in parts]
        rates = [r.mean(-1) if r.dim() > 3 else r for r in rates]
        total = (sum(rates) / len(rates)).flatten(0, 1).sum(0).tolist()  # type: ignore[union-attr]
        for head, value in enumerate(total):
            sums[head] += value
        sums[-1] += rates[0].shape[0] * rates[0].shape[1]

    return add


def changes(model: TitansModel, state: ModelState, forgotten: Sequence[Sequence[float]] = ()) -> list[LayerChange]:
    """What became of every memory; ``forgotten`` as `Forgetting.told` has it."""
    layers = [m for m in model.modules() if isinstance(m, NeuralMemory)]
    states = [found for layer in state.layers for found in memories(layer)]
    half_lives = [_half_lives(sums) for sums in forgotten] or [None] * len(layers)
    found = []
    for layer, memory, half_life in zip(layers, states, half_lives, strict=True):
        initial = [w.detach().double().cpu() for w in layer.initial_weights]
        now = [w.double().cpu() for w in memory.weights]
        size = _norm(initial)
        rows = memory.weights[0].shape[0]
        moved = _norm([w - start for w, start in zip(now, initial, strict=True)]) / rows**0.5
        found.append(LayerChange(moved / size, _norm(now) / rows**0.5 / size, half_life))
    return found


def _half_lives(sums: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log(2) * sums[-1] / rate if rate else math.inf for rate in sums[:-1])


def _norm(weights: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(w.square().sum()) for w in weights))


def _tuples(layer: dict[str, Any]) -> dict[str, Any]:
    half_life = layer.get("half_life")
    return {**layer, "half_life": None if half_life is None else tuple(half_life)}
