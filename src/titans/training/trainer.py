"""transformers' Trainer with our optimizer, schedule, data order, evaluation and watch for non-finite values."""

import inspect
import math
import tempfile
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from titans.data import bits_per_byte
from titans.hf import TitansForCausalLM
from titans.training import checkpoints, finite
from titans.training.carry import CarriedStates
from titans.training.config import ConfigError, TrainingSection
from titans.training.optimizer import build_optimizer, get_cosine_schedule_with_warmup
from titans.training.probe import probe


class TitansTrainer(Trainer):
    """The run's engine.

    Samples come in the order of their index, and a sample is a function of (seed, index): a resumed run skips by
    counting what was read and then reads exactly what the uninterrupted run would have read.

    Args:
        settings: the run's training section.
        kwargs: Trainer's own arguments; batches are those of `titans.training.data.collate`.
    """

    def __init__(self, settings: TrainingSection, **kwargs):
        self.settings = settings
        self.carried = None
        if settings.carry_state:
            self.carried = CarriedStates(settings.carry_turns, settings.gradient_accumulation)
        self._probed: dict[str, Any] = {}  # until the step is logged
        self._norm: Tensor | float = math.nan  # of the step's gradient, before clipping
        self._inputs: dict[str, Any] = {}  # of the last forward pass in training
        self.stamp = checkpoints.Stamp("", 1, {})  # of the run; set before it begins
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # windows are full: a step's loss is the mean over its micro-batches
        self._accepted = inspect.signature(self.network.forward).parameters

    @property
    def network(self) -> TitansForCausalLM:
        """The model that is trained, as transformers holds it now."""
        return cast(TitansForCausalLM, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Our AdamW, built here rather than passed in, so that it also works where the model is sharded first."""
        if self.optimizer is None:
            trained = self.network if model is None else model
            self.optimizer = build_optimizer(trained, self.settings.lr, self.settings.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Our cosine over the whole run."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = get_cosine_schedule_with_warmup(
                optimizer, self.settings.warmup_steps, num_training_steps, self.settings.min_lr_ratio
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset if train_dataset is None else train_dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the numbers to the callbacks; the metrics file is the history, not ``trainer_state.json``."""
        if "loss" in logs:
            # transformers 5.0 leaves the norm out where nothing is clipped.
            logs, self._probed = {"grad_norm": float(self._norm), **logs, **self._probed}, {}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """One micro-batch forward and backward; stops the run before a non-finite value reaches the weights."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:  # a memory that diverged: the model's message names the layer
            self._stop(str(error))
        self._check("loss", loss, lambda: finite.first_bad_activation(model, self._inputs))
        if self.accelerator.sync_gradients:
            norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
            self._norm = norm
            self._check("gradient norm", norm, lambda: finite.first_bad_gradient(self.network))
            if self.settings.probe_every and (self.state.global_step + 1) % self.settings.probe_every == 0:
                with self.accelerator.autocast():
                    self._probed = probe(self.network, self._inputs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The loss of a micro-batch, with carried state read from where its streams stopped."""
        self._inputs = self._arguments(inputs, self.carried)
        loss, output = cast(tuple[Tensor, Any], super().compute_loss(model, self._inputs, True, num_items_in_batch))
        if self.carried is not None:
            self.carried.after(output.state)
        return (loss, output) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss in nats per token and in bits per byte of the tokens scored, the memory on.

        Each window is read from an empty memory; in a run that carries state, from what the window before it in the
        same document left behind (`titans.training.data.EvaluationStreams`).
        """
        self.network.eval()
        carried = None if self.carried is None else CarriedStates(turns=1, per_step=1)
        nats, targets, n_bytes = 0.0, 0, 0
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            labels = inputs.pop("labels")
            with torch.no_grad(), self.accelerator.autocast():
                output = self.network(**self._arguments(inputs, carried))
            if carried is not None:
                carried.after(output.state)
            rows = self.accelerator.gather_for_metrics((*row_losses(output.logits, labels), inputs["bytes"]))
            # Sums are Python's: some devices (MPS) have no float64.
            sums = [sum(values.tolist()) for values in rows]
            nats, targets, n_bytes = nats + sums[0], targets + sums[1], n_bytes + sums[2]
        loss = nats / targets
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_bpb": bits_per_byte(loss, targets, n_bytes),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _arguments(self, inputs: dict[str, Any], carried: CarriedStates | None) -> dict[str, Any]:
        """What the model is called with: of a batch what its forward takes, and the state to go on from."""
        arguments = {name: value for name, value in inputs.items() if name in self._accepted}
        if carried is not None:
            arguments["state"] = carried.before(inputs["fresh"].tolist())
            if "use_cache" in self._accepted:  # transformers switches it off in training, and the state with it
                arguments["use_cache"] = True
        return arguments

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' files, and the manifest that makes them a checkpoint when all of them are there.

        Raises:
            CheckpointError: the folder could not be written; the checkpoints before are still there.
        """
        step = self.state.global_step
        folder = Path(self.settings.output_dir) / f"checkpoint-{step}"
        try:
            if self.args.should_save:
                checkpoints.begin(folder, self.stamp.run)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.finish(folder, step, self.stamp, self.settings.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise checkpoints.CheckpointError(f"{folder} could not be written: {_reason(folder, error)}") from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Of every process, as transformers does; the carried states lie beside it."""
        super()._save_rng_state(output_dir)
        if self.carried is not None:
            self.carried.settle()
            self.carried.save(output_dir, self.args.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _naming(checkpoint):
            super()._load_rng_state(checkpoint)
        if self.carried is not None and checkpoint is not None:
            processes = (self.args.process_index, self.args.world_size)
            rows = self.args.per_device_train_batch_size
            self.carried.load(checkpoint, *processes, self.state.global_step, self.network.model, rows)

    def _check(self, name: str, value: Tensor, find: Callable[[], str]) -> None:
        """Stop the run, all processes together, if the value is not finite on one of them; ``find`` the bad tensor."""
        good = torch.isfinite(value).reshape(1)
        if self.args.world_size > 1:
            good = cast(Tensor, self.accelerator.gather(good))
        if not good.all():
            self._stop(f"the {name} is {value.item()}; first bad tensor: {find()}")

    def _stop(self, problem: str) -> NoReturn:
        """Save the weights as they are, untouched since the last good step, and raise.

        Raises:
            NonFiniteError: always.
        """
        if self.carried is not None:
            self.carried.drop()
        message = f"step {self.state.global_step + 1}: {problem}"
        broken = finite.first_bad_parameter(self.network)
        found = checkpoints.last_checkpoint(self.settings.output_dir)
        if broken is not None:
            message += f"; the weights are already bad, {broken} first"
        elif found is None or found[1] != self.state.global_step:
            self._save_checkpoint(self.network, trial=None)
            found = checkpoints.last_checkpoint(self.settings.output_dir)
        raise finite.NonFiniteError(f"{message}; last good checkpoint: {'none' if found is None else found[0]}")


@contextmanager
def _naming(checkpoint: str | None) -> Iterator[None]:
    """What transformers stumbles over in a checkpoint that has its manifest is somebody's doing."""
    try:
        yield
    except Exception as error:  # of pickles there is hardly one that does not come
        told = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ConfigError(f"training.output_dir: {checkpoint} was tampered with and cannot be read: {told}") from error


def _reason(folder: Path, error: Exception) -> str:
    """What the system says; torch and safetensors put their own words in its place."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            file.write(bytes(2**22))
    except OSError as second:
        return second.strerror or str(second)
    return str(error).partition("\n")[0]


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the shifted cross entropies in nats (float32) and number of targets of each row, ``[B]`` both.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, the input ids or -100.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return losses.sum(1), (targets != -100).sum(1)
