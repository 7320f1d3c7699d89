"""Every file in configs/ is loaded and trained for two steps; the comparable ones have the same size."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from titans.models import build_model, count_parameters
from titans.training.config import TrainConfig
from titans.training.run import train

FILES = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))
SAME_SIZE = ("lmm", "mac", "mag", "mal", "transformer", "swa")


def test_there_is_one_for_every_variant():
    assert {path.stem for path in FILES} >= {"demo", *SAME_SIZE}
    assert {TrainConfig.load(path).model.variant for path in FILES} == {
        "LMM",
        "MAC",
        "MAG",
        "MAL",
        "transformer",
        "swa",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains_for_two_steps(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def memorise(surprise): return surprise\n" * 200)
    length = 450 if TrainConfig.load(path).data.tasks else 66  # a question takes some room
    config = TrainConfig.load(
        path,
        [
            "training.steps=2", "training.batch_size=1", "training.gradient_accumulation=1", "training.eval_tokens=1",
            "training.device=cpu", "training.threads=1", f"data.length={length}", f"data.source={text}",
            "data.tokenizer=bytes", f"training.output_dir={tmp_path / 'run'}",
        ],
    )  # fmt: skip
    result = train(config, console=Console(file=io.StringIO()))
    assert result.step == 2
    assert 0 < result.loss < 8 and 0 < result.eval_loss < 8
    assert (result.model_dir / "model.safetensors").exists()


def test_the_comparable_ones_have_the_same_size():
    sizes = [count_parameters(build_model(TrainConfig.load(path).model)) for path in FILES if path.stem in SAME_SIZE]
    assert max(sizes) <= 1.05 * min(sizes)
