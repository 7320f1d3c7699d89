"""A training run from its configuration: data, model, Trainer, and what is left in the output folder."""

import math
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from titans.data import EvaluationWindows, StreamDataset, WindowDataset
from titans.evaluation import TaskRows
from titans.files import write_whole
from titans.hf import TitansForCausalLM, TitansHFConfig
from titans.models import TitansModel, load_model
from titans.models.config import FREE
from titans.training import checkpoints
from titans.training.callbacks import Display, Metrics, Pictures, StopOnSignal
from titans.training.config import ConfigError, TrainConfig, TrainingSection
from titans.training.data import EvaluationStreams, RunData, auto_tokenizer, collate, load_data, save_tokenizer
from titans.training.folder import run_folder
from titans.training.plots import plot_curve, plot_memory
from titans.training.trainer import TitansTrainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        step: optimizer steps done, those before a resume included.
        loss: training loss of the last step in nats per token.
        eval_loss: validation loss of the last evaluation, None without one.
        eval_bpb: the same in bits per byte.
        model_dir: the final model, None when a signal stopped the run.
        signal: number of that signal, None when the run reached its end.
    """

    step: int
    loss: float
    eval_loss: float | None
    eval_bpb: float | None
    model_dir: Path | None
    signal: int | None


def train(
    config: TrainConfig,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train a model and leave checkpoints, metrics.jsonl, pictures, config.yaml and the final model in output_dir.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint in output_dir, exactly as if there had been no break.
        console: where progress is shown; standard error by default.
        callbacks: further Trainer callbacks.

    Returns:
        The end of the run; its ``signal`` is set when SIGINT or SIGTERM stopped it after a checkpoint.

    Raises:
        ConfigError: unusable data, nothing whole to resume, a run in the way or at work in the folder, settings that
            do not fit the run to resume, or a model in ``training.init_from`` that is not the configured one.
        NonFiniteError: the loss or a gradient was not finite; the last good step is saved.
        CheckpointError: a checkpoint could not be written.
    """
    config.check()
    output = config.training.output_dir
    if os.path.isdir(output) and os.path.realpath(output) == os.path.realpath(config.data.source):
        raise ConfigError(f"training.output_dir: {output} is what data.source reads; take a folder in it, or another")
    with run_folder(output):
        return _train(config, resume, Console(stderr=True) if console is None else console, callbacks)


def _train(config: TrainConfig, resume: bool, console: Console, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    """`train` in a folder that is ours alone."""
    found = checkpoints.check_folder(config, resume)
    initial = None
    if found is not None:
        _check_weights(found.folder)
    elif config.training.init_from is not None:
        initial = _initial_model(config)
    data = load_data(config)
    output_dir = Path(config.training.output_dir)
    stop = StopOnSignal()
    with _surroundings(config.training.threads), stop:
        trainer, metrics, display = _assemble(config, data, console, [*callbacks, stop])
        run = secrets.token_hex(8) if found is None else found.stamp.run
        trainer.stamp = checkpoints.Stamp(run, trainer.args.world_size, data.fingerprints)
        if found is not None:
            checkpoints.check_stamp(found, trainer.stamp)
        if initial is not None:
            trainer.network.model.load_state_dict(initial.state_dict())
        if trainer.is_world_process_zero():
            checkpoints.write_config(config, run)
            lost = checkpoints.truncate_metrics(metrics.path, found.step if found else -1)
            for note in (*(found.notes if found else ()), *([lost] if lost else ())):
                display.say(note)
        try:
            trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
        finally:
            display.close()
        finished = trainer.state.global_step >= config.training.steps
        if finished and trainer.is_world_process_zero():
            write_whole(output_dir / checkpoints.MODEL_DIR, lambda folder: _save(trainer, data, folder))
    return TrainResult(
        step=trainer.state.global_step,
        loss=metrics.last.get("loss", math.nan),
        eval_loss=metrics.last.get("eval_loss"),
        eval_bpb=metrics.last.get("eval_bpb"),
        model_dir=output_dir / checkpoints.MODEL_DIR if finished else None,
        signal=None if finished else stop.received,
    )


def _check_weights(checkpoint: Path) -> None:
    """transformers would go on without tensors that are missing, or trained under other semantics, after a warning."""
    try:
        load_model(checkpoint)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"training.output_dir: {error}") from error


def _initial_model(config: TrainConfig) -> TitansModel:
    """The finished model that the run starts from.

    Raises:
        ConfigError: there is none in the folder, or it is another model than the run's.
    """
    folder = config.training.init_from or ""
    try:
        model = load_model(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"training.init_from: {error}") from error
    theirs = model.config.to_dict()
    for field, value in config.model.to_dict().items():
        if theirs[field] != value and field not in FREE:
            raise ConfigError(
                f"training.init_from: the model in {folder} has {field} = {theirs[field]!r}, model.{field} is {value!r}"
            )
    return model


def _assemble(
    config: TrainConfig, data: RunData, console: Console, callbacks: list[TrainerCallback]
) -> tuple[TitansTrainer, Metrics, Display]:
    """The model from its seed, and the Trainer with its callbacks around it."""
    settings = config.training
    arguments = trainer_arguments(settings)
    folder = Path(settings.output_dir)
    metrics = Metrics(folder / checkpoints.METRICS_FILE, settings.windows_per_step * config.data.length)
    display = Display(console, metrics, settings.log_every)
    drawn = {checkpoints.CURVE_FILE: plot_curve}
    writes = config.model.has_memory and config.data.length >= config.model.chunk_size
    if settings.probe_every and writes:
        drawn[checkpoints.MEMORY_FILE] = plot_memory
    pictures = Pictures(console, metrics.path, {folder / name: draw for name, draw in drawn.items()})
    set_seed(settings.seed)
    end = data.tokenizer.separator_id
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = TitansForCausalLM(TitansHFConfig(config.model, **ends))
    try:
        model.model.set_engine(settings.engine)
    except ValueError as error:
        raise ConfigError(f"training.engine: {error}") from error
    evaluation = data.validation
    if isinstance(evaluation, EvaluationWindows) and settings.carry_state:
        evaluation = EvaluationStreams(
            evaluation.documents, config.data.length, settings.batch_size, config.eval_windows
        )
    trainer = TitansTrainer(
        settings,
        model=model,
        args=arguments,
        processing_class=auto_tokenizer(data.tokenizer),
        data_collator=collate,
        train_dataset=_windows(config, data),
        eval_dataset=evaluation,
        callbacks=[metrics, pictures, display, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, metrics, display


def _windows(config: TrainConfig, data: RunData) -> WindowDataset | TaskRows:
    """All windows of the run."""
    if isinstance(data.training, TaskRows):
        return data.training
    settings, length = config.training, config.data.length
    total = settings.steps * settings.windows_per_step
    if not settings.carry_state:
        return WindowDataset(data.training, length, settings.seed, total)
    streams = settings.carry_turns * settings.batch_size
    return StreamDataset(data.training, length, streams, settings.carry_fresh, settings.seed, total)


def trainer_arguments(settings: TrainingSection) -> TrainingArguments:
    """Our settings in transformers' words, everything that prints or reports on its own switched off.

    Raises:
        ConfigError: the batch cannot be shared out, or the environment's words for several processes do not fit.
    """
    try:
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        if settings.batch_size % processes:
            raise ConfigError(
                f"training.batch_size: must be a multiple of the {processes} processes, got {settings.batch_size}"
            )
        arguments = _arguments(settings, settings.batch_size // processes)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a process, a device: with several it would split batches again
    except ConfigError:
        raise
    except ValueError as error:  # LOCAL_RANK without MASTER_ADDR, say
        raise ConfigError(f"training: cannot start here: {error}") from error
    return arguments


def _arguments(settings: TrainingSection, rows: int) -> TrainingArguments:
    on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=settings.output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.lr,
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bf16",
        use_cpu=on_cpu,  # without an accelerator "auto" is the CPU in every respect
        save_strategy="steps",
        save_steps=settings.save_every or settings.steps,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every or None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        dataloader_pin_memory=not on_cpu and torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )


def _save(trainer: TitansTrainer, data: RunData, folder: Path) -> None:
    """The trained model and its tokenizer."""
    trainer.network.save_pretrained(folder)
    save_tokenizer(data.tokenizer, folder)


@contextmanager
def _surroundings(threads: int | None) -> Iterator[None]:
    """For the time of a run: ``threads`` CPU threads for torch, no bars of transformers for reading and writing
    weights, no hint of torch that bf16 brings."""
    bars, before = transformers_logging.is_progress_bar_enabled(), torch.get_num_threads()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(before if threads is None else threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        torch.set_num_threads(before)
        if bars:
            transformers_logging.enable_progress_bar()
