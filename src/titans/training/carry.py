"""Training on carried state: the states of streams between their windows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from titans.models import ModelState, TitansModel
from titans.models.state import Origin
from titans.training.config import ConfigError


class CarriedStates:
    """The state of every stream between two of its windows, detached: gradients stay inside a window.

    A process reads its micro-batches in turns: micro-batch n goes on where micro-batch n - ``turns`` stopped.

    Args:
        turns: micro-batches before the first one's streams are read on, at least 1.
        per_step: micro-batches of an optimizer step, at least 1.
    """

    def __init__(self, turns: int, per_step: int):
        self.turns = turns
        self.per_step = per_step
        self.micro_batches = 0  # read by this process
        self._states: dict[int, ModelState] = {}
        self._new: dict[int, ModelState] = {}  # of an optimizer step that may still fail

    def before(self, fresh: Sequence[bool]) -> ModelState | None:
        """The state to read the next micro-batch from, its ``fresh`` rows reset; None where all rows are."""
        if self.micro_batches % self.per_step == 0:
            self.settle()
        turn = self.micro_batches % self.turns
        state = self._new.get(turn, self._states.get(turn))
        if state is None or all(fresh):
            return None
        return state.reset([row for row, starts in enumerate(fresh) if starts])

    def after(self, state: ModelState) -> None:
        """Keep what that micro-batch left behind."""
        # Copies as a file would hold them: no slice keeps a larger tensor alive, and a resumed run rounds alike.
        self._new[self.micro_batches % self.turns] = state.map(lambda x: x.detach().contiguous().clone())
        self.micro_batches += 1

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
            # The weights move on before all of these are read: no hash would fit them.
            origin = Origin(state.origin.fingerprint, weights="in training")
            replace(state, origin=origin).save(_file(folder, process, turn))

    def load(self, folder: str | Path, process: int, processes: int, steps: int, model: TitansModel, rows: int) -> None:
        """Take up what ``save`` wrote, as states of ``model``.

        Args:
            folder: the checkpoint.
            process, processes: which of how many this is.
            steps: how many optimizer steps had been taken.
            model: whose states they become.
            rows: of a micro-batch.

        Raises:
            ConfigError: written by another number of processes or for other batches, or a file is missing or damaged.
        """
        wrote = len(list(Path(folder).glob("carried-*-0.safetensors")))
        if steps and wrote != processes:
            raise ConfigError(
                f"training.carry_state: {folder} holds the states of {wrote} processes, this run has {processes}"
            )
        device = model.embedding.weight.device
        self.micro_batches, self._new, self._states = steps * self.per_step, {}, {}
        for turn in range(min(self.turns, self.micro_batches)):
            try:
                state = ModelState.load(_file(folder, process, turn))
            except (FileNotFoundError, ValueError) as error:
                raise ConfigError(f"training.carry_state: {error}") from error
            if state.origin.fingerprint != model.fingerprint:
                raise ConfigError(f"training.carry_state: {folder} holds states of a model of another configuration")
            if state.rows != rows:
                raise ConfigError(f"training.carry_state: {folder} holds states of {state.rows} rows, not {rows}")
            # Copies: tensors lie in a file at any address, and arithmetic on unaligned ones rounds differently.
            state = replace(state, origin=model.origin).map(lambda x: x.to(device, copy=True))
            self._states[turn] = state


def _file(folder: str | Path, process: int, turn: int) -> Path:
    return Path(folder) / f"carried-{process}-{turn}.safetensors"
