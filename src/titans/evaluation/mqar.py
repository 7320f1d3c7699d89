"""Multi-query associative recall over bare tokens, for models trained on it: zoology's setting and an easy one.

An example with 2 pairs among 12 tokens of vocabulary, keys below 6, values from 6 on, fillers random in zoology's
setting (here drawn as dots)::

    ids     2 8 4 7 . . 4 . . . 2 .
    answer              7       8      said at the key, so that labels, which the model shifts, stand one further

The score of a sample is the share of its queries answered right. Records hold the bytes of state as well: recall is a
matter of how much a state can hold.

Source: Arora et al. 2023 (zoology, arXiv 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from titans.data import Tokenizer, mqar_batch
from titans.data.synthetic import FILLER
from titans.evaluation.reading import device_of, piece_length
from titans.evaluation.task import IGNORED, NotMeasurable, Record, mean_score
from titans.models.generation import check_logits

POWER = 0.01


class Mqar:
    """MQAR at any length.

    Args:
        name: "mqar_zoology": 8,192 tokens of vocabulary, gaps by a power law, random fillers, 4 pairs at 64 tokens, 8
            at 128, 16 at 256, 64 from 512 on; or "mqar_easy": 128 tokens of vocabulary, gaps drawn uniformly, one
            filler, 6 pairs.
    """

    unit = "accuracy of queries"

    def __init__(self, name: str):
        self.name = name
        self.zoology = name == "mqar_zoology"
        self.vocab = 8192 if self.zoology else 128
        self.note = (
            "zoology's samples; its lengths are 64 to 512, beyond them the 64 pairs stay"
            if self.zoology
            else "easier than zoology's (128 tokens of vocabulary, 6 pairs, uniform gaps, one filler): not comparable"
        )

    def pairs(self, length: int) -> int:
        """Key-value pairs of a sample."""
        if not self.zoology:
            return 6
        return 64 if length >= 512 else max(1, length // 16)

    def settings(self) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return {}

    def count(self, tokenizer: Tokenizer, length: int, samples: int) -> int:
        """As `titans.evaluation.task.Task`."""
        return samples

    def batch(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``ids`` and shifted ``labels``, int64 [B, T], as `titans.data.mqar_batch`.

        Raises:
            NotMeasurable: the length is odd (zoology) or too short.
        """
        pairs = self.pairs(length)
        if self.zoology and length % 2:
            raise NotMeasurable(f"the length must be even, got {length}")
        if length < 4 * pairs:
            raise NotMeasurable(f"{length} tokens are too few, {pairs} pairs take {4 * pairs}")
        make = zoology_batch if self.zoology else mqar_batch
        return make(batch, length, pairs, self.vocab, generator)

    @torch.no_grad()
    def measure(
        self, model: Any, tokenizer: Tokenizer, length: int, indices: Sequence[int], samples: int, seed: int
    ) -> list[Record]:
        """As `titans.evaluation.task.Task`; the tokenizer is not used."""
        config = getattr(model, "config", None)
        if config is not None and config.vocab_size < self.vocab:
            raise NotMeasurable(f"needs {self.vocab:,} tokens of vocabulary, the model has {config.vocab_size:,}")
        seeds = [Random(f"{self.name} {length} {seed} {i}").getrandbits(62) for i in indices]
        rows = [self.batch(1, length, torch.Generator().manual_seed(s)) for s in seeds]
        ids, labels = (torch.cat(parts).to(device_of(model)) for parts in zip(*rows, strict=True))
        right, state = answered_right(model, ids, labels)
        scores = (right.double() / (labels != IGNORED).sum(1)).tolist()
        told = {
            "tokens": length,
            "state_bytes": state.nbytes // len(indices),
            "pairs": self.pairs(length),
        }
        return [{"index": i, **told, "score": score} for i, score in zip(indices, scores, strict=True)]

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """As `titans.evaluation.task.Task`."""
        return {**mean_score(records), "pairs": records[0]["pairs"]}

    def training_row(
        self, tokenizer: Tokenizer, length: int, random: Random, questions: int = 1, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `titans.evaluation.task.Task`; dense labels are the next tokens where nothing is asked."""
        ids, labels = (x[0] for x in self.batch(1, length, torch.Generator().manual_seed(random.getrandbits(62))))
        return ids, torch.where(labels == IGNORED, ids, labels) if dense else labels


def answered_right(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """How many queries of each row are answered right, int64 [B], and the state at the end; read in pieces."""
    state, right = None, torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)), 1)
    piece = piece_length(model, len(ids))
    for part, wanted in zip(ids.split(piece, 1), targets.split(piece, 1), strict=True):
        asked = bool((wanted != IGNORED).any())
        out = model(part, state=state, logits_to_keep=0 if asked else 1)
        state = out.state
        if asked:
            check_logits(out.logits)
            right += ((out.logits.argmax(-1) == wanted) & (wanted != IGNORED)).sum(1)
    return right, state


def zoology_batch(batch: int, length: int, pairs: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch as zoology's ``multiquery_ar`` makes it.

    Pairs first, then every key once more: a gap g (counted in twos) is drawn without replacement with chances
    proportional to (g + 1)^(0.01 - 1), so most keys are asked for soon. Everything else is a random token.

    Args:
        batch: rows B.
        length: T, even, at least 4 · pairs.
        pairs: key-value pairs.
        vocab: keys come from [1, vocab/2), values from [vocab/2, vocab).
        generator: source of all randomness, on the CPU.

    Returns:
        ``ids`` and ``labels``, int64 [B, T], labels as in `titans.data.mqar_batch`.
    """
    space = (length - 2 * pairs) // 2
    half = vocab // 2
    keys = 1 + _draw(torch.zeros(half - 1), batch, pairs, generator)
    values = half + _draw(torch.zeros(vocab - half), batch, pairs, generator)
    log_chance = (POWER - 1) * torch.arange(1, space + 1, dtype=torch.float64).log()
    queries = 2 * pairs + 2 * _draw(log_chance, batch, pairs, generator)
    ids = torch.full((batch, length), FILLER, dtype=torch.int64)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    ids.scatter_(1, queries, keys)
    ids = torch.where(ids == FILLER, torch.randint(vocab, ids.shape, generator=generator), ids)
    # The token after a query is a filler, so the shifted label needs no place of its own in the ids.
    labels = torch.full_like(ids, IGNORED).scatter_(1, queries + 1, values)
    return ids, labels


def _draw(log_chance: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices a row, int64 [B, count], drawn one after the other by their chances.

    The largest of log-chances plus Gumbel noise are such a draw.
    """
    uniform = torch.rand(batch, len(log_chance), generator=generator, dtype=torch.float64)
    return (log_chance - (-uniform.log()).log()).topk(count, 1).indices
