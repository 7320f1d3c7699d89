"""The state of a whole model, and its file: what a model remembers of everything it has read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from titans.layers.attention import AttentionCache
from titans.memory import NeuralMemoryState
from titans.models.blocks import MAGState, MALState
from titans.models.computation import COMPUTATION, check_computation
from titans.models.mac import MACState
from titans.ops.memory.state import Gates, MemoryState, OpenChunk, State

FORMAT_VERSION = 1
KINDS = {
    kind.__name__: kind
    for kind in (AttentionCache, NeuralMemoryState, MACState, MAGState, MALState, Gates, MemoryState, OpenChunk)
}


class Origin:
    """Which model made a state: its configuration and a hash of its weights.

    The hash is taken only when a file is written or read; until then the model itself stands for it.
    """

    def __init__(self, fingerprint: str, model: nn.Module | None = None, weights: str | None = None):
        self.fingerprint = fingerprint
        self._model = None if model is None else weakref.ref(model)
        self._weights = weights

    @property
    def weights(self) -> str:
        model = None if self._model is None else self._model()
        if model is not None:
            return hash_weights(model)
        if self._weights is None:
            raise ValueError("the model that made this state is gone: save the state while the model exists")
        return self._weights

    def made_by(self, model: nn.Module) -> bool:
        """Whether ``model`` itself, in this process, made the state."""
        return self._model is not None and self._model() is model

    def __deepcopy__(self, memo: dict) -> Origin:
        return self

    def __reduce__(self) -> tuple:
        return Origin, (self.fingerprint, None, self.weights)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelState(State):
    """Immutable state of a model's streams; pass it back in to go on where a call stopped.

    Attributes:
        layers: one state per block.
        seen: tokens read, per row.
        origin: the model that made it.
    """

    layers: tuple[Any, ...]
    seen: tuple[int, ...]
    origin: Origin = field(compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        sizes: list[int] = []
        self.map(lambda x: sizes.append(x.numel() * x.element_size()) or x)
        return sum(sizes)

    def forget(self) -> ModelState:
        """Every memory back at its learned initial weights; positions, convolutions and attention caches go on.

        What a model scores with this between segments shows what it owes to its memory.

        Raises:
            ValueError: a MAC model's memory stands inside a chunk, so that its chunks would leave its segments.
        """
        for layer in self.layers:
            if isinstance(layer, MACState) and any(layer.memory.memory.phases):
                memory = layer.memory.memory
                raise ValueError(f"forget needs every row at the end of {memory.chunk_size} tokens, got {self.seen}")
        return _forget(self)

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file (written aside first, then moved into place)."""
        tensors: dict[str, Tensor] = {}
        tree = _encode(self.layers, "layers", tensors)
        metadata = {
            "format": "titans-state",
            "version": str(FORMAT_VERSION),
            "computation": COMPUTATION,
            "config": self.origin.fingerprint,
            "weights": self.origin.weights,
            "seen": json.dumps(self.seen),
            "layers": json.dumps(tree),
        }
        path = Path(path)
        aside = path.with_name(path.name + ".part")
        try:
            save_file(tensors, aside, metadata)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> ModelState:
        """Read a file written by :meth:`save`; the model checks at the first use that it is its own.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a state file, is damaged, or is of another format version or computation.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"state file {str(path)!r} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"state file {str(path)!r} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != "titans-state":
            raise ValueError(f"state file {str(path)!r} holds no titans state")
        if metadata["version"] != str(FORMAT_VERSION):
            raise ValueError(f"state file {str(path)!r} has format version {metadata['version']}, not {FORMAT_VERSION}")
        check_computation(metadata.get("computation"), f"state file {str(path)!r}")
        layers = _decode(json.loads(metadata["layers"]), tensors)
        origin = Origin(metadata["config"], weights=metadata["weights"])
        return cls(layers, tuple(json.loads(metadata["seen"])), origin)


def _forget(value: Any) -> Any:
    if isinstance(value, MemoryState):
        return value.reset(range(len(value.count)))
    if isinstance(value, tuple):
        return tuple(_forget(item) for item in value)
    if isinstance(value, State):
        return type(value)(**{f.name: _forget(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The state's tree as JSON, its tensors moved into ``tensors`` by path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple):
        return [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        found = {f.name: _encode(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields}
        return {"kind": type(value).__name__, "fields": found}
    return value


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return tuple(_decode(item, tensors) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    return KINDS[tree["kind"]](**{name: _decode(item, tensors) for name, item in tree["fields"].items()})
