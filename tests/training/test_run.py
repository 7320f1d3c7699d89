"""A run leaves what it promises, resumes exactly, and stops well."""

import io
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runs import AtStep, losses, metrics, poison_activation, poison_gradient, poison_weight, quiet
from titans.data import TokenDocuments, WindowDataset, evaluation_windows, load_documents, load_tokenizer
from titans.evaluation import TaskRows
from titans.models import load_model
from titans.training import checkpoints
from titans.training.config import ConfigError
from titans.training.data import load_data
from titans.training.finite import NonFiniteError
from titans.training.run import train


def test_a_run_leaves_model_metrics_curve_and_checkpoints(make_config, capfd):
    config = make_config("run", "training.eval_every=4", "training.probe_every=2")
    output = io.StringIO()
    result = train(config, console=Console(file=output))
    folder = Path(config.training.output_dir)

    assert capfd.readouterr() == ("", "")
    assert "step 8/8" in output.getvalue() and "bits per byte" in output.getvalue()
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-6", "checkpoint-8", "config.yaml", "curve.png", "memory.png", "metrics.jsonl", "model",
    ]  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    steps = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert [line["step"] for line in steps if "memory" in line] == [2, 4, 6, 8]
    assert set(steps[1]["gradient_norms"]) == {
        "embedding",
        "attention",
        "memory",
        "memory gates",
        "feed-forward",
        "rest",
    }
    # Squares add up to that of the whole, before clipping.
    whole = math.hypot(*steps[1]["gradient_norms"].values())
    assert whole == pytest.approx(steps[1]["grad_norm"], rel=1e-4)
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert result.step == 8 and result.signal is None


def test_evaluation_is_the_mean_loss_and_in_bits_per_byte(corpus, whole):
    model = load_model(whole / "model")
    documents = TokenDocuments.from_texts(load_documents(corpus, "validation"), load_tokenizer("bytes"))
    windows = evaluation_windows(documents, length=24, n=200 // 24)
    ids = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
    last = metrics(whole)[-1]
    assert last["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert last["eval_bpb"] == pytest.approx(last["eval_loss"] / math.log(2))


def test_resumed_after_a_signal_it_is_the_uninterrupted_run(make_config, whole):
    parts = make_config("parts")
    stopped = train(parts, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))])
    assert (stopped.step, stopped.signal, stopped.model_dir) == (5, signal.SIGTERM, None)
    train(parts, resume=True, console=quiet())

    assert losses(parts.training.output_dir) == losses(whole)
    weights = [load_model(Path(folder) / "model").state_dict() for folder in (whole, parts.training.output_dir)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_of_other_semantics_is_not_resumed(make_config):
    config = make_config("old")
    train(config, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))])
    folder = Path(config.training.output_dir)
    file, before = folder / "checkpoint-5" / "config.json", losses(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"semantics": "2"}))
    stamp = checkpoints.read_manifest(file.parent, 5)["stamp"]
    checkpoints.finish(file.parent, 5, checkpoints.Stamp(**stamp), keep=2)
    with pytest.raises(ConfigError, match="made for semantics 2"):
        train(config, resume=True, console=quiet())
    assert losses(folder) == before


def test_accumulated_batches_resume_and_are_the_mean_of_a_large_batch(make_config, whole):
    config = make_config("run", "training.batch_size=1", "training.gradient_accumulation=2")
    train(config, console=quiet(), callbacks=[AtStep(5, lambda model: signal.raise_signal(signal.SIGINT))])
    train(config, resume=True, console=quiet())
    for mine, reference in zip(metrics(config.training.output_dir), metrics(whole), strict=True):
        assert {name: value for name, value in mine.items() if name != "tokens_per_s"} == pytest.approx(
            {name: value for name, value in reference.items() if name != "tokens_per_s"}, rel=1e-3
        )


def test_resume_goes_back_to_the_last_whole_checkpoint(make_config, whole):
    crashed = make_config("crashed")

    def crash(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(crashed, console=quiet(), callbacks=[AtStep(8, crash)])
    folder = Path(crashed.training.output_dir)
    (folder / "checkpoint-6" / "trainer_state.json").write_text('{"global_')  # cut off while being written
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(crashed, resume=True, console=quiet())
    assert losses(folder) == losses(whole)


def test_a_run_killed_before_its_model_was_written_is_finished_by_resume(make_config, whole):
    config = make_config("killed")
    train(config, console=quiet())
    folder = Path(config.training.output_dir)
    shutil.rmtree(folder / "model")
    result = train(config, resume=True, console=quiet())
    assert result.step == 8 and result.model_dir == folder / "model"
    weights = [load_model(run / "model").state_dict() for run in (whole, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(folder) == losses(whole)


def test_a_folder_with_a_run_is_not_overwritten(make_config, tmp_path):
    config = make_config("run", "training.steps=2")
    train(config, console=quiet())
    with pytest.raises(ConfigError, match=r"already holds a run; go on with --resume"):
        train(config, console=quiet())
    with pytest.raises(ConfigError, match=r"training\.steps: the run in .* already reached step 2"):
        train(config, resume=True, console=quiet())
    longer = make_config("run", "training.steps=4", "training.batch_size=1")
    with pytest.raises(ConfigError, match=r"training\.batch_size: the run was started with 2, .* with 1"):
        train(longer, resume=True, console=quiet())
    with pytest.raises(ConfigError, match=r"holds no complete checkpoint"):
        train(make_config("empty"), resume=True, console=quiet())
    assert not (tmp_path / "empty").exists()


def test_a_run_starts_from_a_finished_model_at_another_length(make_config, corpus, whole, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(whole / "model", given)
    overrides = (f"training.init_from={given}", "data.length=48", "training.lr=1e-3")
    config = make_config("longer", *overrides)
    stop = AtStep(5, lambda model: signal.raise_signal(signal.SIGTERM))
    train(config, console=quiet(), callbacks=[stop])
    documents = TokenDocuments.from_texts(load_documents(corpus, "train"), load_tokenizer("bytes"))
    windows = WindowDataset(documents, 48, config.training.seed)
    ids = torch.stack([windows[i]["input_ids"] for i in range(2)])
    with torch.no_grad():
        expected = load_model(given)(ids, labels=ids).loss.item()
    first = metrics(config.training.output_dir)[0]
    assert first["step"] == 1 and first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["lr"] == pytest.approx(0.5e-3)  # warm-up from the beginning

    shutil.rmtree(given)  # a resumed run has its weights in the checkpoint
    result = train(config, resume=True, console=quiet())
    assert result.step == 8 and load_model(result.model_dir).config.max_seq_len == 48


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.chunk_size=4", r"the model in .* has chunk_size = 8, model\.chunk_size is 4"),
        ("training.init_from=/nowhere", r"'/nowhere' has no config\.json"),
    ],
)
def test_another_model_to_start_from_is_refused(make_config, whole, tmp_path, override, message):
    with pytest.raises(ConfigError, match=rf"training\.init_from: .*{message}"):
        train(make_config("run", f"training.init_from={whole / 'model'}", override), console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=/nowhere.txt", r"data\.source: '/nowhere\.txt'"),
        ("data.tokenizer=/nowhere.json", r"data\.tokenizer: '/nowhere\.json'"),
        ("model.vocab_size=100", r"model\.vocab_size: 100 is less than the 256 ids"),
        ("data.length=5000", r"data\.length: 5000 is more than"),
    ],
)
def test_unusable_data_is_named_and_nothing_is_written(make_config, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config("run", override), console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_gradient, r"step 6: the gradient norm is (nan|inf); first bad tensor: gradient of model\."),
        (poison_activation, r"step 6: the loss is nan; first bad tensor: output of model\."),
    ],
)
def test_a_non_finite_value_stops_after_saving_the_last_good_step(make_config, whole, poison, message):
    config = make_config()
    with pytest.raises(NonFiniteError, match=message) as error:
        train(config, console=quiet(), callbacks=[AtStep(5, poison)])
    folder = Path(config.training.output_dir)
    assert str(error.value).endswith(f"last good checkpoint: {folder / 'checkpoint-5'}")
    assert (folder / "checkpoint-5" / "trainer_state.json").exists()

    train(config, resume=True, console=quiet())
    assert losses(folder) == losses(whole)


def test_bad_weights_are_never_saved_as_the_last_good_step(make_config):
    config = make_config()
    with pytest.raises(NonFiniteError, match=r"first bad tensor: parameter .*checkpoint-3$"):
        train(config, console=quiet(), callbacks=[AtStep(5, poison_weight)])


def test_bf16_trains_with_float32_weights(make_config, whole):
    config = make_config("run", "training.precision=bf16", "training.steps=3")
    result = train(config, console=quiet())
    assert all(p.dtype == torch.float32 for p in load_model(result.model_dir).parameters())
    first, reference = metrics(config.training.output_dir)[0], metrics(whole)[0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=0.02)
    assert first["loss"] != reference["loss"]


def test_probing_changes_nothing(make_config, whole):
    config = make_config("probed", "training.probe_every=1")
    train(config, console=quiet())
    plain = [(line["loss"], line["grad_norm"]) for line in metrics(whole) if "loss" in line]
    assert [
        (line["loss"], line["grad_norm"]) for line in metrics(config.training.output_dir) if "loss" in line
    ] == plain


def test_windows_shorter_than_a_chunk_are_not_probed(make_config):
    """Nothing is written in them, so there is nothing to measure."""
    config = make_config("short", "training.probe_every=1", "model.chunk_size=32", "data.length=16")
    folder = Path(train(config, console=quiet()).model_dir).parent
    assert not (folder / "memory.png").exists()
    records = metrics(folder)
    assert not any("memory" in record for record in records) and any("gradient_norms" in record for record in records)


def test_a_picture_that_cannot_be_drawn_ends_no_run(make_config, whole, monkeypatch):
    def fail(metrics, image):
        raise OSError("no space left")

    monkeypatch.setattr("titans.training.run.plot_curve", fail)
    config, output = make_config("undrawn"), io.StringIO()
    train(config, console=Console(file=output, width=1000))
    assert "curve.png could not be drawn: no space left" in output.getvalue()
    assert losses(config.training.output_dir) == losses(whole)


def test_no_evaluation_and_no_checkpoints_between(make_config):
    config = make_config("run", "training.eval_every=0", "training.save_every=0", "training.clip=0")
    result = train(config, console=quiet())
    assert result.eval_loss is None
    assert all(line["grad_norm"] > 0 for line in metrics(config.training.output_dir)), "though nothing is clipped"
    assert [p.name for p in Path(config.training.output_dir).glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_run_on_tasks_learns_their_answers(make_config):
    """The loss is that of the answers alone; a resume on other tasks is refused."""
    pytest.importorskip("wonderwords")
    tasks = (
        "data.length=420", "data.tasks={niah_single_1: 2, babilong_qa1: 1}", "data.questions=2",
        "training.eval_tokens=1700", "training.steps=4", "training.save_every=2", "training.eval_every=4",
    )  # fmt: skip
    silent = Console(file=io.StringIO())
    config = make_config("whole", *tasks)
    result = train(config, console=silent)
    assert result.eval_bpb is not None and 4 < result.loss < 7  # nats of one of 256 bytes, untrained
    seen = load_data(config)
    assert isinstance(seen.training, TaskRows) and len(seen.training) == 8 and len(seen.validation) == 4
    assert seen.fingerprints["train"] != seen.fingerprints["validation"]
    with pytest.raises(ConfigError, match="data.tasks"):
        train(make_config("whole", *tasks, "data.tasks={niah_single_1: 1}"), resume=True, console=silent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.tasks={needle: 1}", "data.tasks: 'needle' is none of"),
        ("data.tasks={niah_single_1: 0}", "data.tasks.niah_single_1"),
        ("data.tasks={}", "data.tasks"),
        ("data.questions=0", "data.questions"),
        ("data.tasks={niah_single_1: 1}", "data.length: 24 tokens are too few, a sample takes about"),
    ],
)
def test_tasks_that_cannot_be_trained_on_are_one_line(make_config, change, message):
    if "too few" in message:
        pytest.importorskip("wonderwords")
    with pytest.raises(ConfigError, match=message):
        load_data(make_config("run", change))


def test_tasks_and_carried_state_exclude_each_other(make_config):
    with pytest.raises(ConfigError, match="training.carry_state: every row of data.tasks"):
        make_config("run", "data.tasks={niah_single_1: 1}", "training.carry_state=true")
