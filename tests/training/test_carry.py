"""Training on carried state: the streams go on exactly, from window to window and from run to run."""

import io
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from runs import AtStep, losses, metrics, poison_activation, quiet
from titans.data import StreamDataset, TokenDocuments, load_documents, load_tokenizer
from titans.models import ModelState, load_model
from titans.training import checkpoints
from titans.training.config import ConfigError
from titans.training.finite import NonFiniteError
from titans.training.run import train

CARRIED = ("training.carry_state=true", "training.carry_turns=2", "training.carry_fresh=0.3")
VARIANTS = ("LMM", "MAC", "MAG", "MAL", "swa")


def test_fresh_starts_alone_are_training_without_carried_state(make_config, whole):
    config = make_config("fresh", "training.carry_state=true", "training.carry_fresh=1")
    train(config, console=quiet())
    assert losses(config.training.output_dir)[:-1] == losses(whole)[:-1]  # the last line is the evaluation


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_goes_on_where_the_last_one_stopped(make_config, corpus, variant):
    """With a learning rate of next to nothing every loss is that of one model reading the whole stream."""
    config = make_config("run", f"model.variant={variant}", "model.window=10", *CARRIED, "training.lr=1e-30")
    config.training.weight_decay = 0
    folder = Path(train(config, console=quiet()).model_dir)
    model = load_model(folder)
    documents = TokenDocuments.from_texts(load_documents(corpus, "train"), load_tokenizer("bytes"))
    windows = StreamDataset(documents, 24, streams=4, fresh=0.3, seed=config.training.seed, n_windows=16)
    assert 4 < sum(bool(windows[i]["fresh"]) for i in range(16)) < 12
    expected = []
    for index in range(16):
        first = index
        while not windows.place(first)[1]:
            first -= 4
        ids = torch.cat([windows[i]["input_ids"] for i in range(first, index + 1, 4)])[None]
        with torch.no_grad():
            nats = F.cross_entropy(model(ids).logits[0, -24:-1], ids[0, -23:])
        expected.append(nats.item())
    steps = [line["loss"] for line in metrics(config.training.output_dir) if "loss" in line]
    means = [(a + b) / 2 for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert steps == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [("2", "1"), ("1", "2")])
def test_a_resumed_run_takes_its_states_up(make_config, variant, batch):
    size = (f"training.batch_size={batch[0]}", f"training.gradient_accumulation={batch[1]}")
    overrides = (f"model.variant={variant}", *CARRIED, *size)
    unbroken, parts = make_config("unbroken", *overrides), make_config("parts", *overrides)
    train(unbroken, console=quiet())
    train(parts, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))])
    train(parts, resume=True, console=quiet())
    assert losses(parts.training.output_dir) == losses(unbroken.training.output_dir)


def test_a_failed_step_leaves_the_states_of_the_last_good_one(make_config):
    unbroken, broken = make_config("unbroken", *CARRIED), make_config("broken", *CARRIED)
    train(unbroken, console=quiet())
    with pytest.raises(NonFiniteError, match="step 6: the loss is nan; first bad tensor: output of"):
        train(broken, console=quiet(), callbacks=[AtStep(5, poison_activation)])
    train(broken, resume=True, console=quiet())
    assert losses(broken.training.output_dir) == losses(unbroken.training.output_dir)


def test_full_attention_cannot_carry(make_config):
    with pytest.raises(ConfigError, match="training.carry_state: full attention keeps every token it has read"):
        make_config("run", "model.variant=transformer", "training.carry_state=true")


@pytest.mark.parametrize("damage", ["missing", "cut off", "of two processes", "swapped"])
def test_a_checkpoint_without_its_states_is_passed_over_by_name(make_config, damage):
    unbroken, config = make_config("unbroken", *CARRIED), make_config("run", *CARRIED)
    train(unbroken, console=quiet())
    train(config, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))])
    folder = Path(config.training.output_dir) / "checkpoint-5"
    first, file = folder / "carried-0-0.safetensors", folder / "carried-0-1.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "swapped":
        first.rename(folder / "x")
        file.rename(first)
        (folder / "x").rename(file)
    else:
        file = shutil.copy(first, folder / "carried-1-0.safetensors")
    output = io.StringIO()
    train(config, resume=True, console=Console(file=output))
    assert str(first if damage == "swapped" else file) in output.getvalue()
    assert "going on from checkpoint-3" in output.getvalue()
    assert losses(config.training.output_dir) == losses(unbroken.training.output_dir)


class Evil:
    """A pickle that would run code where it is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("carried-0-0.safetensors", None, "checkpoint-5 holds states of 1 rows, not 2"),
        ("optimizer.pt", b"", "checkpoint-5 was tampered with and cannot be read: EOFError"),
        ("rng_state.pth", b"hello", "checkpoint-5 was tampered with and cannot be read: "),
        *(
            (name, pickle.dumps(Evil()), "checkpoint-5 was tampered with and cannot be read: UnpicklingError")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_a_forged_manifest_is_refused_in_one_line(make_config, file, content, message):
    config = make_config("run", *CARRIED)
    train(config, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))])
    folder = Path(config.training.output_dir) / "checkpoint-5"
    if content is None:
        ModelState.load(folder / file).select([0]).save(folder / file)
    else:
        (folder / file).write_bytes(content)
    stamp = checkpoints.Stamp(**checkpoints.read_manifest(folder, 5)["stamp"])
    checkpoints.finish(folder, 5, stamp, keep=2)
    with pytest.raises(ConfigError, match=message):
        train(config, resume=True, console=quiet())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_probe_reads_carried_states_of_half_precision(make_config, variant):
    config = make_config(
        "run", f"model.variant={variant}", *CARRIED, "training.precision=bf16", "training.probe_every=1"
    )
    train(config, console=quiet())
    probes = [line["memory"] for line in metrics(config.training.output_dir) if "memory" in line]
    assert [len(layers) for layers in probes] == [0 if variant == "swa" else 1] * 8
