"""Multi-query associative recall (MQAR): train a small model on it, score it at any length."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from titans.data import mqar_batch
from titans.evaluation.mqar import zoology_batch
from titans.evaluation.task import IGNORED
from titans.models import TitansConfig, TitansModel, build_model
from titans.training import build_optimizer, get_cosine_schedule_with_warmup

SCORING_SEED = 10_000  # far from the seeds of training, so that no run has seen these samples
SCORING_TOKENS = 2**15  # read at once


class RecallTask(BaseModel):
    """An MQAR model and how it is trained and scored.

    Args:
        model: the model; its vocabulary is the task's.
        length: tokens of a training sample, ≥ 4 · pairs.
        pairs: key-value pairs in a sample.
        steps, batch_size, lr, warmup_steps: AdamW with a cosine, ``batch_size`` fresh samples a step.
        lengths: where accuracy is scored, the same pairs in longer texts.
        samples: fresh samples scored per length.
        setting: "zoology" for random fillers and gaps by a power law, as `titans.evaluation.mqar` draws them; None for
            one filler and uniform gaps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: TitansConfig
    length: int = 64
    pairs: int = 6
    steps: int = Field(default=300, ge=1)
    batch_size: int = 32
    lr: float = 4e-3
    warmup_steps: int = 30
    lengths: tuple[int, ...] = (64, 256, 1024)
    samples: int = 256
    setting: Literal["zoology"] | None = None

    def batch(self, rows: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh samples and their labels, int64 ``[rows, length]``."""
        make = mqar_batch if self.setting is None else zoology_batch
        ids, labels = make(rows, length, self.pairs, self.model.vocab_size, random)
        return ids.to(device()), labels.to(device())


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_recall(task: RecallTask, seed: int, say: Callable[[str], object]) -> tuple[TitansModel, dict[str, Any]]:
    """Train from scratch on fresh samples.

    Args:
        task: what to train.
        seed: of the initial weights and of the samples.
        say: shown a line every 50 steps.

    Returns:
        The model, and per step ``losses`` in nats per query and ``gradient_norms`` before clipping at 1.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the message names the step.
    """
    torch.manual_seed(seed)
    model = build_model(task.model).to(device())
    optimizer = build_optimizer(model, lr=task.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, task.warmup_steps, task.steps)
    random = torch.Generator().manual_seed(seed)
    losses, norms = [], []
    for step in range(1, task.steps + 1):
        loss = F.cross_entropy(*answers(model, *task.batch(task.batch_size, task.length, random)))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            raise FloatingPointError(f"MQAR step {step}: loss {losses[-1]}, gradient norm {norms[-1]}")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            say(f"  MQAR step {step}/{task.steps}  loss {losses[-1]:.3f}")
    return model, {"losses": losses, "gradient_norms": norms}


@torch.no_grad()
def score_recall(model: TitansModel, task: RecallTask, length: int) -> float:
    """Share of queries answered right at ``length`` tokens, on samples that no training run sees."""
    model.eval()
    random = torch.Generator().manual_seed(SCORING_SEED)
    rows, right = max(1, SCORING_TOKENS // length), 0
    for start in range(0, task.samples, rows):
        logits, values = answers(model, *task.batch(min(rows, task.samples - start), length, random))
        right += int((logits.argmax(-1) == values).sum())
    return right / (task.samples * task.pairs)


def answers(model: TitansModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, V]`` where something is asked, and the N right values.

    Logits of all tokens would cost more than the rest of a small model with a large vocabulary.
    """
    hidden = model(ids, logits_to_keep=1, output_hidden_states=True).hidden_states[-1][:, :-1]
    values = labels[:, 1:]
    asked = values != IGNORED
    return model.head(hidden[asked]), values[asked]


@torch.no_grad()
def state_bytes(model: TitansModel, task: RecallTask, length: int) -> int:
    """Bytes that one stream carries after a sample of this length."""
    ids, _ = task.batch(1, length, torch.Generator().manual_seed(SCORING_SEED))
    return model.eval()(ids, logits_to_keep=1).state.nbytes
