"""Every experiment that the command knows by name: its arms build, are of equal size where that is claimed, it runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from experiments import EXPERIMENTS
from experiments.comparisons import expansion
from experiments.framework import SCALES, plan, run
from experiments.framework.recall import RecallTask, answers, score_recall, train_recall
from experiments.framework.scales import match_parameters, parameters
from experiments.framework.text import bits_by_position
from titans.data import load_documents
from titans.miras import MLP
from titans.models import TitansConfig, build_model, count_parameters, load_model

NAMES = {"miras-variants", "memory-depth", "ablation", "train-enwik8", "train-wikitext", "eval-perplexity"}
BY_LENGTH = {"babilong", "scaling-analysis"}  # test_lengths.py
ON_DEFAULT_CORPUS = sorted(NAMES - {"train-enwik8", "train-wikitext"})
REAL_SCALES = dict(SCALES)


def first_arms(experiment, count):
    """The experiment with its first arms only."""

    def arms(*given, **inputs):
        return dict(list(experiment.arms(*given, **inputs).items())[:count])

    return replace(experiment, arms=arms)


def models_of(arm):
    """All model configurations in the settings of an arm."""
    tasks = [getattr(arm, name, None) for name in ("text", "recall", "run")]
    return [task.model for task in tasks if task is not None]


def test_the_list_is_complete():
    assert set(EXPERIMENTS) == NAMES | BY_LENGTH
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert 20 < len(experiment.purpose) < 120
        assert set(experiment.inputs) <= {"data", "model", "max_context"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ON_DEFAULT_CORPUS)
def test_arms_of_every_scale_are_valid(name, scale, monkeypatch):
    monkeypatch.setattr("experiments.framework.scales.validation_streams", lambda *a: None)
    monkeypatch.setitem(SCALES, "tiny", REAL_SCALES["tiny"])
    arms = EXPERIMENTS[name].arms(scale)
    texts = {arm: parameters(models_of(settings)[0]) for arm, settings in arms.items()}
    recalls = {arm: parameters(models_of(s)[1]) for arm, s in arms.items() if len(models_of(s)) > 1}
    if name in ("miras-variants", "memory-depth"):
        for sizes in (texts, recalls):
            assert max(sizes.values()) <= 1.03 * min(sizes.values()), sizes
            assert len(sizes) == len(arms)


def test_the_published_ones_compare_equal_sizes(enwik8, wikitext, monkeypatch):
    monkeypatch.setattr("experiments.framework.scales.validation_streams", lambda *a: None)
    monkeypatch.setitem(SCALES, "tiny", REAL_SCALES["tiny"])
    for name, data in (("train-enwik8", enwik8), ("train-wikitext", wikitext)):
        sizes = [parameters(arm.text.model) for arm in EXPERIMENTS[name].arms("tiny", data=data).values()]
        assert len(sizes) == 3 and max(sizes) <= 1.03 * min(sizes)


def test_parameters_are_those_of_the_built_model():
    small = TitansConfig(variant="swa", vocab_size=50, d_model=32, n_layers=2)
    large = TitansConfig(variant="MAC", vocab_size=50, d_model=32, n_layers=2, chunk_size=8)
    assert parameters(large) == count_parameters(build_model(large))
    fitted = match_parameters(small, parameters(large))
    assert abs(count_parameters(build_model(fitted)) - parameters(large)) <= 12 * 32 * 2
    assert fitted.model_copy(update={"ffn_mult": small.ffn_mult}) == small
    with pytest.raises(ValueError, match="are more than"):
        match_parameters(large, 10_000)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_deeper_memories_have_equally_many_weights(depth):
    shapes = MLP(depth=depth, expansion=expansion(depth, 4)).shapes(100)
    assert sum(math.prod(shape) for shape in shapes) == pytest.approx(8 * 100**2, rel=0.01)


@pytest.mark.parametrize("name", ON_DEFAULT_CORPUS)
def test_every_arm_can_be_trained(name, corpus):
    for settings in EXPERIMENTS[name].arms("tiny", data=corpus).values():
        for config in models_of(settings):
            model = build_model(config)
            ids = torch.randint(config.vocab_size, (2, 20))
            model(ids, labels=ids).loss.backward()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["miras-variants", "eval-perplexity"])
def test_it_runs_to_a_table_and_a_picture(name, corpus, console, tmp_path):
    experiment = first_arms(EXPERIMENTS[name], 2)
    report = run(plan(experiment, "tiny", [0], tmp_path / "out", {"data": corpus}), console)
    assert not report.failures
    assert len(report.summary) == 2
    for figures in report.summary.values():
        assert all(math.isfinite(spread.median) for spread in figures.values())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    command = f"titans experiment {name} --scale tiny --seeds 0 --output {tmp_path}/out --data {corpus}"
    assert results["command"] == command
    assert results["made_with"]["torch"] and len(results["units"]) == len(report.summary)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(arm in table for arm in report.summary) and EXPERIMENTS[name].note in table
    assert imread(tmp_path / "out" / "figure.png").shape[1] > 400


def test_a_record_keeps_the_losses_of_all_steps(corpus, console, tmp_path):
    experiment = first_arms(EXPERIMENTS["miras-variants"], 1)
    record = run(plan(experiment, "tiny", [0], tmp_path / "out", {"data": corpus}), console).records[0]
    assert len(record["raw"]["losses"]) == len(record["raw"]["gradient_norms"]) == 3
    assert len(record["raw"]["mqar"]["losses"]) == 2
    assert record["settings"]["text"]["model"]["theta_max"] and record["settings"]["recall"]["model"]["theta_max"]


def test_enwik8_from_a_local_file(enwik8, console, tmp_path):
    for number, data in enumerate((enwik8, enwik8.parent)):
        experiment = first_arms(EXPERIMENTS["train-enwik8"], 1)
        work = plan(experiment, "tiny", [0], tmp_path / f"out{number}", {"data": data})
    figures = run(work, console).summary["MAC"]
    assert 4 < figures["bits_per_byte@32"].median < 12


def test_word_perplexity_is_total_nats_over_words(wikitext, console, tmp_path):
    experiment = EXPERIMENTS["train-wikitext"]
    report = run(plan(first_arms(experiment, 1), "tiny", [0], tmp_path / "out", {"data": wikitext}), console)
    text = (wikitext / "wiki.valid.raw").read_text()
    articles = load_documents("wikitext-103", "validation", data_dir=wikitext.parent)
    n_bytes = sum(len(article.encode()) + 1 for article in articles)  # a separator ends each
    # The two bytes before the first heading are no article.
    n_words = len(text.split()) + text.removeprefix(" \n").count("\n")
    for figures in report.summary.values():
        nats = figures["bits_per_byte@64"].median * math.log(2) * n_bytes
        assert figures["word_perplexity@64"].median == pytest.approx(math.exp(nats / n_words))


@pytest.mark.parametrize("name", ["train-enwik8", "train-wikitext"])
def test_a_missing_corpus_says_what_to_fetch(name, no_network, tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch .* and put it at .*cache"):
        plan(EXPERIMENTS[name], "tiny", [0], tmp_path / "out")
    with pytest.raises(ValueError, match="--data: .* neither is nor holds"):
        plan(EXPERIMENTS[name], "tiny", [0], tmp_path / "out", {"data": tmp_path})
    assert not (tmp_path / "out").exists()


def test_a_saved_model_is_read_by_position(corpus, console, tmp_path):
    folder = tmp_path / "my model"
    build_model(TitansConfig(vocab_size=256, d_model=16, n_layers=1, chunk_size=8, n_persistent=2)).save_pretrained(
        folder
    )
    work = plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path / "out", {"model": folder, "data": corpus})
    assert [unit.arm for unit in work.units] == ["my-model"]
    figures = run(work, console).summary["my-model"]
    settings = work.units[0].settings
    curve = bits_by_position(folder, settings.data, settings.data.length, settings.windows)
    assert figures["on@0-64"].median == pytest.approx(curve.mean().item())
    assert {name.partition("@")[0] for name in figures} == {"on", "reset", "off"}
    assert figures["on@0-64"].median != figures["off@0-64"].median
    load_model(folder)  # untouched


def test_what_a_saved_model_cannot_read_is_told_before_anything_runs(corpus, tmp_path):
    experiment = EXPERIMENTS["eval-perplexity"]
    config = TitansConfig(vocab_size=100, d_model=16, n_layers=1, chunk_size=8)
    build_model(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="--model: its tokenizer has 256 ids, the model knows 100"):
        plan(experiment, "tiny", [0], tmp_path / "out", {"model": tmp_path / "small", "data": corpus})
    corpus.write_text("short. " * 100)  # 5 % of it are no stream
    with pytest.raises(ValueError, match="length: 64 is more than the longest document has"):
        plan(experiment, "tiny", [0], tmp_path / "out", {"data": corpus})


def test_buckets_meet_without_gap_or_overlap(corpus, console, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.eval_perplexity.ENDS", (8, 32, 2048))
    monkeypatch.setattr("experiments.eval_perplexity.TRAINED", ("LMM",))
    report = run(plan(EXPERIMENTS["eval-perplexity"], "tiny", [0], tmp_path / "out", {"data": corpus}), console)
    names = [name for name in report.figures if name.startswith("on@")]
    assert names == ["on@0-8", "on@8-32", "on@32-64"]
    settings = EXPERIMENTS["eval-perplexity"].arms("tiny", data=corpus)["LMM"]
    folder = tmp_path / "out" / "runs" / "LMM-seed0" / "text" / "model"
    curve = bits_by_position(folder, settings.data, settings.data.length, settings.windows)
    sums = [report.summary["LMM"][name].median * width for name, width in zip(names, (7, 24, 32), strict=True)]
    assert sum(sums) == pytest.approx(curve.sum().item())


def test_recall_training_learns_and_is_seeded():
    model = TitansConfig(variant="LMM", vocab_size=8, d_model=32, n_layers=1, chunk_size=8, n_persistent=0)
    task = RecallTask(model=model, length=8, pairs=1, steps=50, batch_size=16, lr=1e-2, lengths=(8,), samples=64)
    lines = []
    trained, told = train_recall(task, 0, lines.append)
    assert len(told["losses"]) == 50 and len(lines) == 1
    assert score_recall(trained, task, 8) > 0.5  # one of four values by chance
    again, told_again = train_recall(task.model_copy(update={"steps": 1}), 0, lines.append)
    assert told_again["losses"] == told["losses"][:1]
    assert score_recall(again, task, 8) < 0.5


@pytest.mark.parametrize("setting", [None, "zoology"])
def test_what_is_asked_costs_what_the_model_says(setting):
    torch.manual_seed(0)
    config = TitansConfig(variant="LMM", vocab_size=32, d_model=16, n_layers=1, chunk_size=8, n_persistent=2)
    task = RecallTask(model=config, length=24, pairs=3, setting=setting)
    model, batch = build_model(config), task.batch(5, 24, torch.Generator().manual_seed(1))
    logits, values = answers(model, *batch)
    assert logits.shape == (15, 32) and bool((values >= 16).all())
    own = model(batch[0], labels=batch[1]).loss
    assert torch.nn.functional.cross_entropy(logits, values).item() == pytest.approx(own.item(), rel=1e-5)
    fillers = {token for row in batch[0].tolist() for token in row[6:]}
    assert (len(fillers) > 20) == (setting == "zoology")
