"""Sampling: every step costs the same time and memory, whatever has been read before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from titans.models.language_model import TitansModel
    from titans.models.state import ModelState


LOWEST = 1e-30  # temperatures and shares below are as good as 0, and float32 takes them for it


class GenerationMixin:
    """``generate`` and ``stream`` for a model whose call takes and returns a state."""

    @overload
    def generate(self, prompt: Tensor, max_new_tokens: int = ..., temperature: float = ..., top_k: int | None = ...,
                 top_p: float | None = ..., eos_token_id: int | Sequence[int] | None = ...,
                 state: ModelState | None = ..., attention_mask: Tensor | None = ...,
                 generator: torch.Generator | None = ...,
                 return_state: Literal[False] = ...) -> Tensor: ...  # fmt: skip

    @overload
    def generate(self, prompt: Tensor, max_new_tokens: int = ..., temperature: float = ..., top_k: int | None = ...,
                 top_p: float | None = ..., eos_token_id: int | Sequence[int] | None = ...,
                 state: ModelState | None = ..., attention_mask: Tensor | None = ...,
                 generator: torch.Generator | None = ...,
                 *, return_state: Literal[True]) -> tuple[Tensor, ModelState]: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Continue a prompt.

        Args:
            prompt: int64 [B, T], T ≥ 1.
            max_new_tokens: at most so many new tokens per row, ≥ 0.
            temperature: > 0; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only.
            top_p: sample among the smallest set of tokens that holds this probability, in (0, 1].
            eos_token_id: a row that has produced it, or one of several, is finished; it is filled up with the first.
            state: what has been read before the prompt.
            attention_mask: [B, T], 0 for padding.
            generator: source of randomness, on the model's device.
            return_state: also return the state after every token of the result but the last one sampled.

        Returns:
            [B, T + new], and the state if asked for.
        """
        sampling = _Sampling(temperature, top_k, top_p, generator)
        steps = _Steps(self, prompt, sampling, eos_token_id, state, attention_mask)  # type: ignore[arg-type]
        new = list(steps.take(max_new_tokens))
        out = torch.cat((prompt, *(token.unsqueeze(1) for token in new)), 1)
        return (out, steps.state) if return_state else out

    @torch.no_grad()
    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens of ``generate`` one by one, int64 [B] each."""
        sampling = _Sampling(temperature, top_k, top_p, generator)
        steps = _Steps(self, prompt, sampling, eos_token_id, state, attention_mask)  # type: ignore[arg-type]
        yield from steps.take(max_new_tokens)


@dataclass(frozen=True)
class _Sampling:
    """How a token is drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if self.top_k is not None and (not _whole(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, got {self.top_k!r}")
        if self.top_p is not None and (not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if not isinstance(self.generator, torch.Generator | None):
            raise ValueError(f"generator must be a torch.Generator, got {self.generator!r}")


class _Steps:
    """One run of sampling: checks its arguments, reads the prompt, then yields tokens."""

    def __init__(
        self,
        model: TitansModel,
        prompt: Tensor,
        sampling: _Sampling,
        eos_token_id: int | Sequence[int] | None,
        state: ModelState | None,
        attention_mask: Tensor | None,
    ):
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            raise ValueError(f"prompt must be a tensor [B, T], got {getattr(prompt, 'shape', type(prompt).__name__)}")
        if attention_mask is not None and attention_mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask must have the prompt's shape {list(prompt.shape)}, got {list(attention_mask.shape)}"
            )
        if attention_mask is not None and not bool(attention_mask.bool().any(1).all()):
            raise ValueError("attention_mask leaves a row of the prompt without tokens")
        self.model, self.sampling = model, sampling
        self.ends = _ends(eos_token_id, model.config.vocab_size, prompt.device)
        # The last real token of each row, wherever its padding is.
        last = None
        if attention_mask is not None:
            columns = torch.arange(prompt.shape[1], device=prompt.device)
            last = (columns * attention_mask.bool()).argmax(1)
        out = model(prompt, state=state, attention_mask=attention_mask, logits_to_keep=0 if last is not None else 1)
        self.logits = out.logits[:, -1] if last is None else out.logits[torch.arange(len(last)), last]
        self.state: ModelState = out.state

    def take(self, count: int) -> Iterator[Tensor]:
        if not _whole(count) or count < 0:
            raise ValueError(f"max_new_tokens must be an integer of at least 0, got {count!r}")
        running = torch.ones(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)
        for step in range(count):
            token = sample(self.logits, *vars(self.sampling).values())
            if self.ends is not None:
                token = torch.where(running, token, self.ends[0])
            yield token
            if self.ends is not None:
                running = running & ~torch.isin(token, self.ends)
                if not bool(running.any()):
                    return
            if step + 1 < count:
                mask = None if self.ends is None else running.unsqueeze(1)
                out = self.model(token.unsqueeze(1), state=self.state.given(), attention_mask=mask)
                self.logits, self.state = out.logits[:, -1], out.state


def _whole(value: Any) -> bool:
    """Is it an integer? Python counts True among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _ends(eos_token_id: int | Sequence[int] | None, vocab_size: int, device: torch.device) -> Tensor | None:
    """The tokens that end a row, int64 [n], n ≥ 1."""
    if eos_token_id is None:
        return None
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.flatten().tolist()
    ends = list(eos_token_id) if isinstance(eos_token_id, Sequence) else [eos_token_id]
    if not ends:
        raise ValueError("eos_token_id must hold at least one id, got none")
    for end in ends:
        if not _whole(end) or not 0 <= end < vocab_size:
            raise ValueError(f"eos_token_id must lie in 0..{vocab_size - 1}, got {end!r}")
    return torch.tensor(ends, device=device)


def check_logits(logits: Tensor) -> None:
    """Raise a FloatingPointError unless every position's largest logit is finite: what is made of the others is
    noise."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise FloatingPointError("the model's logits are not finite: its weights or its state are damaged or diverged")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row from logits [B, V]."""
    if logits.device.type == "cpu":  # elsewhere a look at every token means to wait
        check_logits(logits)
    if temperature < LOWEST:
        return logits.argmax(-1)
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        chances = ordered.softmax(-1)
        # A token stays while the ones before it hold less than top_p, so the most likely one always does.
        drop = chances.cumsum(-1) - chances >= max(top_p, LOWEST)
        logits = logits.masked_fill(drop.gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
