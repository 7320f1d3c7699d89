"""Folders of others among a run's checkpoints: whatever their name, they stay."""

from pathlib import Path

from runs import quiet
from titans.training import checkpoints
from titans.training.run import train


def test_folders_that_are_no_checkpoints_of_the_run_stay(make_config):
    config = make_config("run", "training.steps=3", "training.save_every=1", "training.keep_checkpoints=1")
    folder = Path(config.training.output_dir)
    train(config, console=quiet())
    for name in ("checkpoint-1", "checkpoint-5"):  # one to be outlived, one in the way
        (folder / name).mkdir()
        (folder / name / "precious.txt").write_text("mine")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "manifest.json").write_text("{}")
    later = make_config(
        "run", "training.steps=5", "training.save_every=1", "training.keep_checkpoints=1", "training.seed=0"
    )
    train(later, resume=True, console=quiet())
    assert (folder / "checkpoint-1" / "precious.txt").read_text() == "mine"
    assert (folder / "checkpoint-2" / "manifest.json").read_text() == "{}"
    aside = list(folder.glob("checkpoint-5.*/precious.txt"))
    assert [path.read_text() for path in aside] == ["mine"]
    assert checkpoints.read_manifest(folder / "checkpoint-5", 5)["step"] == 5
    assert not (folder / "checkpoint-3").exists() and not (folder / "checkpoint-5" / "begun").exists()


def test_what_a_killed_run_left_goes(tmp_path):
    stamp = checkpoints.Stamp("ours", 1, {})

    def half(step, run="ours"):
        folder = tmp_path / f"checkpoint-{step}"
        checkpoints.begin(folder, run)
        (folder / "model.safetensors").write_text(f"half of {step}")
        return folder

    half(1, "another")
    half(2)
    checkpoints.finish(half(3), 3, stamp, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    half(4)
    checkpoints.begin(tmp_path / "checkpoint-4", "ours")
    assert [p.name for p in (tmp_path / "checkpoint-4").iterdir()] == ["begun"]
    checkpoints.begin(tmp_path / "checkpoint-1", "ours")
    assert [p.read_text() for p in tmp_path.glob("checkpoint-1.*/begun")] == ["another"]
