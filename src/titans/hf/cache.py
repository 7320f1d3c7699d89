"""`TitansCache`: a model's state where transformers keeps keys and values."""

from collections.abc import Sequence

from torch import Tensor

from titans.models import ModelState


class TitansCache:
    """A `ModelState` in the place of ``past_key_values``: as large after a book as after a line.

    As every cache of transformers it is changed by the call that it is given to; the states in it never are.

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
        """Columns read."""
        return self.columns

    def read(self, state: ModelState, columns: int) -> None:
        """Take up what a call left behind, which read so many columns."""
        self.state, self.columns = state, self.columns + columns

    def select(self, rows: Sequence[int] | Tensor) -> "TitansCache":
        """A cache of these rows, in this order; a row may be repeated."""
        return TitansCache(None if self.state is None else self.state.select(rows), self.columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.select(beam_idx).state

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = None if self.state is None else self.state.fork(repeats)

    def reset(self) -> None:
        self.state, self.columns = None, 0
