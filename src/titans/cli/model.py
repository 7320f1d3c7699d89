"""What the commands that use a saved model have in common: opening it, its tokenizer and a memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from titans.cli.errors import BadInput, checking_input

QUESTION_FILE = "question.txt"
TEMPLATE_HELP = (
    "What is read for a question, {} in its place; default: what question.txt beside the model says, else \\n{}."
)

if TYPE_CHECKING:
    import torch

    from titans.data import Tokenizer
    from titans.models import ModelState, TitansModel


def open_model(folder: Path, device: str | None = None) -> tuple[TitansModel, Tokenizer]:
    """The model of a folder, in evaluation mode, and its tokenizer.

    Args:
        folder: as `titans.load_model` reads it.
        device: such as cpu or cuda; None leaves the model on the CPU.

    Raises:
        BadInput: the folder or the device cannot be used.
    """
    with checking_input(f"--model {folder}"):
        from titans.models import load_model
        from titans.training.data import load_saved_tokenizer

        model, tokenizer = load_model(folder).eval(), load_saved_tokenizer(folder)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} ids, the model knows {model.config.vocab_size}")
    if device is not None:
        model.to(place_of(device))
    return model, tokenizer


def place_of(device: str) -> torch.device:
    """The device that an option names.

    Raises:
        BadInput: it is not there, or holds no numbers.
    """
    import torch

    if not device:
        raise BadInput("--device: is empty; name one such as cpu or cuda")
    if device.partition(":")[0] == "meta":
        raise BadInput(f"--device: {device} holds no numbers")
    if device.startswith("cpu:") and device != "cpu:0":  # torch takes any index of it
        raise BadInput(f"--device: {device} is not there, the CPU is one device: cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device: {device}: {str(error).partition('. ')[0]}") from error  # torch then lists all it has


def open_memory(file: Path | None, model: TitansModel) -> ModelState | None:
    """What a memory file remembers; None for no file.

    Raises:
        BadInput: it cannot be used with this model.
    """
    with checking_input(f"--memory {file}"):
        from titans.models import load_memory

        return None if file is None else load_memory(file, model)


def question_template(folder: Path, given: str | None) -> str:
    """What is read for a question, ``{}`` in its place: as given, as the model's folder says, or a line of it."""
    if given is not None:
        if "{}" not in given:
            raise BadInput(f"--template: needs {{}} where the question goes, got {given!r}")
        return given.replace("\\n", "\n").replace("\\t", "\t")
    file = folder / QUESTION_FILE
    if not file.is_file():
        return "\n{}"
    with checking_input():
        told = file.read_text(encoding="utf-8")
    if "{}" not in told:
        raise BadInput(f"{file}: needs {{}} where the question goes, got {told!r}")
    return told
