"""Training on carried state: what the streams of a `StreamDataset` remember between their windows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from titans.models import ModelState, TitansModel


class CarriedStates:
    """The state of every stream between two of its windows, detached: gradients stay inside a window.

    A process reads its micro-batches in turns: micro-batch n goes on where micro-batch n - ``turns`` stopped.

    Args:
        turns: micro-batches before the first one's streams are read on, at least 1.
    """

    def __init__(self, turns: int):
        self.turns = turns
        self._states: dict[int, ModelState] = {}
        self._new: dict[int, ModelState] = {}  # of an optimizer step that may still fail

    def before(self, micro_batch: int, fresh: Sequence[bool]) -> ModelState | None:
        """The state to read a micro-batch from, its ``fresh`` rows reset; None where all rows are."""
        turn = micro_batch % self.turns
        state = self._new.get(turn, self._states.get(turn))
        if state is None or all(fresh):
            return None
        return state.reset([row for row, starts in enumerate(fresh) if starts])

    def after(self, micro_batch: int, state: ModelState) -> None:
        """Note what a micro-batch left behind."""
        # Copies as a file would hold them: no slice keeps a larger tensor alive, and a resumed run rounds alike.
        self._new[micro_batch % self.turns] = state.map(lambda x: x.detach().contiguous().clone())

    def settle(self) -> None:
        """The optimizer step was taken: what it left behind counts."""
        self._states |= self._new
        self._new = {}

    def drop(self) -> None:
        """The optimizer step failed: back to where it began."""
        self._new = {}

    def save(self, folder: str | Path, process: int) -> None:
        """Write one file per turn beside a checkpoint's other files."""
        for turn, state in self._states.items():
            state.save(_file(folder, process, turn))

    def load(self, folder: str | Path, process: int, model: TitansModel) -> None:
        """Take up what ``save`` wrote, as states of ``model``, whose weights will move on before all are read."""
        # Copies: tensors lie in a file at any address, and arithmetic on unaligned ones rounds differently.
        device = model.embedding.weight.device
        found = ((turn, _file(folder, process, turn)) for turn in range(self.turns))
        self._new = {}
        self._states = {
            turn: replace(ModelState.load(path), origin=model.origin).map(lambda x: x.to(device, copy=True))
            for turn, path in found
            if path.is_file()
        }


def _file(folder: str | Path, process: int, turn: int) -> Path:
    return Path(folder) / f"carried-{process}-{turn}.safetensors"
