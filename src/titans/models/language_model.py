"""The language model around the blocks: embedding, blocks, head.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from titans.layers.module import Linear, Module, RMSNorm, check_dtype
from titans.layers.neural_memory import NeuralMemory
from titans.miras.choice import BY_NAME
from titans.models.blocks import Block
from titans.models.config import FREE, TitansConfig
from titans.models.decoding import Buffers, begin_steps, eager_from_a_state, step, unstepped
from titans.models.generation import GenerationMixin
from titans.models.loss import check_items, mean_nats, targets_of
from titans.models.memorize import MemorizeMixin
from titans.models.state import ModelState, Origin, check_shapes, hash_weights, shapes_of
from titans.names import check_kind
from titans.ops.memory import Engine, check_engine, check_finite, pick
from titans.ops.memory.scan import check_range
from titans.ops.place import Place
from titans.ops.rows import Packing, Rows
from titans.state import check_place, counts

NOTICEABLE = 16  # tokens of a chunk that hides its writes


@dataclass(frozen=True)
class ModelOutput(Mapping):
    """What a call returns, as attributes and as a mapping of what is there.

    Attributes:
        logits: [B, T, V], or the last ``logits_to_keep`` positions.
        state: pass it to the next call to go on.
        loss: mean negative log-likelihood in nats per target, only with labels.
        hidden_states: the residual stream [B, T, d_model] before each block, and what the head reads; only if asked.
    """

    logits: Tensor
    state: ModelState
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def _present(self) -> dict[str, Any]:
        names = ("loss", "logits", "state", "hidden_states")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def __getitem__(self, name: str | int | slice) -> Any:
        """By name, or by place among what is there."""
        return self._present()[name] if isinstance(name, str) else self.to_tuple()[name]

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there: loss, logits, state, hidden_states."""
        return tuple(self._present().values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


pytree.register_pytree_node(
    ModelOutput,
    lambda out: ([getattr(out, f.name) for f in fields(out)], None),
    lambda values, context: ModelOutput(*values),
)


class TitansModel(GenerationMixin, MemorizeMixin, Module):
    """A language model of ``config.n_layers`` blocks of one variant.

    Calls keep nothing on the module: state goes in and comes out, and one call on T tokens equals the same tokens in
    any split.

    Args:
        config: what to build; the model keeps a copy that does not change.
        engine: how the memories compute, see `set_engine`; None for their default.
    """

    _like: tuple[Any, ...] | None = None  # the shapes of its states' layers, since it made one
    _fingerprint: tuple[TitansConfig, str] | None = None  # of the configuration beside it, which is frozen

    def __init__(self, config: TitansConfig, engine: Engine | None = None):
        super().__init__()
        self._config = config.frozen()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.head = Linear(config.d_model, config.vocab_size)
        self.initialise()
        if engine is not None:
            self.set_engine(engine)
        if config.has_memory and config.rule.hides_writes and config.chunk_size > NOTICEABLE:
            retention, algorithm = config.rule.retention.name, config.rule.algorithm.name
            warnings.warn(
                f"with retention {retention!r} and algorithm {algorithm!r} a chunk's writes show only when it is "
                f"complete: with chunk_size = {config.chunk_size} nothing of the last {config.chunk_size - 1} tokens "
                "may be in the memory (docs/miras.md)",
                stacklevel=3,
            )

    @property
    def config(self) -> TitansConfig:
        """What the model is built from."""
        return self._config

    @config.setter
    def config(self, config: TitansConfig) -> None:
        config.check_built(self._config)  # a ValueError: the weights stay those of the other one
        self._config = config.frozen()

    def initialise(self) -> None:
        """The embedding starts at the scale of the tied output projection: logits of unit variance."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight  # here, since ``to_empty`` gives each a parameter of its own
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)

    @eager_from_a_state
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        store_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ModelOutput:
        """Read T tokens from ``state`` on.

        Args:
            input_ids: int64 [B, T], T ≥ 1, no upper limit.
            labels: int64 [B, T], the same ids; shifted inside, -100 is ignored. With T = 1 no target is left: loss 0.
            attention_mask: [B, T], 0 or False for padding (anywhere): such tokens do nothing, their logits are zero.
            state: what an earlier call returned; None starts new streams.
            store_mask: [B, T], 0 or False for tokens that the memory reads but does not write.
            document_ids: int64 [B, T], several documents in a row: where the id differs from that of the token before,
                a new stream begins, as if the document stood alone; the row's first one goes on from ``state``. No
                target is counted across a change. The state returned is that of each row's last document.
            logits_to_keep: compute logits of the last so many positions only; 0 for all.
            inputs_embeds: [B, T, d_model], vectors to read instead of ids.
            output_hidden_states: also return the residual stream before each block and what the head reads.
            num_items_in_batch: divide the loss by so many targets instead of by those of this call: several calls, of
                more and fewer targets, then add up to the mean over all.

        Returns:
            logits [B, T, V], the state, and with labels the loss: mean nats per target.

        Raises:
            ValueError: an id outside the vocabulary, a wrong shape or dtype, a state of another model; named.
            FloatingPointError: reading without gradients, a memory diverged; names the layer.
        """
        x = self._read(input_ids, inputs_embeds)
        self._check(x, labels, state, logits_to_keep)
        mask = self._flags("attention_mask", attention_mask, x)
        if inputs_embeds is not None:
            x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)  # of padding not even NaN does anything
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                check_range("inputs_embeds", x)
        store = self._flags("store_mask", store_mask, x)
        documents = self._documents(document_ids, x)
        store = None if store is None or bool(store.all()) else store
        if labels is None and store is None and not output_hidden_states and self._steps(x, state):
            return self._step(x, state, mask)  # type: ignore[arg-type]
        packing = None
        if mask is not None and not bool(mask.all()):
            packing = Packing.of(mask)
            x = packing.pack(x)
            store, documents = (None if v is None else packing.pack(v) for v in (store, documents))
        seen = (0,) * x.shape[0] if state is None else state.seen
        rows = Rows.whole(seen, x.shape[1]) if packing is None else Rows(seen, packing.counts, x.shape[1])
        rows = rows if documents is None else rows.of_documents(documents)
        stream, after = self._encode(x, state, rows, store, output_hidden_states)
        if packing is not None:
            stream = tuple(map(packing.unpack, stream))
        hidden, told = stream[-1], stream if output_hidden_states else None
        if labels is None:
            return ModelOutput(self.head(hidden[:, -logits_to_keep:]), after, None, told)
        check_items(num_items_in_batch)
        logits = self.head(hidden)
        loss = mean_nats(logits, targets_of(labels.long(), mask, document_ids), num_items_in_batch)
        return ModelOutput(logits[:, -logits_to_keep:], after, loss, told)

    def _steps(self, x: Tensor, state: ModelState | None) -> bool:
        """Is this a call for the step of fixed shapes: one token, a state to go on from, no gradients?"""
        if x.shape[1] != 1 or state is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self.decoding()[0] == "step"

    def _step(self, x: Tensor, state: ModelState, mask: Tensor | None) -> ModelOutput:
        """One token of every row, in fixed shapes."""
        active = None if mask is None or bool(mask.all()) else mask[:, 0]
        buffers, origin = state.buffers_of(self), state.origin
        if buffers is None:
            buffers, origin = Buffers(begin_steps(self, state)), origin.then(self)
        claimed = buffers.claim()
        place = Place(buffers.steps.read, active, x.device, appends=claimed, overwrites=claimed and buffers.given)
        logits, steps = step(self, x, buffers.steps, place)
        logits = logits if active is None else logits.masked_fill(~active.view(-1, 1, 1), 0)
        if place.closes:  # weights change with chunks alone
            check_finite(steps.layers, [f"blocks.{i}" for i in range(len(steps.layers))], steps.read)
        return ModelOutput(logits, ModelState.of_buffers(Buffers(steps), origin))

    def _encode(
        self, x: Tensor, state: ModelState | None, rows: Rows, store: Tensor | None, all_hidden: bool
    ) -> tuple[tuple[Tensor, ...], ModelState]:
        """Of a right-padded batch of embeddings the final hidden states [B, T, d_model], last of all that are kept."""
        layers, stream = [], []
        for i, block in enumerate(self.blocks):
            stream += [x] if all_hidden else []
            before = None if state is None else state.layers[i]
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, rows, store, use_reentrant=False)
            else:
                x, after = block(x, before, rows, store)
            layers.append(after)
        check_finite(layers, [f"blocks.{i}" for i in range(len(layers))])
        origin = self.origin if state is None else state.origin.then(self)
        if state is None and self._like is None and not torch.compiler.is_compiling():
            self._like = shapes_of(layers)
        return (*stream, self.norm(x)), ModelState(tuple(layers), counts(rows.after), origin)

    def set_engine(self, engine: Engine) -> None:
        """How the memories compute; see `titans.ops.memory_scan`.

        Raises:
            ValueError: no such engine, or it cannot be used for this model's rule here.
        """
        check_engine(engine)
        if self.config.has_memory:
            pick(engine, self.config.rule, self.embedding.weight.device)
        for module in self.modules():
            if isinstance(module, NeuralMemory):
                module.engine = engine

    def engines(self) -> dict[str, tuple[str, str]]:
        """For every memory, by the path of its layer: the engine that computes it, and why that one."""
        memories = ((n, m) for n, m in self.named_modules() if isinstance(m, NeuralMemory))
        return {name: pick(m.engine, m.miras, m.qkv.weight.device) for name, m in memories}

    def decoding(self) -> tuple[str, str]:
        """How a token is read with a state and without gradients, and why so: by the "step" of fixed shapes, or as any
        other call, "general"."""
        if reason := unstepped(self):
            return "general", reason
        return "step", "every layer has a step of fixed shapes"

    @property
    def origin(self) -> Origin:
        """What the states that this model makes carry along."""
        return Origin(self.fingerprint, self)

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the configuration that a state depends on."""
        if self._fingerprint is None or self._fingerprint[0] is not self.config:
            self._fingerprint = self.config, self._describe()
        return self._fingerprint[1]

    def _describe(self) -> str:
        described = self.config.explicit().model_dump(mode="json", exclude=set(FREE), context=BY_NAME)
        if described["memory_layers"] is None:  # as in files of before there was this field
            del described["memory_layers"]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, each moved into place when complete."""
        from titans.models.build import save_model

        save_model(self, path)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TitansModel:
        """Read a folder written by ``save_pretrained``; see `load_model`.

        Raises:
            ValueError: also where the folder holds another class of model.
        """
        from titans.models.build import load_model

        model = load_model(path)
        if not isinstance(model, cls):
            raise ValueError(f"model folder {str(path)!r} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def _flags(self, name: str, flags: Tensor | None, like: Tensor) -> Tensor | None:
        if flags is None:
            return None
        if not isinstance(flags, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(flags).__name__}")
        if flags.shape != like.shape[:2]:
            raise ValueError(f"{name} must have input_ids' shape {list(like.shape[:2])}, got {list(flags.shape)}")
        if flags.dtype != torch.bool and flags.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = flags[(flags != 0) & (flags != 1)]  # an additive mask has 0 where this one has 1
            if wrong.numel():
                raise ValueError(f"{name} must hold 1 for tokens and 0 for none, got {wrong[0].item()}")
        return flags.bool()

    def _documents(self, documents: Tensor | None, like: Tensor) -> Tensor | None:
        if documents is None:
            return None
        if not isinstance(documents, Tensor):
            raise ValueError(f"document_ids must be a tensor, got {type(documents).__name__}")
        if documents.shape != like.shape[:2] or documents.is_floating_point() or documents.dtype == torch.bool:
            raise ValueError(
                f"document_ids must be integers of input_ids' shape {list(like.shape[:2])}, got {documents.dtype} "
                f"{list(documents.shape)}"
            )
        return documents

    def _read(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """The vectors [B, T, d_model] to read."""
        if (ids is None) == (embeds is None):
            raise ValueError(f"give input_ids or inputs_embeds, got {'neither' if ids is None else 'both'}")
        if embeds is not None:
            check_kind("inputs_embeds", embeds, Tensor, "a tensor")
            if embeds.dim() != 3 or 0 in embeds.shape or embeds.shape[2] != self.config.d_model:
                raise ValueError(
                    f"inputs_embeds must be a non-empty [B, T, {self.config.d_model}], got {list(embeds.shape)}"
                )
            if not embeds.is_floating_point():
                raise ValueError(f"inputs_embeds must be floating point, got {embeds.dtype}")
            check_dtype("inputs_embeds", embeds, self.embedding.weight.dtype)
            return embeds
        if not isinstance(ids, Tensor):
            raise ValueError(f"input_ids must be a tensor, got {type(ids).__name__}")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"input_ids must be a non-empty [B, T], got {list(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be integers (int64), got {ids.dtype}")
        if ids.is_meta and not self.embedding.weight.is_meta:  # torch would read memory at random
            raise ValueError(
                f"input_ids must hold numbers, got a tensor on meta for a model on {self.embedding.weight.device}"
            )
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids must lie in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high}"
                )
        return self.embedding(ids)

    def _check(self, x: Tensor, labels: Tensor | None, state: ModelState | None, keep: int) -> None:
        check_kind("labels", labels, (Tensor, type(None)), "a tensor")
        if labels is not None and labels.shape != x.shape[:2]:
            raise ValueError(f"labels must have input_ids' shape {list(x.shape[:2])}, got {list(labels.shape)}")
        if labels is not None and labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        if labels is not None and not torch.compiler.is_compiling() and labels.device.type == "cpu":
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))]
            if wrong.numel():
                raise ValueError(f"labels must lie in 0..{self.config.vocab_size - 1} or be -100, got {int(wrong[0])}")
        if not isinstance(keep, int) or keep < 0:
            raise ValueError(f"logits_to_keep must be an integer of at least 0, got {keep!r}")
        if state is not None:
            self.check_state(state, x.shape[0])
            self._check_place(state)

    def _check_place(self, state: ModelState) -> None:
        """Every block finds its part of the state where its weights are: blocks may be on several devices."""
        if torch.compiler.is_compiling() or state.buffers_of(self) is not None:
            return
        for i, (block, layer) in enumerate(zip(self.blocks, state.layers, strict=True)):
            check_place(layer, next(block.parameters()).device, f"the model's block {i}", f"state.layers[{i}]")

    def check_state(self, state: ModelState, rows: int | None = None) -> None:
        """Raise a ValueError unless ``state`` was made by this model and, where given, has so many rows."""
        if not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState, got {type(state).__name__}")
        if state.origin.fingerprint != self.fingerprint:
            raise ValueError("state was made by a model of another configuration")
        if "layers" in vars(state) and len(state.layers) != len(self.blocks):  # buffers make them when asked to
            raise ValueError(f"state has {len(state.layers)} layers, the model {len(self.blocks)}")
        if rows is not None and state.rows != rows:
            raise ValueError(f"state has {state.rows} rows, input_ids has {rows}")
        if not state.origin.made_by(self) and state.origin.weights != hash_weights(self):
            raise ValueError("state was made by a model with other weights")
        if "layers" in vars(state) and not torch.compiler.is_compiling():
            if self._like is None:
                with torch.no_grad():
                    self.forward(torch.zeros((1, 1), dtype=torch.int64, device=self.embedding.weight.device))
            check_shapes(state.layers, self._like or (), state.rows)
