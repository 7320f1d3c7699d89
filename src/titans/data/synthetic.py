"""Synthetic tasks with a known answer: recall of key-value pairs, and noise that nothing can predict.

Shapes: B batch, T length, P pairs, V vocabulary.
"""

import torch
from torch import Tensor

from titans.names import check_kind

IGNORED = -100
FILLER = 0


def mqar_batch(
    batch: int, length: int, pairs: int, vocab: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: ``pairs`` key-value pairs, then every key asked once again.

    A row reads ``k1 v1 k2 v2 ... kP vP``, then filler with each key once at a random even position. Keys come from
    ``[1, V/2)``, values from ``[V/2, V)``, neither repeats within a row. The model sees the key and must say its value
    next; the value itself does not appear a second time.

    Args:
        batch: rows, at least 1.
        length: T, at least ``4 * pairs``.
        pairs: P, at least 1.
        vocab: V; both halves must hold ``pairs`` different tokens.
        generator: source of all randomness; the same generator state gives the same batch.
        device: where the result lies.

    Returns:
        ``input_ids`` and ``labels``, int64 ``[B, T]``. Labels follow Hugging Face's convention, in which the model
        compares ``logits[:, t]`` with ``labels[:, t + 1]``: a query at position t has its value at ``labels[:, t + 1]``
        and every other label is -100.

    Raises:
        ValueError: a number is out of its range; the message names it.

    Source: Arora et al. 2024 (zoology), with gaps drawn uniformly instead of by a power law.
    """
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    for name, value in (("batch", batch), ("length", length), ("pairs", pairs), ("vocab", vocab)):
        check_kind(name, value, int, "an integer")
    for name, value in (("batch", batch), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    if length < 4 * pairs:
        raise ValueError(f"length: {length} is too short for {pairs} pairs and their queries, at least {4 * pairs}")
    first_value = vocab // 2
    if first_value - 1 < pairs:
        raise ValueError(f"vocab: {vocab} holds fewer than {pairs} different keys, at least {2 * pairs + 2}")

    keys = 1 + _distinct(batch, pairs, first_value - 1, generator)
    values = first_value + _distinct(batch, pairs, vocab - first_value, generator)
    # The last slot is at most T - 2, so that the shifted label still lies inside the row.
    slots = (length - 2 * pairs) // 2
    queries = 2 * pairs + 2 * _distinct(batch, pairs, slots, generator)

    input_ids = torch.full((batch, length), FILLER, dtype=torch.int64, device=generator.device)
    input_ids[:, 0 : 2 * pairs : 2] = keys
    input_ids[:, 1 : 2 * pairs : 2] = values
    input_ids.scatter_(1, queries, keys)
    labels = torch.full_like(input_ids, IGNORED)
    labels.scatter_(1, queries + 1, values)
    return input_ids.to(device), labels.to(device)


def mqar_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the queries whose largest logit is the right value.

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]`` as :func:`mqar_batch` returns them; -100 is left out.

    Raises:
        ValueError: the shapes do not fit, or no label is left to score.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: must be [B, T] of logits {list(logits.shape)}, got {list(labels.shape)}")
    targets = labels[:, 1:]
    asked = targets != IGNORED
    if not asked.any():
        raise ValueError("labels: every label after the first is -100, nothing to score")
    predictions = logits[:, :-1].argmax(dim=-1)
    return (predictions == targets)[asked].double().mean().item()


def iid_batch(
    batch: int, length: int, vocab: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Uniformly random tokens: no causal model can reach a loss below ``ln(vocab)``, so one that does reads the future.

    Returns:
        ``input_ids`` and equal ``labels``, int64 ``[B, T]``.

    Raises:
        ValueError: a number below 1; the message names it.
    """
    for name, value in (("batch", batch), ("length", length), ("vocab", vocab)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    input_ids = torch.randint(vocab, (batch, length), generator=generator, device=generator.device).to(device)
    return input_ids, input_ids.clone()


def _distinct(batch: int, count: int, limit: int, generator: torch.Generator) -> Tensor:
    """``count`` different integers from ``[0, limit)`` in random order for each row, int64 ``[B, count]``."""
    noise = torch.rand(batch, limit, generator=generator, device=generator.device)
    return noise.topk(count, dim=1).indices
