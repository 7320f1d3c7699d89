"""The state of a whole model, and its file: what a model remembers of everything it has read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as file_of
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from titans.files import bytes_of, hash_tensors, write_whole
from titans.models.decoding import Buffers, end_steps
from titans.models.semantics import SEMANTICS, check_semantics
from titans.models.stored import Dtype, pack, unpack
from titans.names import path_of
from titans.state import Leaf, State, check_rows, counts, decode, encode, numbers, walk

FORMAT_VERSION = 3
WORDS = {"format", "version", "semantics", "config", "weights", "seen", "layers"}
MORE_WORDS = {"stored", "about"}  # of memory files: how tensors are rounded, and what was read
MIXED = "weights that changed while it was made"


class Origin:
    """Which weights made a state.

    They are told by the model itself and the version of its parameters at that moment; a hash is taken only when a file
    is written or read. A state keeps its model alive, so that it can be saved after nothing else refers to it.

    Args:
        fingerprint: of the configuration.
        model: the model, where the state was made in this process.
        weights: their hash, where it came from a file.
    """

    def __init__(self, fingerprint: str, model: nn.Module | None = None, weights: str | None = None):
        self.fingerprint = fingerprint
        self.model = model
        self._weights = weights
        exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        # Walking through a model's modules takes longer than looking at what they hold: the places are kept.
        modules = [] if model is None else list(model.modules())
        self._places = [m._parameters for m in modules if m._parameters]
        self._inside = [m._modules for m in modules if m._modules]
        self._parts = self._look_inside()
        self._versions = None if model is None or exporting else self._look()  # fake tensors have no storage

    @property
    def weights(self) -> str:
        """The hash of the weights that made the state.

        Raises:
            ValueError: they have changed since and are not there any more.
        """
        if self._weights is None:
            assert self.model is not None
            if not self.unchanged:
                raise ValueError("the model's weights have changed since this state was made: save it before they do")
            self._weights = hash_weights(self.model)
        return self._weights

    @property
    def unchanged(self) -> bool:
        """Are the weights that made the state still those of the model?"""
        return self.model is not None and self._versions == self._look() and self._parts == self._look_inside()

    def _look_inside(self) -> list[nn.Module | None]:
        """The modules themselves: another one may have been put in the place of one."""
        return [module for place in self._inside for module in place.values()]

    def _look(self) -> list[tuple[int, int]]:
        """What changes whenever a parameter does: its storage, and how often it was written to."""
        return [(p.data_ptr(), p._version) for place in self._places for p in place.values() if p is not None]

    def then(self, model: nn.Module) -> Origin:
        """Of what ``model`` makes of the state: the same weights, or a mixture that no file can vouch for."""
        if self.model is model and self.unchanged and self._weights != MIXED:
            return self
        same = self._weights != MIXED and (self.model is not model or self.unchanged)
        return Origin(self.fingerprint, model, None if same else MIXED)

    def joined(self, other: Origin) -> Origin:
        """Of a state put together from two.

        Raises:
            ValueError: other weights made the other one, or weights that nobody can name any more.
        """
        if self.model is not None and self.model is other.model:
            same = self.unchanged and other.unchanged and MIXED not in (self._weights, other._weights)
            return self if same else Origin(self.fingerprint, self.model, MIXED)
        if self is not other and self.weights != other.weights:
            raise ValueError("put needs two states of one model, got one made by a model with other weights")
        return self

    def made_by(self, model: nn.Module) -> bool:
        """Whether ``model`` itself, in this process, made the state, with whatever weights it had."""
        return self.model is model

    def __deepcopy__(self, memo: dict) -> Origin:
        return self

    def __reduce__(self) -> tuple:
        return Origin, (self.fingerprint, None, self.weights)


def _note_fused(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused steps write without counting that as a write, as every other one does."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") and not torch.compiler.is_compiling() else ():
            torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_note_fused)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters, rounded to bfloat16: a copy of lower precision has the same."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(bytes_of(parameter.detach().to(torch.bfloat16)))
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelState(State):
    """Immutable state of a model's streams; pass it back in to go on where a call stopped.

    Attributes:
        layers: one state per block.
        read: tokens read, int64 [B]; ``seen`` has them as a tuple.
        origin: the weights that made it.
    """

    static: ClassVar[tuple[str, ...]] = ("origin",)

    layers: tuple[Any, ...]
    read: Tensor
    origin: Origin = field(compare=False)

    @classmethod
    def of_buffers(cls, buffers: Buffers, origin: Origin) -> ModelState:
        """The state that decoding buffers hold, of ``origin``'s model: ``layers`` are made when they are asked for."""
        state = object.__new__(cls)
        for name, value in (("read", buffers.steps.read), ("origin", origin), ("_buffers", buffers)):
            object.__setattr__(state, name, value)
        return state

    def buffers_of(self, model: nn.Module) -> Buffers | None:
        """The decoding buffers that hold this state too, while the weights that made them are still ``model``'s."""
        self._check_not_given()
        return self.__dict__.get("_buffers") if self.origin.made_by(model) and self.origin.unchanged else None

    def given(self) -> ModelState:
        """The same state for the next call to write into, where that is faster; this one must not be used any more."""
        self._check_not_given()
        buffers: Buffers | None = self.__dict__.get("_buffers")
        if buffers is None:
            return self
        object.__setattr__(self, "_buffers", None)
        self.__dict__.pop("layers", None)
        return self.of_buffers(buffers.given_away(), self.origin)

    def _check_not_given(self) -> None:
        if self.__dict__.get("_buffers", self) is None:
            raise ValueError("this state was given away to a call that went on from it: use the state that it returned")

    def __getattr__(self, name: str) -> Any:
        if name != "layers" or "_buffers" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._check_not_given()
        layers = end_steps(self.origin.model, self.__dict__["_buffers"].steps)  # type: ignore[arg-type]
        object.__setattr__(self, "layers", layers)
        return layers

    def __reduce__(self) -> tuple:
        return type(self), (self.layers, self.read, self.origin)

    def select(self, rows: Sequence[int] | Tensor) -> ModelState:
        """As `State.select`."""
        self._check_not_given()
        buffers: Buffers | None = self.__dict__.get("_buffers")
        if buffers is None:
            return super().select(rows)
        return self.of_buffers(Buffers(buffers.steps.select(rows)), self.origin)

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens read, per row."""
        return numbers(self.read)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.read)

    def forget(self) -> ModelState:
        """Every memory back at its learned initial weights; positions, convolutions and attention caches go on.

        What a model scores with this between segments shows what it owes to its memory.
        """
        return replace(self, layers=walk(lambda leaf, x: x if x.is_floating_point() else x * 0, self.layers))

    def put(self, rows: Sequence[int] | Tensor, new: State) -> ModelState:
        """As `State.put`.

        Raises:
            ValueError: also where ``new`` is of another model.
        """
        if not isinstance(new, ModelState):
            raise ValueError(f"put needs a ModelState, got {type(new).__name__}")
        if new.origin.fingerprint != self.origin.fingerprint:
            raise ValueError("put needs two states of one model, got one of another configuration")
        return replace(super().put(rows, new), origin=self.origin.joined(new.origin))

    def save(self, path: str | Path, dtype: Dtype | None = None, *, about: dict[str, Any] | None = None) -> None:
        """Write the state as one safetensors file, moved into place when complete.

        Args:
            dtype: round what is stored to "bfloat16" or "int8" (see `titans.models.stored`); None keeps every bit.
            about: plain values for JSON that go with the state, as `MemoryFile.about` has them.

        Raises:
            ValueError: the weights that made it have changed since, there is no such dtype, or what lies there is no
                state file.
        """
        _check_ours(path)
        tensors: dict[str, Tensor] = {}
        tree = encode(self.layers, tensors, "layers")
        metadata = {
            "format": "titans-state",
            "version": str(FORMAT_VERSION),
            "semantics": SEMANTICS,
            "config": self.origin.fingerprint,
            "weights": self.origin.weights,
            "seen": json.dumps(self.seen),
            "layers": json.dumps(tree),
        }
        tensors, stored = pack(tensors, dtype)
        if stored is not None:
            metadata["stored"] = json.dumps(stored)
        if about is not None:
            metadata["about"] = json.dumps(about)
        metadata["hash"] = hash_tensors(tensors, metadata)
        write_whole(path, lambda aside: aside.write_bytes(file_of(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> ModelState:
        """Read a file written by :meth:`save`; the model checks at the first use that it is its own.

        The file is read whole: whatever happens to it afterwards, the state stays as it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a state file, is damaged or edited, or is of another format version or semantics.
        """
        return cls.load_with_words(path)[0]

    @classmethod
    def load_with_words(cls, path: str | Path) -> tuple[ModelState, dict[str, str]]:
        """As :meth:`load`; also what the file says beside the state."""
        tensors, words = _checked(path)
        try:
            tensors = unpack(tensors, json.loads(words["stored"]) if "stored" in words else None)
            layers = decode(json.loads(words["layers"]), tensors, "layers")
            if not all(isinstance(layer, State) for layer in layers):
                raise ValueError("its layers are no states")
            seen = json.loads(words["seen"])
            if not all(type(n) is int for n in seen):
                raise ValueError(f"seen must be numbers of tokens, got {seen}")
            read = counts(seen)
            state = cls(layers, read, Origin(words["config"], weights=words["weights"]))
            check_rows(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
            raise ValueError(f"state file {str(path)!r} is damaged: {error}") from error
        return state, words


def shapes_of(layers: Sequence[Any]) -> tuple[Any, ...]:
    """A state's layers without their numbers."""
    return walk(lambda leaf, x: x.detach().to("meta"), tuple(layers), path="state.layers")


def check_shapes(layers: Sequence[Any], like: Sequence[Any], rows: int) -> None:
    """Raise a ValueError that names the first part of a state which has not the shape that its model gives it.

    Args:
        layers: of the state.
        like: of a state that the model made, as `shapes_of` has them.
        rows: that the state says it has.
    """

    def check(leaf: Leaf, x: Tensor, known: Tensor) -> Tensor:
        found, wanted = ([n for dim, n in enumerate(t.shape) if dim not in (0, leaf.columns)] for t in (x, known))
        if found != wanted or x.dim() != known.dim() or x.shape[0] != rows:
            shape = [rows, *("any" if dim == leaf.columns else n for dim, n in enumerate(known.shape) if dim)]
            raise ValueError(f"{leaf.path} must have shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
        return x

    walk(check, tuple(layers), tuple(like), path="state.layers")


def _check_ours(path: str | Path) -> None:
    """An older state is replaced, nobody's text or model is."""
    if not path_of("path", path).is_file() or not os.path.getsize(path):
        return
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), 2**24))
    try:
        ours = json.loads(header)["__metadata__"]["format"] == "titans-state"
    except (ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is there and no state file: not ours to replace; choose another name")


def _checked(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a state file, as they were saved or refused."""
    file = path_of("path", path)
    if not file.is_file():
        wrong = "is not a regular file" if os.path.lexists(file) else "does not exist"
        raise FileNotFoundError(f"state file {str(path)!r} {wrong}")
    content = file.read_bytes()
    try:
        tensors = tensors_of(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception as error:
        raise ValueError(f"state file {str(path)!r} is not a readable safetensors file: {error}") from error
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != "titans-state":
        raise ValueError(f"state file {str(path)!r} holds no titans state")
    if (version := metadata.get("version")) != str(FORMAT_VERSION):
        raise ValueError(f"state file {str(path)!r} has format version {version}, not {FORMAT_VERSION}")
    check_semantics(metadata.get("semantics"), f"state file {str(path)!r}")
    told = {name: value for name, value in metadata.items() if name != "hash"}
    if set(told) - MORE_WORDS != WORDS or metadata.get("hash") != hash_tensors(tensors, told):
        raise ValueError(f"state file {str(path)!r} is damaged: its content is not what was saved (hash)")
    return tensors, told
