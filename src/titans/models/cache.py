"""`TitansCache`: a state as the cache that transformers hands from call to call; no transformers is needed for it."""

from __future__ import annotations

from torch import Tensor

from titans.models.state import ModelState


class TitansCache:
    """A `ModelState` in the place of ``past_key_values``; as any cache, it is changed by the call that it is given to.

    Args:
        state: what has been read; None for nothing.
        columns: how many columns of ``input_ids`` that was, padding included. 0 where the next ids do not repeat it.
    """

    is_compileable = False
    is_croppable = False  # a memory cannot unread

    def __init__(self, state: ModelState | None = None, columns: int = 0):
        self.state = state
        self.columns = columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = None if self.state is None else self.state.select(beam_idx)

    batch_select_indices = reorder_cache
    reset = __init__  # without arguments

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = None if self.state is None else self.state.fork(repeats)
