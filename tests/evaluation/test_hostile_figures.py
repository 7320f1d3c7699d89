"""No figure is made of what is no number, and what is asked for wrongly is named."""

import math

import pytest
import torch

from tiny import OF_BYTES
from titans import TitansConfig, build_model
from titans.data import ByteTokenizer, mqar_accuracy
from titans.evaluation import evaluate, nats_by_position
from titans.models.probe import probe_memories


@pytest.fixture(scope="module")
def model():
    return build_model(TitansConfig(**OF_BYTES)).eval()


IDS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("task", ["mqar_easy", "ppl"])
def test_a_model_of_no_numbers_has_no_score(task, tmp_path):
    broken = build_model(TitansConfig(**OF_BYTES))
    torch.nn.init.constant_(broken.norm.weight, math.nan)
    (tmp_path / "t.txt").write_text("A text of some length, which is read. " * 50)
    with pytest.raises(ValueError, match="norm.weight has entries that are not finite"):
        evaluate(broken, ByteTokenizer(), [task], [64], samples=1, text=str(tmp_path / "t.txt"))


@pytest.mark.parametrize(
    "batches, segment, named",
    [
        ([IDS, IDS[:, :6]], 5, "all have the same T, got 20 and 6"),
        (IDS, 5, r"batches must be non-empty \[B, T\], got \[20\]"),
        ([IDS[:, :0]], 5, r"batches must be non-empty \[B, T\], got \[2, 0\]"),
        ([[1, 2]], 5, "batches must be tensors"),
        ([IDS], 4.5, "segment must be an integer, got float 4.5"),
        ([IDS], True, "segment must be an integer, got bool"),
        ([IDS], 0, "segment must be at least 1"),
    ],
)
def test_losses_of_odd_batches_are_refused(model, batches, segment, named):
    with pytest.raises(ValueError, match=named):
        nats_by_position(model, batches, segment=segment)


def test_probes_and_accuracies_of_odd_shapes_are_refused(model):
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, T\], got \[20\]"):
        probe_memories(model, IDS[0])
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, T\], got list"):
        probe_memories(model, [[1]])  # type: ignore[arg-type]
    labels = torch.ones(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: must be \[B, T\] of logits \[2, 20, 4\], got \[2, 1\]"):
        mqar_accuracy(torch.zeros(2, 20, 4), labels)


def test_a_function_is_no_model_to_evaluate():
    with pytest.raises(ValueError, match="model must be a model, got function"):
        evaluate(lambda ids: ids, ByteTokenizer(), ["mqar_easy"], [64])
