"""A grafted decoder with the call of a `TitansModel`: how `titans.load_model` and the commands open its folder.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from titans.hf import memories
from titans.hf.graft import FIELD
from titans.models import ModelOutput, TitansConfig
from titans.models.generation import GenerationMixin
from titans.names import TooLong


@dataclass(frozen=True)
class GraftedState:
    """What has been read; unlike a `ModelState` it grows with the text, by the decoder's keys and values.

    Args:
        cache: of transformers, the memories' states on it; no call changes it.
        mask: int64 [B, columns], 0 for those of its columns that are padding.
    """

    cache: Any
    mask: Tensor

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens read, per row."""
        return tuple(self.mask.sum(1).tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and memories."""
        held = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum(x.nbytes for x in (*held, *memories(self.cache).values()))

    def given(self) -> GraftedState:
        """As `ModelState.given`: nothing to gain here, calls replace tensors."""
        return self

    def copied(self) -> Any:
        """A cache to go on with: one that holds the same tensors, which are replaced and never written to."""
        new = copy.copy(self.cache)
        new.layers = [copy.copy(layer) for layer in new.layers]
        new.memories = dict(memories(self.cache))
        return new

    def forget(self) -> GraftedState:
        """Every memory back at its learned initial weights; keys and values stay."""
        cache = self.copied()
        memories(cache).clear()
        return GraftedState(cache, self.mask)


class GraftedModel(GenerationMixin, nn.Module):
    """What `titans.load_model` makes of a grafted decoder's folder.

    Args:
        model: the decoder, with its memories (attribute ``model``); ``config`` describes the memories.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, model: Any):
        super().__init__()
        if not hasattr(model.config, FIELD):
            raise ValueError(f"model must be a decoder with memories (titans.hf.graft), got {model.config.model_type}")
        self.model = model
        words = model.config.get_text_config().vocab_size
        self.config = TitansConfig.from_dict({**getattr(model.config, FIELD)["memory"], "vocab_size": words})

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: GraftedState | None = None,
        store_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Arguments and result as of `TitansModel`, but for the kind of state.

        Raises:
            ValueError: an argument of another kind, shape or range, or more tokens than the decoder has positions for.
        """
        self._check(input_ids, labels, {"attention_mask": attention_mask, "store_mask": store_mask}, logits_to_keep)
        if state is not None and (not isinstance(state, GraftedState) or len(state.mask) != len(input_ids)):
            rows = len(state.mask) if isinstance(state, GraftedState) else type(state).__name__
            raise ValueError(f"state must be a GraftedState of {len(input_ids)} rows, got {rows}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        whole = mask if state is None else torch.cat((state.mask, mask), 1)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and whole.shape[1] > limit and int(whole.sum(1).max()) > limit:
            raise TooLong(f"the decoder has positions for {limit} tokens, got {int(whole.sum(1).max())}")
        cache = DynamicCache(config=self.model.config) if state is None else state.copied()
        out = self.model(
            input_ids,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            labels=None if labels is None else labels.masked_fill(mask == 0, -100),
            logits_to_keep=logits_to_keep if labels is None else 0,
            store_mask=store_mask,
        )
        after: Any = GraftedState(cache, whole)
        return ModelOutput(out.logits[:, -logits_to_keep:], after, out.loss)

    def _check(self, ids: Any, labels: Any, masks: dict[str, Any], keep: int) -> None:
        kinds = (torch.int64, torch.int32)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or 0 in ids.shape or ids.dtype not in kinds:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"input_ids must be integers (int64), a non-empty [B, T], got {got}")
        for name, x in {"labels": labels, **masks}.items():
            if x is not None and (not isinstance(x, Tensor) or x.shape != ids.shape):
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must have input_ids' shape {list(ids.shape)}, got {got}")
        if labels is not None and labels.dtype not in kinds:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        if not isinstance(keep, int) or keep < 0:
            raise ValueError(f"logits_to_keep must be an integer of at least 0, got {keep!r}")
        if ids.device.type != "cpu":  # elsewhere a look means to wait
            return
        last = self.config.vocab_size - 1
        for name, x in (("input_ids", ids), ("labels", labels)):
            wrong: Any = () if x is None else x[((x < 0) | (x > last)) & ((x != -100) | (x is ids))]
            if len(wrong):
                raise ValueError(f"{name} must lie in 0..{last}, got {int(wrong[0])}")
        for name, mask in masks.items():
            found: Any = () if mask is None else mask[(mask != 0) & (mask != 1)]
            if len(found):
                raise ValueError(f"{name} must hold 1 for tokens and 0 for none, got {found[0].item()}")


def read_graft(folder: Path) -> GraftedModel:
    """Open a grafted decoder's folder: safetensors and JSON, no code in it is run."""
    decoder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return GraftedModel(decoder)
