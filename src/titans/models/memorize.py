"""Reading texts of any length into a state, in calls that are cut at fixed places of the stream.

What a model computes does not depend on where a text is cut, but its last bits do: a product of other shapes adds up in
another order. Calls therefore end where the position in the stream is a multiple of ``piece_length``, and where an
input ends, and nowhere else; and what they start from is always laid out alike. So a text that comes in pieces of any
size, or that is read on from a file, gives the bits of the text at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from titans.models.language_model import TitansModel
    from titans.models.state import ModelState

PIECE = 2**12


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


class MemorizeMixin:
    """``memorize`` for a model whose call takes and returns a state."""

    def memorize(
        self,
        text: str | Tensor | Iterable[np.ndarray],
        tokenizer: Encoder | None = None,
        state: ModelState | None = None,
    ) -> ModelState:
        """Read a text of any length and return what is remembered of it, in constant memory.

        Args:
            text: a string; token ids, int64 [T] or [B, T]; or arrays of ids one after the other, of any length each.
            tokenizer: for a string, anything with ``encode(text)``; a model of 256 ids reads bytes without one.
            state: what was read before; None starts new streams.

        Returns:
            The state after the last token; of one row for all but ids [B, T]. ``state.save(path)`` makes a memory file.

        Raises:
            ValueError: a string without a tokenizer, no token, an id outside the vocabulary, or another model's state.
            FloatingPointError: a memory diverged; names the layer.
        """
        model: TitansModel = self  # type: ignore[assignment]
        seen = set() if state is None else set(state.seen)
        for piece in on_grid(_arrays(text, tokenizer, model), seen.pop() if len(seen) == 1 else 0, model):
            state = read_piece(model, piece, state)
        if state is None:
            raise ValueError("text holds no token")
        return state


def piece_length(model: Any) -> int:
    """Tokens of a call: whole segments of the model, about 4,096."""
    segment = model.config.segment
    return max(1, PIECE // segment) * segment


def on_grid(blocks: Iterable[np.ndarray], position: int, model: Any) -> Iterator[np.ndarray]:
    """The same ids [..., T] cut where the position in the stream is a multiple of `piece_length`.

    Args:
        blocks: ids one after the other, of any length each.
        position: of the first one in its stream.
    """
    length = piece_length(model)
    held: list[np.ndarray] = []
    room = length - position % length
    for block in blocks:
        while block.shape[-1] >= room:
            yield np.concatenate((*held, block[..., :room]), -1)
            block, held, room = block[..., room:], [], length
        if block.shape[-1]:
            held.append(block)
            room -= block.shape[-1]
    if held:
        yield np.concatenate(held, -1)


@torch.no_grad()
def read_piece(model: TitansModel, ids: np.ndarray, state: ModelState | None) -> ModelState:
    """One call of `on_grid`'s: ids [T] or [B, T]."""
    rows = torch.from_numpy(np.atleast_2d(ids).astype(np.int64)).to(model.embedding.weight.device)
    after = model(rows, state=state, logits_to_keep=1).state
    return after.map(lambda x: x.detach().clone(memory_format=torch.contiguous_format))


def _arrays(text: Any, tokenizer: Encoder | None, model: TitansModel) -> Iterable[np.ndarray]:
    if isinstance(text, str):
        if tokenizer is None and model.config.vocab_size != 256:
            raise ValueError(f"text needs tokenizer=: the model's {model.config.vocab_size} ids are not bytes")
        if tokenizer is None:
            return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)]
        if not hasattr(tokenizer, "encode"):
            raise ValueError(f"tokenizer must have encode(text), got {type(tokenizer).__name__}")
        return [np.array(tokenizer.encode(text), dtype=np.int64)]
    if isinstance(text, Tensor):
        if text.dim() not in (1, 2) or text.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"text must be integers (int64) [T] or [B, T], got {text.dtype} {list(text.shape)}")
        return [text.cpu().numpy()]
    if isinstance(text, np.ndarray):
        return [_ids(text)]
    if not isinstance(text, Iterable) or isinstance(text, bytes):
        raise ValueError(f"text must be a string, ids, or arrays of ids, got {type(text).__name__}")
    return map(_ids, text)


def _ids(block: Any) -> np.ndarray:
    if not isinstance(block, np.ndarray) or block.dtype.kind not in "iu" or block.ndim not in (1, 2):
        told = f"{block.dtype} {list(block.shape)}" if isinstance(block, np.ndarray) else type(block).__name__
        raise ValueError(f"text must be arrays of integers [T] or [B, T], got {told}")
    return block
