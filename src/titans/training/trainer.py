"""transformers' Trainer with our optimizer, schedule, data order, evaluation and guard against non-finite values."""

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from titans.data import bits_per_byte
from titans.hf import TitansForCausalLM
from titans.models import probe_memories
from titans.training.carry import CarriedStates
from titans.training.checkpoints import last_checkpoint
from titans.training.config import TrainingSection
from titans.training.optimizer import build_optimizer, get_cosine_schedule_with_warmup


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is not finite; the message names the step, the tensor and the checkpoint to go back to."""


class TitansTrainer(Trainer):
    """The run's engine.

    Samples come in the order of their index, and a sample is a function of (seed, index): a resumed run skips what was
    seen by counting and reads exactly what the uninterrupted run would have read.

    Args:
        settings: the run's training section.
        bytes_per_token: mean bytes of a validation token, for bits per byte.
        kwargs: Trainer's own arguments.
    """

    def __init__(self, settings: TrainingSection, bytes_per_token: float, **kwargs):
        self.settings = settings
        self.bytes_per_token = bytes_per_token
        self.carried = CarriedStates(settings.carry_turns) if settings.carry_state else None
        self._micro_batch: int | None = None  # the process's next one, None before the first
        self._seen: dict[str, Any] = {}  # by the probe, until the step is logged
        self._inputs: dict[str, Any] = {}  # of the last one, as the model got them
        super().__init__(**kwargs)

    @property
    def network(self) -> nn.Module:
        """The model that is trained, as transformers holds it now."""
        return cast(nn.Module, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Our AdamW, built here rather than passed in, so that it also works where the model is sharded first."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.network if model is None else model, lr=self.settings.lr, weight_decay=self.settings.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Our cosine over the whole run."""
        if self.lr_scheduler is None:
            self.lr_scheduler = get_cosine_schedule_with_warmup(
                self.optimizer if optimizer is None else optimizer,
                self.settings.warmup_steps,
                num_training_steps,
                self.settings.min_lr_ratio,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset if train_dataset is None else train_dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the numbers to the callbacks; the metrics file is the history, not ``trainer_state.json``."""
        if "loss" in logs:
            logs, self._seen = {**logs, **self._seen}, {}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation loss in nats per token and in bits per byte, the memory on, each window from an empty memory."""
        self.network.eval()
        nats = torch.zeros((), dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.network(input_ids=inputs["input_ids"]).logits
            per_row = self.accelerator.gather_for_metrics(row_losses(logits, inputs["labels"]))
            nats += per_row[0].double().sum()
            tokens += per_row[1].sum()
        loss, count = (nats / tokens).item(), int(tokens)
        bits = bits_per_byte(loss, count, round(count * self.bytes_per_token))
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_bpb": bits}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch forward and backward; stops the run before a non-finite value reaches the weights."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:  # a memory that diverged: the model's message names the layer
            self._stop(str(error))
        if not self._all_finite(loss):
            self._stop(f"the loss is {loss.item()}", first_bad_activation(model, self._inputs))
        if self.accelerator.sync_gradients:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not self._all_finite(norm):
                self._stop(f"the gradient norm is {norm.item()}", first_bad_gradient(self.network))
            if self.settings.probe_every and (self.state.global_step + 1) % self.settings.probe_every == 0:
                self._look()
        return loss

    def _look(self) -> None:
        """Measure the outer gradients, and the memories on the first row of the last micro-batch.

        A look never ends a run: it leaves out windows shorter than a chunk, in which hardly anything is written, and a
        memory that diverges, of which the loss will tell all processes at once.
        """
        self._seen = {"gradient_norms": gradient_norms(self.network)}
        ids, state = self._inputs["input_ids"][:1], self._inputs.get("state")
        model = cast(TitansForCausalLM, self.network).model
        if ids.shape[1] < model.config.chunk_size:
            return
        with suppress(FloatingPointError), self.accelerator.autocast():
            readings = probe_memories(model, ids, None if state is None else state.select([0]))
            self._seen["memory"] = [asdict(reading) for reading in readings]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The loss of a micro-batch, with carried state read from where its streams stopped."""
        self._inputs = inputs
        if self.carried is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        per_step = self.args.gradient_accumulation_steps
        if self._micro_batch is None:
            self._micro_batch = self.state.global_step * per_step
        if self._micro_batch % per_step == 0:
            self.carried.settle()
        fresh = inputs.pop("fresh").tolist()
        inputs["state"] = self.carried.before(self._micro_batch, fresh)
        loss, output = cast(tuple[Tensor, Any], super().compute_loss(model, inputs, True, num_items_in_batch))
        self.carried.after(self._micro_batch, output.state)
        self._micro_batch += 1
        return (loss, output) if return_outputs else loss

    def _save_rng_state(self, output_dir: str) -> None:
        """Of every process, as transformers does; the carried states lie beside it."""
        super()._save_rng_state(output_dir)
        if self.carried is not None:
            self.carried.settle()
            self.carried.save(output_dir, self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.carried is not None and checkpoint is not None:
            model = cast(TitansForCausalLM, self.network).model
            read = self.state.global_step * self.args.gradient_accumulation_steps
            self.carried.load(checkpoint, self.args.process_index, self.args.world_size, read, model)

    def _all_finite(self, value: torch.Tensor) -> bool:
        """Whether the value is finite on every process, so that all of them stop together."""
        finite = torch.isfinite(value).reshape(1)
        if self.args.world_size > 1:
            finite = cast(torch.Tensor, self.accelerator.gather(finite))
        return bool(finite.all())

    def _stop(self, problem: str, tensor: str | None = None) -> NoReturn:
        """Save the weights as they are, untouched since the last good step, and raise.

        Raises:
            NonFiniteError: always.
        """
        if self.carried is not None:
            self.carried.drop()
        message = f"step {self.state.global_step + 1}: {problem}"
        if tensor is not None:
            message += f"; first bad tensor: {tensor}"
        broken = [name for name, p in self.network.named_parameters() if not torch.isfinite(p).all()]
        found = last_checkpoint(self.settings.output_dir)
        if broken:
            message += f"; the weights are already bad, {broken[0]} first"
        elif found is None or found[1] != self.state.global_step:
            self._save_checkpoint(self.network, trial=None)
            found = last_checkpoint(self.settings.output_dir)
        good = "none" if found is None else str(found[0])
        raise NonFiniteError(f"{message}; last good checkpoint: {good}")


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the shifted cross entropies in nats and number of targets of each row, ``[B]`` both.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, the input ids or -100.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return losses.sum(1), (targets != -100).sum(1)


PARTS = {"gates": "memory gates", "memory": "memory", "attention": "attention", "ffn": "feed-forward"}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the outer gradient by part of the model: embedding, each of ``PARTS``, and the rest."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            words = name.split(".")
            part = next((told for word, told in PARTS.items() if word in words), "rest")
            found.setdefault("embedding" if "embedding" in words else part, []).append(parameter.grad)
    return {part: torch.nn.utils.get_total_norm(gradients).item() for part, gradients in found.items()}


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter, in the model's order, whose gradient has a non-finite entry."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return "none alone, the norm over all gradients overflows"


def first_bad_activation(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Run the batch once more and name the first parameter or module output that is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    seen: list[str] = []
    # What went bad may make a memory diverge, which ends the forward pass: the first bad tensor has been seen by then.
    with _watch(model, seen), torch.no_grad(), suppress(FloatingPointError):
        model(**inputs)
    return f"output of {seen[0]}" if seen else "the loss itself"


@contextmanager
def _watch(model: nn.Module, seen: list[str]) -> Iterator[None]:
    """While open, collect the names of modules in the order in which they return something non-finite."""

    def hook(name: str):
        def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if any(not torch.isfinite(tensor).all() for tensor in _tensors(output)):
                seen.append(name)

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a module's output, whatever tuples or mappings they lie in."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
