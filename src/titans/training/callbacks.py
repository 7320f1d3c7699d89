"""What watches a run: metrics to JSONL, the curve, the progress display, and stopping on a signal."""

import io
import json
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from titans.files import write_whole
from titans.training.checkpoints import read_records


class _Nowhere(io.TextIOBase):
    """Takes everything, keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


class Unbreakable:
    """A stream whose writes never fail: a display is not worth the run.

    The terminal may be closed, the pipe's reader gone, the disk behind it full. The first failure ends the display.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self.stream.flush())

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError, AttributeError):  # no stream, a closed one, or one that takes nothing more
            self.stream = _Nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Metrics(TrainerCallback):
    """Writes one line of JSON per step (step, loss, lr, grad_norm, tokens_per_s) and one per evaluation.

    Every ``probe_every`` steps a line also holds ``gradient_norms`` by part of the model, and ``memory``, one
    `titans.models.MemoryReading` per layer.

    Args:
        path: the file, appended to.
        tokens_per_step: tokens that all processes together read in one optimizer step.
    """

    def __init__(self, path: Path, tokens_per_step: int):
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.tokens_per_s = 0.0
        self.last: dict[str, Any] = {}
        self._mark = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._mark = time.perf_counter()
        for record in read_records(self.path)[0]:  # a resumed run may have no step left to take
            self.last.update(record)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        now = time.perf_counter()
        self.tokens_per_s = self.tokens_per_step / max(now - self._mark, 1e-9)
        self._mark = now

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            record = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
            record["tokens_per_s"] = round(self.tokens_per_s, 1)
            record |= {name: logs[name] for name in ("gradient_norms", "memory") if name in logs}
        else:
            record = {name: value for name, value in logs.items() if name in ("eval_loss", "eval_bpb")}
        self.last.update(record)
        if record and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **record}) + "\n")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._mark = time.perf_counter()

    on_save = on_evaluate  # neither is training time


class Pictures(TrainerCallback):
    """Redraws the pictures from the metrics file at every evaluation and at the end.

    Args:
        console: where to say that a picture could not be drawn; the run goes on.
        metrics: the file.
        pictures: what draws from it, by the PNG that it writes.
    """

    def __init__(self, console: Console, metrics: Path, pictures: dict[Path, Callable[[Path, Path], None]]):
        self.console = console
        self.metrics = metrics
        self.pictures = pictures
        self._drawn_at: int | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero and self._drawn_at != state.global_step:
            for image, draw in self.pictures.items():
                try:
                    write_whole(image, partial(draw, self.metrics))
                except Exception as error:  # whatever it is, it is not worth the run
                    told = f"{image} could not be drawn: {error}"
                    self.console.print(told, highlight=False, markup=False, soft_wrap=True)
            self._drawn_at = state.global_step

    on_train_end = on_evaluate


class Display(TrainerCallback):
    """A progress bar with loss, tokens/s and time left; where none can be drawn, a line every ``log_every`` steps.

    Args:
        console: where to print.
        metrics: the run's `Metrics`, which must come before this callback in the list.
        log_every: steps between lines.
    """

    def __init__(self, console: Console, metrics: Metrics, log_every: int):
        console.file = cast(IO[str], Unbreakable(console.file))
        self.console = console
        self.metrics = metrics
        self.log_every = log_every
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console)
        self.progress.start()
        self.progress.add_task("train", total=state.max_steps, completed=state.global_step, status="")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            validation = f"validation {logs['eval_loss']:.4f} nats/token, {logs['eval_bpb']:.4f} bits per byte"
            self.console.print(f"step {state.global_step}: {validation}", highlight=False, markup=False)
        elif "loss" in logs:
            self._step(state, f"loss {logs['loss']:.4f}  {self.metrics.tokens_per_s:,.0f} tokens/s")

    def _step(self, state: TrainerState, status: str) -> None:
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step, status=status)
        elif state.global_step % self.log_every == 0 or state.global_step == state.max_steps:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {status}", highlight=False, markup=False)

    def say(self, line: str) -> None:
        """A line of its own, as it stands."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]


class StopOnSignal(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP (a closed terminal): finish the step, save a checkpoint, stop.

    A second signal acts as it always does.

    Used as a context manager around the run; ``received`` is the signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control
