"""Reading long samples in pieces and answering them greedily: the working memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans.data import Tokenizer

READ_AT_ONCE = 2**14
"""Tokens of a call, over all rows."""
BATCH_TOKENS = 2**16
MOST_ROWS = 16


def rows_at_once(length: int) -> int:
    """How many samples of this length are read side by side."""
    return max(1, min(MOST_ROWS, BATCH_TOKENS // length))


def piece_length(model: Any, rows: int) -> int:
    """Tokens of a call: whole segments of the model, so that no chunk is cut."""
    config = getattr(model, "config", None)
    segment = 1 if config is None else config.segment
    return max(segment, READ_AT_ONCE // rows // segment * segment)


def device_of(model: Any) -> torch.device:
    """Where the model's weights lie."""
    return next(model.parameters()).device


def batch_of(rows: Sequence[np.ndarray], model: Any) -> Tensor:
    """Rows of one length as int64 [B, T] on the model's device."""
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device_of(model))


@torch.no_grad()
def read(model: Any, ids: Tensor, piece: int | None = None) -> Any:
    """The state after ``ids``, read from the start in pieces; no logits are kept.

    Args:
        model: called as ``model(ids, state=state, logits_to_keep=1)``.
        ids: int64 [B, T].
        piece: tokens of a call; chosen by the batch if None. It changes the memory needed, not the state.
    """
    state = None
    piece = piece_length(model, ids.shape[0]) if piece is None else piece
    for part in ids.split(piece, dim=1):
        state = model(part, state=state, logits_to_keep=1).state
    return state


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    settled: Callable[[int, str], bool],
    piece: int | None = None,
) -> tuple[list[str], int]:
    """Greedy continuations of prompts, one a row, and the bytes of state that each row has after its prompt.

    The rows are read together up to the end of the shortest, then the rest with padding: the padded call is short.

    Args:
        model: a TitansModel, or what has its call and its ``stream``.
        tokenizer: the model's; its separator ends an answer.
        prompts: token ids, at least 2 each.
        max_new_tokens: longest answer.
        settled: ``settled(row, text)`` says that more text will not change the score, so that decoding may end.
        piece: as `read`.
    """
    common = min(map(len, prompts)) - 1
    state = read(model, batch_of([prompt[:common] for prompt in prompts], model), piece)
    rest = max(map(len, prompts)) - common
    tails, mask = np.full((len(prompts), rest), tokenizer.separator_id), np.zeros((len(prompts), rest), dtype=bool)
    for row, prompt in enumerate(prompts):
        tails[row, : len(prompt) - common], mask[row, : len(prompt) - common] = prompt[common:], True
    steps = model.stream(
        batch_of(list(tails), model),
        max_new_tokens=max_new_tokens,
        temperature=0,
        eos_token_id=tokenizer.separator_id,
        state=state,
        attention_mask=None if mask.all() else torch.from_numpy(mask).to(device_of(model)),
    )
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for tokens in steps:
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token == tokenizer.separator_id
            if not ended[row]:
                new[row].append(token)
                ended[row] = settled(row, _decode(tokenizer, new[row]))
        if all(ended):
            break
    return [_decode(tokenizer, ids) for ids in new], state.nbytes // len(prompts)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of what a model says; ids that only the model knows, as where its vocabulary is rounded up, are no text."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
