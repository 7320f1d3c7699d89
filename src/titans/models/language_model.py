"""The language model around the blocks: embedding, state, loss, files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans.memory import NeuralMemory
from titans.miras.choice import BY_NAME
from titans.models.blocks import Block, MALMixer
from titans.models.computation import COMPUTATION, check_computation
from titans.models.config import TitansConfig
from titans.models.generation import GenerationMixin
from titans.models.mac import MACMixer
from titans.models.state import ModelState, Origin, hash_weights
from titans.ops.memory import Engine, check_engine, check_finite
from titans.ops.place import Place
from titans.ops.ragged import compact, restore, take


@dataclass(frozen=True)
class ModelOutput(Mapping):
    """What a call returns, as attributes and as a mapping of what is there.

    Attributes:
        logits: [B, T, V], or the last ``logits_to_keep`` positions.
        state: pass it to the next call to go on.
        loss: mean negative log-likelihood in nats per target, only with labels.
    """

    logits: Tensor
    state: ModelState
    loss: Tensor | None = None

    def _present(self) -> dict[str, Any]:
        return {n: v for n in ("loss", "logits", "state") if (v := getattr(self, n)) is not None}

    def __getitem__(self, name: str) -> Any:
        return self._present()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


class TitansModel(GenerationMixin, nn.Module):
    """A language model of ``config.n_layers`` blocks of one variant.

    Calls keep nothing on the module: state goes in and comes out, and one call on T tokens equals the same tokens in
    any split.
    """

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Normal with variance 1 / fan-in: activations start at unit scale; less where blocks add to the stream.

        The embedding starts at the same scale as the tied output projection: logits of unit variance.
        """
        # What the other variants read from their memory is normalised before it reaches the stream.
        added = ("down.weight", "out.weight" if self.config.variant == "LMM" else "attention.out.weight")
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name.endswith(".weight") and "conv" not in name and "gates" not in name:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(added):
                    std /= (2 * self.config.n_layers) ** 0.5
                nn.init.normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                module.recall_what_followed()
            elif isinstance(module, MACMixer):
                module.attention.attend_to_itself(self.config.segment)
            elif isinstance(module, MALMixer):
                module.attention.attend_to_itself(self.config.window)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        store_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Read T tokens from ``state`` on.

        Args:
            input_ids: int64 [B, T], T ≥ 1, no upper limit.
            labels: int64 [B, T], the same ids; shifted inside, -100 is ignored. With T = 1 no target is left: loss 0.
            attention_mask: [B, T], 0 or False for padding (anywhere): such tokens do nothing, their logits are zero.
            state: what an earlier call returned; None starts new streams.
            store_mask: [B, T], 0 or False for tokens that the memory reads but does not write.
            logits_to_keep: compute logits of the last so many positions only; 0 for all.

        Raises:
            ValueError: an id outside the vocabulary, a wrong shape or dtype, a state of another model; named.
            FloatingPointError: reading without gradients, a memory diverged; names the layer.
        """
        self._check(input_ids, labels, state, logits_to_keep)
        mask = self._flags("attention_mask", attention_mask, input_ids)
        store = self._flags("store_mask", store_mask, input_ids)
        order = lengths = None
        ids = input_ids
        if mask is not None and not bool(mask.all()):
            order, lengths = compact(mask)
            ids = take(ids, order)
            store = None if store is None else take(store, order)
        if store is not None and bool(store.all()):
            store = None
        hidden, state = self._encode(ids, state, lengths, store)
        if order is not None and mask is not None:
            hidden = restore(hidden, order, mask)
        if labels is None:
            return ModelOutput(self.head(hidden[:, -logits_to_keep:]), state)
        logits = self.head(hidden)
        loss = _loss(logits, labels, mask)
        return ModelOutput(logits[:, -logits_to_keep:], state, loss)

    def _encode(
        self, ids: Tensor, state: ModelState | None, lengths: tuple[int, ...] | None, store: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Final hidden states [B, T, d_model] of a right-padded batch."""
        rows, tokens = ids.shape
        place = Place((0,) * rows if state is None else state.seen, tokens, lengths)
        x = self.embedding(ids)
        layers = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, place, store, use_reentrant=False)
            else:
                x, after = block(x, before, place, store)
            check_finite(after, f"blocks.{i}")
            layers.append(after)
        return self.norm(x), ModelState(tuple(layers), place.after, self.origin)

    def set_engine(self, engine: Engine) -> None:
        """How the memories compute: "chunked", the default; "compiled", faster after a minute of ``torch.compile`` per
        shape, and worth it for training; "reference", the plain token loop."""
        check_engine(engine)
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                module.engine = engine

    @property
    def origin(self) -> Origin:
        """What the states that this model makes carry along."""
        return Origin(self.fingerprint, self)

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the configuration that a state depends on."""
        unlike = {"max_seq_len", "lr", "gradient_checkpointing"}
        told = self.config.explicit().model_dump(mode="json", exclude=unlike, context=BY_NAME)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def _flags(self, name: str, flags: Tensor | None, like: Tensor) -> Tensor | None:
        if flags is None:
            return None
        if flags.shape != like.shape:
            raise ValueError(f"{name} must have input_ids' shape {list(like.shape)}, got {list(flags.shape)}")
        return flags.bool()

    def _check(self, ids: Tensor, labels: Tensor | None, state: ModelState | None, keep: int) -> None:
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"input_ids must be a non-empty [B, T], got {list(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be integers (int64), got {ids.dtype}")
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must lie in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high}"
                )
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(f"labels must have input_ids' shape {list(ids.shape)}, got {list(labels.shape)}")
        if labels is not None and labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        if labels is not None and not torch.compiler.is_compiling() and labels.device.type == "cpu":
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))]
            if wrong.numel():
                raise ValueError(f"labels must lie in 0..{self.config.vocab_size - 1} or be -100, got {int(wrong[0])}")
        if keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {keep}")
        if state is not None:
            self._check_state(state, ids.shape[0])

    def _check_state(self, state: ModelState, rows: int) -> None:
        if not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState, got {type(state).__name__}")
        if state.origin.fingerprint != self.fingerprint:
            raise ValueError("state was made by a model of another configuration")
        if len(state.seen) != rows:
            raise ValueError(f"state has {len(state.seen)} rows, input_ids has {rows}")
        if not state.origin.made_by(self) and state.origin.weights != hash_weights(self):
            raise ValueError("state was made by a model with other weights")

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, each moved into place when complete."""
        folder = Path(path)
        self.config.to_dict()  # refuses what cannot be saved before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.state_dict().items()}
        if self.config.tie_embeddings:
            del tensors["head.weight"]
        self.config.to_json(folder / "config.json.part")
        save_file(tensors, folder / "model.safetensors.part", {"format": "pt", "computation": COMPUTATION})
        os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
        os.replace(folder / "config.json.part", folder / "config.json")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TitansModel:
        """Read a folder written by ``save_pretrained``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights do not fit the configuration.
        """
        folder = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
        config = TitansConfig.from_json(folder / "config.json")
        model = build_model(config)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            check_computation((file.metadata() or {}).get("computation"), f"model folder {str(folder)!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if config.tie_embeddings and "embedding.weight" in tensors:
            tensors["head.weight"] = tensors["embedding.weight"]
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"model folder {str(folder)!r} does not fit its config.json: {error}") from error
        return model


def _loss(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Mean nats over the targets that are left after the shift; 0 if none is."""
    targets = labels[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float() if logits.dtype != torch.float64 else logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    return total / (targets != -100).sum().clamp(min=1)


def build_model(config: TitansConfig) -> TitansModel:
    """The model that ``config`` describes, as an instance of its variant's class."""
    from titans.models.variants import CLASSES

    model = CLASSES.get(config.variant, TitansModel).__new__(CLASSES.get(config.variant, TitansModel))
    TitansModel.__init__(model, config.model_copy(deep=True))
    return model


load_model = TitansModel.from_pretrained


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
