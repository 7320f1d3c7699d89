"""A resumed run equals the one that never stopped, or what is wrong is named: file by file, damage by damage."""

import errno
import io
import os
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError

from runs import AtStep, losses, metrics, quiet
from titans.cli import main
from titans.training import checkpoints
from titans.training.config import ConfigError, TrainConfig
from titans.training.folder import run_folder
from titans.training.run import train

CARRIED = ("training.carry_state=true", "training.carry_turns=1")
FILES = (
    *("carried-0-0.safetensors", "config.json", "manifest.json", "model.safetensors", "optimizer.pt"),
    *("rng_state.pth", "scheduler.pt", "trainer_state.json"),
)


def stopped(config, step=5):
    train(config, console=quiet(), callbacks=[AtStep(step, lambda model: signal.raise_signal(signal.SIGTERM))])
    return Path(config.training.output_dir)


@pytest.fixture(scope="module")
def two_runs(tiny, tmp_path_factory):
    """Two runs, stopped after their checkpoints 3 and 5."""
    root = tmp_path_factory.mktemp("stopped")
    return [stopped(tiny(root / str(seed), *CARRIED, f"training.seed={seed}")) for seed in (0, 1)]


@pytest.fixture
def run(two_runs, make_config):
    """A copy of the first one, and its configuration."""
    config = make_config("run", *CARRIED)
    shutil.copytree(two_runs[0], config.training.output_dir)
    return config, Path(config.training.output_dir)


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda file, two: file.unlink(),
    "empty": lambda file, two: file.write_bytes(b""),
    "truncated": lambda file, two: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": lambda file, two: flip(file),
    "last bit": lambda file, two: flip(file, -1),
    "of another step": lambda file, two: shutil.copy(file.parents[1] / "checkpoint-3" / file.name, file),
    "of another run": lambda file, two: shutil.copy(two[1] / "checkpoint-5" / file.name, file),
    "a folder": lambda file, two: (file.unlink(), file.mkdir()),
    "a link to nowhere": lambda file, two: (file.unlink(), file.symlink_to("nowhere")),
}


def test_a_checkpoint_holds_these_files(two_runs):
    assert set(FILES) <= {p.name for p in (two_runs[0] / "checkpoint-5").iterdir()}


def test_no_file_of_a_checkpoint_may_change(run):
    config, folder = run
    for file in sorted(p for p in (folder / "checkpoint-5").rglob("*") if p.is_file()):
        content = file.read_bytes()
        flip(file)
        found = checkpoints.check_folder(config, resume=True)
        assert found is not None and found.step == 3 and str(file) in found.notes[0]
        file.write_bytes(content)
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None and found.step == 5 and found.notes == ()
    (folder / "checkpoint-5" / "more").write_text("mine")
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None and found.step == 3


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_named_and_the_checkpoint_before_taken(run, two_runs, name, damage):
    config, folder = run
    file = folder / "checkpoint-5" / name
    before = file.read_bytes()
    DAMAGES[damage](file, two_runs)
    if file.is_file() and file.read_bytes() == before:
        assert name not in ("carried-0-0.safetensors", "manifest.json", "model.safetensors", "optimizer.pt")
        return
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None and found.step == 3
    (note,) = found.notes
    assert "going on from checkpoint-3" in note
    assert str(file) in note or "another run" in note


@pytest.fixture(scope="module")
def never_stopped(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(folder, *CARRIED), console=quiet())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*(f"checkpoint-5/{name}" for name in FILES), "config.yaml", "metrics.jsonl"])
def test_resume_matrix(run, two_runs, never_stopped, tmp_path, capsys, name, damage):
    """The whole command: other losses never end with exit status 0, and what is damaged is named."""
    config, folder = run
    config.to_yaml(tmp_path / "own.yaml")
    file = folder / name
    before = file.read_bytes()
    if "/" in name or not damage.startswith("of another"):
        DAMAGES[damage](file, two_runs)
    elif damage == "of another run":
        shutil.copy(two_runs[1] / name, file)
    if file.is_file() and file.read_bytes() == before:
        pytest.skip("the same in both")
    code = main(["train", "--config", str(tmp_path / "own.yaml"), "--resume"])
    told = "".join(capsys.readouterr().err.split())  # however the terminal wraps it
    if name != "metrics.jsonl" or damage != "of another run":  # no line of it says whose it is
        named = (name, "ofanotherrun" if "/" in name else "training.seed")
        assert any(word in told for word in named), told
    if code == 0:
        found, expected = losses(folder), losses(never_stopped)
        if name == "metrics.jsonl":  # lost lines stay lost, and are said to be
            found, expected = found[-3:], expected[-3:]
        assert found == expected
        weights = [place / "model" / "model.safetensors" for place in (folder, never_stopped)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    else:
        assert not (folder / "model").exists() and told.count("titans:") == 1, told


def test_a_whole_checkpoint_of_another_run_is_passed_over(run, two_runs):
    config, folder = run
    shutil.copytree(two_runs[1] / "checkpoint-5", folder / "checkpoint-7")
    (folder / "checkpoint-5").rename(folder / "checkpoint-6")
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None and found.step == 3 and len(found.notes) == 2
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "checkpoint-7")
    shutil.copytree(two_runs[1] / "checkpoint-5", folder / "checkpoint-5")
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None and found.step == 3 and "of another run" in found.notes[0]
    train(config, resume=True, console=quiet())
    aside = [p for p in folder.iterdir() if p.name.startswith("checkpoint-5.")]
    assert not aside  # step 5 was no checkpoint this time: nothing had to move
    assert (folder / "model").exists()


def test_with_every_checkpoint_damaged_all_are_named(run):
    config, folder = run
    (folder / "checkpoint-5" / "optimizer.pt").unlink()
    flip(folder / "checkpoint-3" / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"checkpoint-5/optimizer\.pt is missing.*checkpoint-3/model\.safetensors is da"
    ):
        train(config, resume=True, console=quiet())


@pytest.mark.parametrize(("name", "damage"), [("optimizer.pt", "missing"), ("manifest.json", "truncated")])
def test_losses_after_a_damaged_checkpoint_are_those_of_the_run_that_never_stopped(run, make_config, name, damage):
    config, folder = run
    whole = make_config("whole", *CARRIED)
    train(whole, console=quiet())
    DAMAGES[damage](folder / "checkpoint-5" / name, [])
    output = io.StringIO()
    train(config, resume=True, console=Console(file=output))
    assert "going on from checkpoint-3" in output.getvalue()
    assert losses(folder) == losses(whole.training.output_dir)


def test_a_changed_corpus_and_another_number_of_processes_are_refused(make_config, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text())
    config = make_config("run", f"data.source={text}")
    folder = stopped(config)
    text.write_text(corpus.read_text().replace("forgets", "regrets", 1))
    with pytest.raises(ConfigError, match=r"data\.source: its train split has changed"):
        train(config, resume=True, console=quiet())
    found = checkpoints.check_folder(config, resume=True)
    assert found is not None
    other = checkpoints.Stamp(found.stamp.run, 2, found.stamp.corpus)
    with pytest.raises(ConfigError, match="started with 1 processes, .* cannot be resumed with 2"):
        checkpoints.check_stamp(found, other)
    text.write_text(corpus.read_text())
    train(config, resume=True, console=quiet())
    assert losses(folder)[-1][0][1] > 0


def test_settings_that_were_edited_in_the_runs_own_file_are_refused(run, tmp_path):
    config, folder = run
    file = folder / "config.yaml"
    before = file.read_text()
    file.write_text(before.replace("batch_size: 2", "batch_size: 4"))
    here = [f"training.output_dir={folder}"]
    edited = TrainConfig.load(file, here)
    assert edited.training.batch_size == 4
    with pytest.raises(ConfigError, match=r"config\.yaml was edited after the run wrote it"):
        checkpoints.check_folder(edited, resume=True)
    file.write_text(before)
    own = tmp_path / "own.yaml"
    own.write_text(before)
    found = checkpoints.check_folder(TrainConfig.load(own, here), resume=True)
    assert found is not None and found.step == 5


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[]", b"5", b'{"loss": 1.0}', b'{"step": "x"}', b"[" * 9999])
def test_a_bad_line_of_the_metrics_costs_that_line_alone(run, line):
    config, folder = run
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[1:2] = [line]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    lost = checkpoints.truncate_metrics(folder / "metrics.jsonl", 5)
    assert lost is not None and "1 steps up to 5" in lost
    assert [record["step"] for record in metrics(folder)] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "curve.png", "memory.png", "model", "checkpoint-3/manifest.json"]
    + ["checkpoint-2/thesis.tex"],
)
def test_a_file_of_somebody_else_is_never_replaced(make_config, name):
    config = make_config()
    file = Path(config.training.output_dir) / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"training\.output_dir: "):
        train(config, console=quiet())
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "curve.png", "memory.png"])
def test_a_folder_where_a_file_belongs_is_refused_first(make_config, run, name):
    config, folder = run
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    for resume, chosen in ((True, config), (False, make_config("fresh"))):
        (Path(chosen.training.output_dir) / name).mkdir(parents=True, exist_ok=True)
        with pytest.raises(ConfigError, match=f"{name} is not a file"):
            train(chosen, resume=resume, console=quiet())


@pytest.mark.parametrize("kind", ["file", "below a file", "long name", "dangling link", "proc"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(make_config, tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    place = {
        "file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "long name": tmp_path / ("x" * 300),
        "dangling link": tmp_path / "link", "proc": Path("/proc/run"),
    }[kind]  # fmt: skip
    config = make_config("run", "data.source=/nowhere")
    config.training.output_dir = str(place)
    with pytest.raises(ConfigError, match=r"training\.output_dir: "):
        train(config, console=quiet())
    assert not (tmp_path / "nowhere").exists()


def test_two_runs_never_share_a_folder(make_config):
    config = make_config()
    with run_folder(config.training.output_dir), pytest.raises(ConfigError, match="another run is at work in"):
        train(config, console=quiet())
    assert not Path(config.training.output_dir).exists()


def test_a_run_cut_short_before_its_first_checkpoint_may_start_again(make_config, whole):
    config = make_config()
    with pytest.raises(ZeroDivisionError):
        train(config, console=quiet(), callbacks=[AtStep(2, lambda model: 1 / 0)])
    assert [p.name for p in Path(config.training.output_dir).iterdir() if "checkpoint" in p.name] == []
    train(config, console=quiet())
    assert losses(config.training.output_dir) == losses(whole)


def test_a_runs_output_is_never_its_input(make_config, corpus, tmp_path):
    shutil.copy(corpus, tmp_path / "text.txt")
    config = make_config("runs/a", f"data.source={tmp_path}")
    stopped(config)
    train(config, resume=True, console=quiet())
    train(make_config("runs/b", f"data.source={tmp_path}"), console=quiet())
    assert losses(tmp_path / "runs/a") == losses(tmp_path / "runs/b")


def test_a_model_of_another_run_that_is_there_stays_until_the_new_one_is_whole(make_config, monkeypatch):
    config = make_config("run", "training.steps=2")
    model = train(config, console=quiet()).model_dir
    (model / "notes.txt").write_text("mine")
    before = (model / "model.safetensors").read_bytes()
    longer = make_config("run", "training.steps=4")
    replace = os.replace

    def fail(source, target):
        if Path(target) == model and Path(source).name == "model":
            raise OSError(errno.EIO, "Input/output error", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        train(longer, resume=True, console=quiet())
    assert (model / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    train(longer, resume=True, console=quiet())
    assert (model / "model.safetensors").read_bytes() != before and (model / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_named_in_one_line(make_config, monkeypatch, error, tmp_path, capsys):
    def full(self, folder):
        Path(folder).mkdir(exist_ok=True)
        if self.state.global_step > 3:
            raise error

    config = make_config("run")
    path = tmp_path / "run.yaml"
    config.to_yaml(path)
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    assert main(["train", "--config", str(path)]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("titans: ") and "checkpoint-6 could not be written" in shown
    monkeypatch.undo()
    assert main(["train", "--config", str(path), "--resume"]) == 0


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = write = write


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "gone")])
def test_a_display_that_breaks_ends_no_run(make_config, whole, error):
    config = make_config()
    train(config, console=Console(file=Failing(error), force_terminal=True))
    assert losses(config.training.output_dir) == losses(whole)


@pytest.mark.usefixtures("not_under_nohup")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_stop_a_run_after_a_checkpoint(make_config, whole, number):
    config = make_config()
    result = train(config, console=quiet(), callbacks=[AtStep(4, lambda model: signal.raise_signal(number))])
    assert result.signal == number and (Path(config.training.output_dir) / "checkpoint-4" / "manifest.json").exists()
    train(config, resume=True, console=quiet())
    assert losses(config.training.output_dir) == losses(whole)


@pytest.mark.usefixtures("not_under_nohup")
def test_under_nohup_a_hang_up_stops_nothing(make_config):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    result = train(make_config(), console=quiet(), callbacks=[AtStep(4, lambda _: signal.raise_signal(signal.SIGHUP))])
    assert result.signal is None and result.step == 8


def test_auto_without_an_accelerator_is_the_cpu(make_config, monkeypatch):
    import torch

    from titans.training.run import trainer_arguments

    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args: False)
    settings = make_config("run", "training.device=auto", "training.precision=bf16").training
    assert trainer_arguments(settings).use_cpu


def test_checkpoints_have_the_permissions_of_the_umask_and_no_pickled_arguments(two_runs):
    for file in (two_runs[0] / "checkpoint-5").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
        assert file.name != "training_args.bin"


def _umask():
    os.umask(mask := os.umask(0))
    return mask
